"""`residrop shrink`: a smaller plain network out of a run."""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import nn

from residrop.cli.export import facts_of
from residrop.cli.pictures import panels
from residrop.cli.recalibrate import training_images
from residrop.cli.shared import Device, Json, Weights, open_run, parse, table_of
from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError
from residrop.common.output import check_target, console_for, write
from residrop.inference import evaluate
from residrop.inference.deploy.export import export, format_of
from residrop.subnetworks.choosing import Budget, By
from residrop.subnetworks.frontier import Point, frontier
from residrop.subnetworks.shrink import Shrunk, shrink
from residrop.training import Recipe, Run
from residrop.training.logbook import Meter
from residrop.training.presets import train_command
from residrop.training.setup import choose_device, loader_of_run, precision_context

__all__ = ["run"]


@dataclass(frozen=True)
class Shrink:
    """Make a smaller plain network of some of a run's residual blocks, which takes no more than a budget.

    A network that was trained with blocks absent at random contains smaller ones. Blocks are chosen on training images,
    by what each costs here and what the loss needs; batch norms get new statistics. The result is a run directory,
    which evaluate, predict, export and train --start take, and a file if --to asks for one. Its blocks are always
    present (rule constant); to train it further, see the command that is printed.

    residrop shrink runs/digits-001 --budget "0.6 of time" --to model.onnx
    residrop shrink runs/digits-001 runs/digits-002 --frontier
    """

    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(help="Run directory; several for --frontier.")
    ]
    budget: str = "0.6 of time"
    """What a forward may take: "0.6 of time" (measured here), "0.6 of flops", "0.6 of blocks", "12 of blocks", or
    "8.5 ms" for a batch. With --frontier only its unit counts: time, flops or blocks."""
    by: By | None = None
    """How blocks are chosen: greedy (the least needed block goes, then all others are measured again: of L blocks up to
    L (L + 1) / 2 losses), removal (the loss without each block) or sensitivity (its first-order estimate, by one
    backward pass a batch); to compare with: every_other, first, random. None: greedy for up to 24 blocks, else
    removal."""
    batches: int = 16
    """Batches of training images to choose on, and to recalibrate with."""
    batch_size: int | None = None
    """Images in a batch, also where time is measured (None: the recipe's)."""
    recalibrate: bool = True
    """Give batch norms new statistics."""
    out: Path | None = None
    """Run directory to write (None: beside RUN, named after the budget)."""
    to: Path | None = None
    """Also write a file that predicts without residrop: .onnx, .pt2 or .safetensors."""
    frontier: bool = False
    """In place of one sub-network: error on the test images against time, for budgets from 0.2 to 1 of the whole, as a
    table and a picture (frontier.png of the first run)."""
    weights: Weights = "model"
    data: str | None = None
    """Another source of images with the same classes."""
    device: Device = "auto"
    json: Json = None


def run(arguments: Sequence[str], prog: str) -> int:
    """Shrink a run, or draw what its sub-networks lose."""
    args = parse(Shrink, arguments, prog)
    check_whole("batches", args.batches, least=1)
    check_target(args.json)
    if args.to is not None:
        check_target(args.to, "--to")
    if not args.runs or (len(args.runs) > 1 and not args.frontier):
        raise ConfigError(f"{len(args.runs)} runs were given; give one, or several with --frontier")
    return _frontier(args) if args.frontier else _one(args)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    """A bar for everything that is done, one after the other."""
    meters: dict[str, Meter] = {}

    def tell(what: str, share: float) -> None:
        if what not in meters:
            for meter in meters.values():
                meter.__exit__(None, None, None)
            meters.clear()
            meters[what] = Meter(1000, 0, what, console=console)
            meters[what].__enter__()
        meters[what].step(int(1000 * share), "", 0.0)

    try:
        yield tell
    finally:
        for meter in meters.values():
            meter.__exit__(None, None, None)


class _Opened:
    """A run with its network, training batches and test error."""

    def __init__(self, path: Path, args: Shrink) -> None:
        self.run, model = open_run(path, args.weights)
        self.device = choose_device(args.device)
        self.model = model.to(self.device)
        self.recipe = self.run.recipe()
        loader = training_images(self.run, args.data, self.device, args.batch_size)
        self.batches = [pair for _, pair in zip(range(args.batches), loader.train_batches(0), strict=False)]
        self.test = loader_of_run(self.run, args.data, self.device)

    def error(self, model: nn.Module) -> float:
        """Error on the test images in one pass, in percent."""
        return evaluate(model, self.test.eval_batches(), 0).deterministic.error


def _one(args: Shrink) -> int:
    out = args.out or args.runs[0].with_name(f"{args.runs[0].name}-{re.sub('[^0-9a-z.]+', '-', args.budget.lower())}")
    if (out / "recipe.json").exists():
        raise ConfigError(f"{out} already holds a run; choose another --out")
    opened = _Opened(args.runs[0], args)
    recipe, dataset = opened.recipe, opened.run.dataset()
    size = (2, dataset["channels"], dataset["size"], dataset["size"])
    example = torch.randn(size, generator=torch.Generator().manual_seed(0))
    if args.to is not None:
        format_of(args.to, example)  # before any work
    with precision_context(recipe, opened.device)(), _progress(Console(stderr=True, markup=False)) as tell:
        found = shrink(
            opened.model,
            args.budget,
            batches=opened.batches,
            by=args.by,
            recalibrate=None if args.recalibrate else False,
            seed=recipe.seed,
            on_progress=tell,
        )
        if not found.kept:
            raise ConfigError(f"a budget of {args.budget} leaves no residual block; give a larger one")
        errors = opened.error(opened.model), opened.error(found.model)
    without = (*recipe.without, *_first_names(found.removed, recipe))
    smaller = recipe.replace(rule="constant", survival=None, budget=None, without=without, weights=None, **_PLAIN)
    made, again = _written(out, smaller, opened, found.model, errors[1])
    console = console_for(args.json)
    _print(console, found, errors, out)
    console.print(f"train it further: {train_command(smaller.replace(weights=str(out)))}", soft_wrap=True)
    if args.to is not None:
        done = export(again.cpu(), args.to, example, metadata=facts_of(made, "model"))
        console.print(f"{done.path}: checked with {done.checked_by}, outputs agree to {done.difference:.1e}")
    write(args.json, found.to_dict() | {"error": list(errors), "out": str(out), "to": args.to and str(args.to)})
    return 0


