"""`residrop train`: one network, then its evaluation both ways."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from residrop.cli.compare import Compare, compare
from residrop.cli.shared import Fields, Json, Log, Quiet, RecipeName, free_directory, parse, peek, resumed, show
from residrop.common.errors import ConfigError
from residrop.common.lock import held
from residrop.common.output import check_target, console_for, write
from residrop.common.torchrun import world_size
from residrop.training import Recipe, Run, preset, train
from residrop.training.distributed import process_group
from residrop.training.loggers import loggers_of
from residrop.training.presets import short_name
from residrop.training.setup import prepare

__all__ = ["run"]


@dataclass(frozen=True)
class Train:
    """Train one network with randomly present blocks and evaluate it, in expectation and by sampling.

    Start from a recipe and override any field: residrop train --recipe swapout/v2-20-w1 --data PATH --epochs 10.
    Learning-rate drops are shares of the training, so fewer epochs keep the schedule's shape. Ctrl-C saves;
    residrop train --resume --out RUN continues, and on the CPU gives the weights of an uninterrupted run.

    --seeds 3 trains with three seeds and prints means and standard deviations: a comparison of one rule, in its
    directory's layout. A finished run is trained for longer by --resume --out RUN --epochs MORE, if its learning rate
    is the same all along (--lr-drops without values).

    On several GPUs or processes: torchrun --nproc-per-node 2 -m residrop train ... Each takes its share of every batch.
    """

    settings: tyro.conf.OmitArgPrefixes[Fields] = field(default_factory=Fields)
    recipe: RecipeName = "digits"
    seeds: int = 1
    """Number of seeds, from --seed upwards; for several, --out is the directory of their runs."""
    out: Path | None = None
    """Run directory (default: runs/RECIPE-001, -002, ...)."""
    resume: bool = False
    """Continue the run in --out; its recipe is read from there unless --recipe is given."""
    log: Log = ("tensorboard",)
    json: Json = None
    quiet: Quiet = False


def run(arguments: Sequence[str], prog: str) -> int:
    """Train (into a free directory if none is named), show the evaluation, write JSON."""
    name, saved = peek(arguments, "--recipe") or "digits", resumed(arguments, "recipe.json")
    start = Run.open(saved.parent).recipe() if saved else preset(name).recipe
    log = loggers_of(saved.parent) if saved else ("tensorboard",)
    args = parse(Train, arguments, prog, Train(settings=Fields.from_recipe(start), recipe=name, log=log))
    recipe = args.settings.recipe()
    if args.seeds != 1:
        return _seeds(args, recipe)
    with process_group(recipe.device) as ranks, ExitStack() as stack:
        ranks.from_main(lambda: check_target(args.json))
        place = ranks.from_main(lambda: args.out or stack.enter_context(free_directory(short_name(args.recipe))))
        outcome = train(recipe, place, resume=args.resume, quiet=args.quiet, log=args.log)
    if not ranks.main:
        return 0
    facts = {
        "parameters": f"{outcome.parameters:,}",
        "expected depth": f"{outcome.expected_depth:.2f} blocks",
        "training time": f"{outcome.train_seconds:.1f} s",
        "run": str(place),
    }
    show(console_for(args.json), f"{recipe.network}, {recipe.rule}, {recipe.data}", outcome.evaluation, facts)
    write(args.json, outcome.to_dict())
    return 0


def _seeds(args: Train, recipe: Recipe) -> int:
    """The same recipe with several seeds, as a comparison of one rule."""
    if args.seeds < 1 or world_size() > 1:
        raise ConfigError(
            f"seeds is {args.seeds} on {world_size()} process(es); give 1 or more, and several to one only"
        )
    check_target(args.json)
    prepare(recipe)  # which refuses what a comparison leaves out
    with ExitStack() as stack:
        out = args.out or stack.enter_context(free_directory(short_name(args.recipe)))
        stack.enter_context(held(out))
        options: dict[str, Any] = {name: getattr(args, name) for name in ("seeds", "resume", "log", "json", "quiet")}
        return compare(Compare(settings=args.settings, rules=(recipe.rule,), **options), out)
