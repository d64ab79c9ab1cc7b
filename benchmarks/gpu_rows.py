"""Rows of the papers' tables on a GPU that is there for minutes: python benchmarks/gpu_rows.py [--minutes M].

Prints what is not measured yet, in the order of claims served per minute, and how long each training takes by the
speeds measured so far (results/throughput_*), and the comparisons of `residrop bench skip` that no GPU of this name has
made. With --minutes it measures: one after the other, rows by `residrop reproduce`, which is stopped in time and saves
what is not finished; the same command goes on from there.
--pack writes what resuming needs, a file for every run that is not finished, and what the ledger has got, for machines
that are gone afterwards; --unpack reads such files.
"""

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from residrop.common.errors import UsageError
from residrop.research import ledger
from residrop.research.papers.estimate import Estimator, as_text
from residrop.research.papers.runner import Runner
from residrop.research.papers.work import Settings
from residrop.training.recipe import Recipe
from residrop.training.setup import choose_device

ORDER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("swapout/table-2", ("linear-1-0.5-deterministic", "linear-1-0.5-stochastic")),
    ("swapout/table-1", ("swapout-v2-w2", "resnet-v2-ours-w2", "stochastic-depth-v2-w2", "dropout-v2-w2")),
    ("swapout/table-1", ("skipforward-v2-w2", "swapout-v1-w2")),
    ("swapout/table-2", ("0.5-0.5-stochastic", "0.2-0.8-stochastic", "0.8-0.2-stochastic", "linear-0.5-1-stochastic")),
    ("depth-dropout/table-1", ("0.0", "0.25", "0.5", "0.75")),
    ("stochastic-depth/table-1", ("constant-cifar10", "stochastic-cifar10")),
    ("stochastic-depth/section-4", ("constant-cifar10-plain", "stochastic-cifar10-plain")),
    ("sd-regularization/table-2", ("constant", "uniform-0.5", "sensemode-0.5", "uniform-0.2", "sensemode-0.2")),
)
"""Groups of rows, each of one table. Other rows of the same recipes are filled with them."""
SKIPPING: tuple[tuple[str, int, int], ...] = (
    ("timm/vit_base_patch16_224", 224, 256),
    ("torchvision/resnet50", 224, 256),
    ("timm/convnext_tiny", 224, 256),
    ("transformers/llama_8_layers", 0, 2048),
)
"""Networks of which `residrop bench skip` measures time and memory once for each device, pixels (0: it reads tokens),
and batch sizes."""
SURVIVAL = ("uniform(0.5)", "linear_decay(0.8)", "linear_decay(0.5)")
BENCH = 150.0  # seconds of one of them, at most
AFTER = 4  # groups of rows before they have their turn
STARTING = 60.0  # seconds before the first update: data, compilation, CUDA graphs
SAVING = 20.0  # seconds that are left for stopping and saving
RESUMING = (
    *("recipe.json", "versions.json", "dataset.json", "normalization.safetensors", "metrics.jsonl", "last.pt"),
    *("survival.jsonl", "instruments.jsonl", "best.safetensors"),  # of some runs
)
UNITS = ("swapout", "skipforward", "dropout", "dropout-residual", "dropout-sum")  # rules of a coin for every activation

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", help="CIFAR-10, as for residrop reproduce; needed with --minutes")
parser.add_argument("--minutes", type=float, help="measure, for so long; without it the plan is shown")
parser.add_argument("--workers", type=int, default=2, help="trainings at a time")
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("--scale", type=float, default=1.0, help="share of the schedules")
parser.add_argument("--device", default="auto")
parser.add_argument("--ledger", type=Path, default=Path("results"))
parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"))
parser.add_argument("--pack", type=Path, help="folder for the files to take along")
parser.add_argument("--unpack", type=Path, nargs="+", default=(), help="such files")


class Speed(NamedTuple):
    """A measured speed of training."""

    layers: int
    width: int
    units: bool
    flops: float  # per second, of forward and backward