def _written(out: Path, recipe: Recipe, opened: _Opened, model: nn.Module, error: float) -> tuple[Run, nn.Module]:
    """The run directory of a sub-network, and what is read from it; nothing stays behind where it reads differently."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        made = Run.create(part, recipe, opened.run.dataset(), opened.run.normalization())
        made.save_weights("model", model)
        again = made.build("model").to(opened.device)
        with precision_context(opened.recipe, opened.device)():
            same = opened.error(again)
        if same != error:
            raise ConfigError(
                f"{out} was not kept: read back, its error is {same:.2f}%, not {error:.2f}%; take the network from "
                "residrop.shrink, or leave out other blocks"
            )
        part.chmod(0o755)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Run(out), again


def _first_names(removed: Sequence[str], recipe: Recipe) -> list[str]:
    """Names of blocks as the network had them before any were left out: layers of transformers are numbered anew."""
    if not recipe.network.startswith("transformers:"):
        return list(removed)
    found: list[str] = []
    for name in removed:
        parent, _, number = name.rpartition(".")
        gone = {one.rpartition(".")[2] for one in recipe.without if one.rpartition(".")[0] == parent}
        left = (str(old) for old in count() if str(old) not in gone)
        found.append(f"{parent}.{next(islice(left, int(number), None))}")
    return found


# what belongs to a rule that is no longer there
_PLAIN: dict[str, Any] = dict.fromkeys(("theta_2", "granularity", "rescale", "rows", "of")) | {
    "survival_timing": "constant",
    "coupling": "independent",
    "at_least": 0,
    "draw_every": 1,
    "spend": "uniform",
    "per_cost": False,
    "least": 0.0,
    "refresh": 0,
}


def _print(console: Console, found: Shrunk, errors: tuple[float, float], out: Path) -> None:
    total = len(found.kept) + len(found.removed)
    rows = [
        ["blocks", f"{total}", f"{len(found.kept)}"],
        ["ms a batch", f"{1000 * found.seconds[0]:.2f}", f"{1000 * found.seconds[1]:.2f}"],
        ["loss on training images", f"{found.loss[0]:.4f}", f"{found.loss[2]:.4f}"],
        ["error on test images", f"{errors[0]:.2f}%", f"{errors[1]:.2f}%"],
    ]
    console.print(table_of(None, ["", "whole", "smaller"], rows, left=("",)))
    console.print(
        f"time: {found.measured_time:.3f} of the whole network's"
        + (f", {found.predicted:.3f} were predicted" if found.unit == "time" else "")
        + (f"; loss before batch norms were recalibrated: {found.loss[1]:.4f}" if found.recalibrated else "")
    )
    console.print(f"left out: {', '.join(found.removed) or 'nothing'}")
    console.print(f"run: {out}")


def _frontier(args: Shrink) -> int:
    points: list[Point] = []
    unit = args.budget if args.budget in ("time", "flops", "blocks") else Budget.read(args.budget).unit
    names = [path.name for path in args.runs]
    with _progress(Console(stderr=True, markup=False)) as tell:
        for path in args.runs:
            opened = _Opened(path, args)
            with precision_context(opened.recipe, opened.device)():
                points += frontier(
                    {path.name if names.count(path.name) == 1 else str(path): opened.model},
                    opened.batches,
                    opened.error,
                    unit=unit,
                    by=args.by,
                    recalibrate=None if args.recalibrate else False,
                    seed=opened.recipe.seed,
                    on_progress=tell,
                )
    console = console_for(args.json)
    rows = [
        [
            *(one.name, one.budget, f"{len(one.kept)}/{one.blocks}", f"{1000 * one.seconds:.2f}"),
            *(f"{one.flops / 1e9:.3f}", f"{one.before:.2f}%", f"{one.metric:.2f}%"),
        ]
        for one in points
    ]
    headings = ["run", "budget", "blocks", "ms a batch", "GFLOPs", "error before", "error, recalibrated"]
    console.print(table_of("error of sub-networks on test images", headings, rows, left=("run", "budget")))
    picture = args.runs[0] / "frontier.png"
    draw(picture, points)
    console.print(f"picture: {picture}")
    write(args.json, {"points": [one.to_dict() for one in points], "picture": str(picture)})
    return 0


def draw(path: Path, points: Sequence[Point]) -> None:
    """Error against milliseconds, one line for every model."""
    with panels(path, 1, "error of sub-networks against time", "--frontier:") as (axes,):
        for number, name in enumerate(dict.fromkeys(one.name for one in points)):
            own = sorted((one for one in points if one.name == name), key=lambda one: one.seconds)
            milliseconds = [1000 * one.seconds for one in own]
            axes.plot(milliseconds, [one.metric for one in own], f"C{number}.-", label=f"{name}, recalibrated")
            axes.plot(milliseconds, [one.before for one in own], f"C{number}:", alpha=0.6, label=f"{name}, before")
        axes.set(xlabel="milliseconds a batch", ylabel="error on test images (%)", ylim=(0, None))