class Known(Estimator):
    """Estimates by speeds that were measured on a GPU, wherever this process runs."""

    def __init__(self, speeds: Sequence[Speed]) -> None:
        super().__init__("cpu")
        self.speeds = speeds

    def rate(self, recipe: Recipe) -> float:
        """The speed of the likest network: of this width, of this kind of rule, of the nearest depth."""
        width, units, layers = recipe.width or 1, recipe.rule in UNITS, layers_of(recipe.network)
        by = {one: (one.width != width, one.units != units, abs(one.layers - layers), one.flops) for one in self.speeds}
        return min(self.speeds, key=by.__getitem__).flops


class Bench(NamedTuple):
    """A comparison of `residrop bench skip`, and the file that it is missing from."""

    arguments: tuple[str, ...]
    file: Path


class Group(NamedTuple):
    """Rows of a table of which something is missing, and the seconds that each training still takes, by name."""

    table: str
    rows: tuple[str, ...]
    seconds: dict[str, float]


def layers_of(network: str) -> int:
    """110 of "stable-resnet-110"."""
    return int(network.rpartition("-")[2])


def speeds_in(entries: Iterable[dict[str, Any]]) -> list[Speed]:
    """Of our trainings on GPUs, from what `residrop bench throughput` has written."""
    found = [one for one in entries if one.get("variant") == "residrop" and one.get("model_flops_per_second")]
    return [
        Speed(layers_of(one["model"]), one["width"], one["rule"] in UNITS, one["model_flops_per_second"])
        for one in found
        if not one["device"].startswith("cpu")
    ]


def benches(folder: Path, device: str) -> list[Bench]:
    """The comparisons that the ledger does not have of this device (a GPU's name)."""
    found: list[Bench] = []
    for compiled in (False, True):
        for model, pixels, batch_size in SKIPPING:
            size = f"{pixels}px" if pixels else ""
            words = ("skip", model.rpartition("/")[2], size, "compiled" * compiled, device)
            file = folder / ("_".join(filter(None, words)).lower().replace(" ", "-") + ".json")
            options = ("--models", model, "--batch-size", str(batch_size))
            options += ("--pixels", str(pixels)) if pixels else ()
            options += ("--survival", *SURVIVAL, "--precision", "bf16", *(("--compile",) if compiled else ()))
            if not file.exists():
                found.append(Bench((*options, "--json", str(file)), file))
    return found


def missing(arguments: argparse.Namespace, console: Console) -> list[Group]:
    """The groups that are not complete, in order; a training that two groups share is in the first."""
    speeds = speeds_in(ledger.read(arguments.ledger))
    if not speeds:
        raise UsageError(f"{arguments.ledger} has no speed of a GPU; run residrop bench throughput on one, with --json")
    estimator = Known(speeds)
    settings = Settings(scale=arguments.scale, seeds=arguments.seeds, device=arguments.device, data=arguments.data)
    runner = Runner(settings, arguments.runs, arguments.ledger, console=console, quiet=True)
    found: list[Group] = []
    planned: set[str] = set()
    for table, rows in ORDER:
        plan = runner.plan(table, rows)
        new = {name: one for name, one in plan.trainings.items() if name not in planned}
        planned |= new.keys()
        if new:
            seconds = {name: STARTING + estimator.left(one, arguments.runs) for name, one in new.items()}
            found.append(Group(table, rows, seconds))
    return found


def show(todo: Sequence[Group | Bench], workers: int, console: Console) -> None:
    """The plan as a table."""
    table = Table("rows", "training", "takes", "done after")
    total = 0.0
    for group in todo:
        if isinstance(group, Bench):
            total += BENCH
            table.add_row(f"bench skip: {group.file.name}", "", as_text(BENCH), as_text(total))
            continue
        for number, (name, seconds) in enumerate(group.seconds.items()):
            total += seconds / workers
            rows = f"{group.table}: {', '.join(group.rows)}" if number == 0 else ""
            table.add_row(rows, name, as_text(seconds), as_text(total))
    console.print(table)
    console.print(f"by the speeds measured so far; with {workers} at a time, if each then runs as fast as alone")


def run_for(command: Sequence[str], seconds: float) -> int:
    """Exit status of a command, which gets Ctrl-C after so long, and is killed if it has not ended `SAVING` later.

    Raises:
        KeyboardInterrupt: Ctrl-C by the user, when the command has ended of it.
    """
    # a shell's background jobs ignore Ctrl-C, and what they start would, too
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        return process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        return ended(process)
    except KeyboardInterrupt:  # the terminal has told the command, too
        ended(process)
        raise


def ended(process: subprocess.Popen[bytes]) -> int:
    """Exit status of a command that was told to stop."""
    try:
        return process.wait(SAVING)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait()


def measure(todo: Sequence[Group | Bench], arguments: argparse.Namespace, until: float, console: Console) -> int:
    """One after the other, as long as there is time; how many failed."""
    failed = 0
    for one in todo:
        left = until - time.monotonic() - SAVING
        name, least = (one.file.name, BENCH) if isinstance(one, Bench) else (one.table, STARTING)
        if left < least:
            console.print(f"left out: {name}, with {as_text(max(left, 0.0))} left")
            continue
        command = [sys.executable, "-m", "residrop"]
        if isinstance(one, Bench):
            command += ["bench", "skip", *one.arguments, "--device", arguments.device]
        else:
            command += ["reproduce", one.table, "--rows", *one.rows]
            for option in ("data", "seeds", "scale", "device", "ledger", "runs", "workers"):
                command += [f"--{option}", str(getattr(arguments, option))]
        status = run_for(command, left)
        if status and isinstance(one, Bench) and one.file.exists():
            one.file.replace(one.file.with_suffix(".partial"))  # some rows only: it is to be made again
        if status and time.monotonic() < until - SAVING:  # not because it was stopped
            failed += 1
            console.print(f"{name} ended with status {status}")
    return failed


def pack(folder: Path, runs: Path, results: Path, since: float, console: Console) -> None:
    """One tar file for every run that is not finished, one for what the ledger has got since then (seconds)."""
    folder.mkdir(parents=True, exist_ok=True)
    for run in sorted(path.parent for path in runs.glob("*/recipe.json")):
        if not (run / "evaluation.json").exists():
            written([run / name for name in RESUMING], runs, folder / f"{run.name}.tar", console)
    new = [path for path in sorted(results.glob("*.json")) if path.stat().st_mtime >= since]
    if new:
        written(new, results, folder / "ledger.tar", console)


def written(paths: Iterable[Path], start: Path, target: Path, console: Console) -> None:
    """A tar file of those files that are there, named from `start` on."""
    with tarfile.open(target, "w") as archive:
        for path in paths:
            if path.exists():
                archive.add(path, path.relative_to(start))
    console.print(f"packed: {target}, {target.stat().st_size / 2**20:.1f} MiB")


def unpack(files: Iterable[Path], runs: Path, results: Path) -> None:
    """What `pack` has written, put where it came from."""
    for file in files:
        target = results if file.name == "ledger.tar" else runs
        target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(file) as archive:
            archive.extractall(target, filter="data")


def main() -> int:
    arguments = parser.parse_args()
    if arguments.minutes is not None and arguments.data is None:
        parser.error("--minutes trains, which needs images; give --data")
    if arguments.minutes is not None and arguments.device == "auto" and choose_device("auto").type == "cpu":
        parser.error("there is no GPU here, and these trainings take days without; --device cpu does so all the same")
    started, now = time.monotonic(), time.time()
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    try:
        unpack(arguments.unpack, arguments.runs, arguments.ledger)
        groups = missing(arguments, console)
    except (UsageError, OSError, tarfile.TarError) as error:
        parser.error(str(error))
    here = choose_device(arguments.device)
    compared = benches(arguments.ledger, torch.cuda.get_device_name(here) if here.type == "cuda" else "gpu")
    if here.type == "cpu" and arguments.minutes is not None:
        compared = []  # of a GPU alone
    todo = [*groups[:AFTER], *compared, *groups[AFTER:]]
    show(todo, arguments.workers, console)
    status = 0
    if arguments.minutes is not None:
        try:
            status = 1 if measure(todo, arguments, started + 60.0 * arguments.minutes, console) else 0
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
            status = 130
    if arguments.pack is not None:
        pack(arguments.pack, arguments.runs, arguments.ledger, now, console)
    return status


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
