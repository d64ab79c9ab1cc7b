"""The command line: `residrop train | compare | evaluate | predict | recalibrate | export | analyze | ...`."""

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from residrop.cli import commands
from residrop.cli.analyze.command import ANALYZE, INSTRUMENTS, analyze_command
from residrop.cli.bench.inference import QUICK_INFERENCE, BenchInference, bench_inference_command
from residrop.cli.bench.skip import BENCHMARKS, QUICK, BenchSkip, bench_skip_command
from residrop.cli.bench.swapout import QUICK_SWAPOUT, BenchSwapout, bench_swapout_command
from residrop.cli.bench.throughput import QUICK_THROUGHPUT, BenchThroughput, bench_throughput_command
from residrop.cli.evaluating import Wanted, evaluate_command
from residrop.cli.export import Export, Recalibrate, Weights, check_weights, export_command, recalibrate_command
from residrop.cli.report import Report, report_command
from residrop.cli.reproduce import Reproduce, reproduce_command
from residrop.common.errors import ConfigError, RunError, UsageError
from residrop.training import Interrupted, Recipe, preset
from residrop.training.distributed import SaidElsewhere, launched_ranks
from residrop.training.presets import short_name

__all__ = ["main"]

_HELP = """usage: residrop COMMAND [OPTIONS]

Train residual networks whose blocks are randomly present, and predict with them.

commands:
  train        train one network, then evaluate it both ways           residrop train
  compare      several rules, same data, seeds and schedule            residrop compare --rules constant swapout
  evaluate     errors of a trained run, in expectation, sampled        residrop evaluate runs/digits-001
  predict      class, probability, uncertainty of image files          residrop predict runs/digits-001 photo.png
  recalibrate  fit batch norm to prediction in one pass                residrop recalibrate runs/digits-001
  export       write a run as a file without residrop                  residrop export runs/digits-001 --to model.onnx
  analyze      what random presence does to a network              residrop analyze survival runs/digits-001
  recipes      list the papers' protocols, networks and rules          residrop recipes
  reproduce    tables and figures of the papers, beside ours           residrop reproduce swapout/table-2
  report       what was measured, as Markdown and one HTML page        residrop report
  bench        time against peers and limits, side by side             residrop bench skip --quick

residrop COMMAND --help explains every option. Without options, train and compare use the digits that come with
scikit-learn and take about a minute or a few on two cores.
"""

Flat = tyro.conf.OmitArgPrefixes
Images = Annotated[tuple[Path, ...], tyro.conf.Positional]
RunPath = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class Train:
    """Train one network with randomly present blocks and evaluate it, in expectation and by sampling.

    Start from a recipe and override any field: residrop train --recipe swapout/v2-20-w1 --data PATH --epochs 10.
    Learning-rate drops are shares of the training, so fewer epochs keep the schedule's shape. Ctrl-C saves;
    residrop train --resume --out RUN continues, and on the CPU gives the weights of an uninterrupted run.

    On several GPUs or processes: torchrun --nproc-per-node 2 -m residrop train ... Each takes its share of every batch.
    """

    settings: Flat[Recipe] = field(default_factory=Recipe)
    recipe: str = "digits"
    """What the other options start from: a preset, residrop recipes lists them, or the path of your own .toml file."""
    out: Path | None = None
    """Run directory (default: runs/RECIPE-001, -002, ...)."""
    resume: bool = False
    """Continue the run in --out; its recipe is read from there unless --recipe is given."""
    json: str | None = None
    """Write the results to this file as JSON (- for standard output)."""
    quiet: bool = False
    """Print the final table only."""


@dataclass(frozen=True)
class Compare:
    """Train several rules on the same data, seeds and schedule, and print them side by side.

    The table has the columns of Table 1 of Swapout, both kinds of inference, and the training time relative to
    constant depth. Finished runs are not trained again with --resume.
    """

    settings: Flat[Recipe] = field(default_factory=Recipe)
    recipe: str = "digits"
    """What the other options start from: a preset, residrop recipes lists them, or the path of your own .toml file."""
    rules: tuple[str, ...] = ("constant", "stochastic-depth", "swapout", "skipforward", "dropout", "depth-dropout")
    """Rules to compare. Each takes its paper's survival rates unless --survival is given."""
    seeds: int = 1
    """Number of seeds per rule, from --seed upwards."""
    out: Path | None = None
    """Directory for the runs, the table and the curves (default: runs/compare-RECIPE-001, ...)."""
    resume: bool = False
    """Continue the comparison in --out; finished runs are kept."""
    json: str | None = None
    """Write the rows to this file as JSON (- for standard output)."""
    quiet: bool = False
    """Print the final table only."""


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained run on its test images: in expectation (one pass) and averaged over sampled passes."""

    run: RunPath
    """Run directory."""
    samples: int = 30
    """Sampled passes; 0 leaves sampled inference out."""
    adaptive: bool = False
    """Also sample every image only while its decision is open, and compare with all --samples passes."""
    confidence: float = 0.95
    """With --adaptive: probability, of every image, that its decision is that of all --samples passes."""
    curve: bool = False
    """Also draw the error against the number of samples into the run directory (samples.png)."""
    repetitions: int = 5
    """With --curve: sets of --samples passes, for standard errors."""
    weights: Weights = "model"
    """Which weights of the run: model, best (of the validation) or recalibrated (by residrop recalibrate)."""
    data: str | None = None
    """Another source of test images with the same classes."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU where there is one."""
    json: str | None = None
    """Write the results to this file as JSON (- for standard output)."""


@dataclass(frozen=True)
class Predict:
    """Predict the classes of image files, with probability and uncertainty.

    Uncertainty is the entropy of the averaged prediction; the randomness share is the part of it that comes from
    the network's own randomness (mutual information), which is high for inputs unlike the training images.
    """

    run: RunPath
    """Run directory."""
    images: Images
    """Image files (any format Pillow reads); resized and cropped to the size of the training images."""
    samples: int = 30
    """Sampled passes; 0 is one pass in expectation."""
    weights: Weights = "model"
    """Which weights of the run: model, best (of the validation) or recalibrated (by residrop recalibrate)."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU where there is one."""
    json: str | None = None
    """Write the predictions to this file as JSON (- for standard output)."""


_Args = TypeVar("_Args")


def _parse(kind: type[_Args], arguments: Sequence[str], prog: str, default: _Args | None = None) -> _Args:
    """tyro, with its boxed errors turned into one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            if default is None:
                return tyro.cli(kind, args=list(arguments), prog=prog)
            return tyro.cli(kind, args=list(arguments), prog=prog, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        what, advice = _unboxed(errors.getvalue())
        what = re.sub(r"^Error parsing settings: ", "", what) or "the command line is not understood"
        hints = [row.split()[0] for row in advice if re.match(r"--\w", row)]
        close = f" (did you mean {' or '.join(hints[:3])}?)" if hints and "nrecognized" in what else ""
        raise ConfigError(f"{what}{close}; see {prog} --help") from None


def _unboxed(text: str) -> tuple[str, list[str]]:
    """The message in a box that tyro drew, and the rows below the rule under it.

    The first row is the title. Where the output is not UTF-8, a rule follows it and the sides are blanks.
    """
    rows = [row.strip(" │|") for row in text.splitlines()[1:]]
    rules = [not row.strip(" ╭╮╰╯─+-") for row in rows]
    first = 1 if rules and rules[0] else 0
    end = next((i for i in range(first, len(rows)) if rules[i]), len(rows))
    return " ".join(rows[first:end]), rows[end:]


def _peek(arguments: Sequence[str], option: str) -> str | None:
    """The value of an option that decides the defaults of all others."""
    found = None
    for i, word in enumerate(arguments):  # the last one counts, as for the parser
        if word == option and i + 1 < len(arguments):
            found = arguments[i + 1]
        elif word.startswith(option + "="):
            found = word.split("=", 1)[1]
    return found


def _settings(arguments: Sequence[str], saved: str) -> tuple[str, dict[str, Any]]:
    """Where the options start from: what the directory to resume says in its file `saved`, or a preset."""
    name, out = _peek(arguments, "--recipe"), _peek(arguments, "--out")
    if "--resume" in arguments:
        if out is None:
            what = "RUN" if saved == "recipe.json" else "DIRECTORY"
            raise ConfigError(f"--resume needs the directory to continue; add --out {what}")
        if not (Path(out) / saved).exists():
            raise RunError(f"{out} holds nothing to continue ({saved} is missing); leave --resume out to start anew")
        if name is None:
            return "digits", commands.read_settings(Path(out) / saved)
    name = name or "digits"
    return name, {"settings": preset(name).recipe}


def _train(arguments: Sequence[str], prog: str) -> int:
    name, start = _settings(arguments, "recipe.json")
    args = _parse(Train, arguments, prog, Train(recipe=name, **start))
    run = short_name(args.recipe)
    return commands.train_command(args.settings, args.out, run, args.resume, target=args.json, quiet=args.quiet)


def _compare(arguments: Sequence[str], prog: str) -> int:
    name, start = _settings(arguments, "settings.json")
    if "settings" in start and not _peek(arguments, "--survival") and "rules" not in start:
        start["settings"] = start["settings"].replace(survival=None)  # each rule's own, not the preset's
    args = _parse(Compare, arguments, prog, Compare(recipe=name, **start))
    out = args.out or commands.free_directory(f"compare-{short_name(args.recipe)}")
    return commands.compare_command(
        args.settings, args.rules, args.seeds, out, args.resume, target=args.json, quiet=args.quiet
    )


def _evaluate(arguments: Sequence[str], prog: str) -> int:
    args = _parse(Evaluate, arguments, prog)
    wanted = Wanted(args.samples, args.adaptive, args.confidence, args.curve, args.repetitions)
    weights = check_weights(args.run, args.weights)
    return evaluate_command(args.run, wanted, args.data, args.device, args.json, weights)


def _predict(arguments: Sequence[str], prog: str) -> int:
    args = _parse(Predict, arguments, prog)
    weights = check_weights(args.run, args.weights)
    return commands.predict_command(args.run, args.images, args.samples, args.device, args.json, weights)


def _recalibrate(arguments: Sequence[str], prog: str) -> int:
    return recalibrate_command(_parse(Recalibrate, arguments, prog))


def _export(arguments: Sequence[str], prog: str) -> int:
    return export_command(_parse(Export, arguments, prog))


def _reproduce(arguments: Sequence[str], prog: str) -> int:
    return reproduce_command(_parse(Reproduce, arguments, prog))


def _report(arguments: Sequence[str], prog: str) -> int:
    return report_command(_parse(Report, arguments, prog))


def _recipes(arguments: Sequence[str], prog: str) -> int:
    args = _parse(commands.Recipes, arguments, prog)
    what = next((name for name in ("networks", "rules", "data") if getattr(args, name)), "recipes")
    return commands.recipes_command(args.name, what, args.json)


_BENCHMARKS: dict[str, tuple[type[Any], Any, Callable[[Any], int]]] = {
    "skip": (BenchSkip, QUICK, bench_skip_command),
    "swapout": (BenchSwapout, QUICK_SWAPOUT, bench_swapout_command),
    "inference": (BenchInference, QUICK_INFERENCE, bench_inference_command),
    "throughput": (BenchThroughput, QUICK_THROUGHPUT, bench_throughput_command),
}


def _bench(arguments: Sequence[str], prog: str) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(BENCHMARKS, end="")
        return 0
    name = arguments[0]
    if name not in _BENCHMARKS:
        raise ConfigError(f"benchmark {name!r} is unknown; choose {' or '.join(_BENCHMARKS)}")
    kind, quick, command = _BENCHMARKS[name]
    return command(_parse(kind, arguments[1:], f"{prog} {name}", quick if "--quick" in arguments else kind()))


def _analyze(arguments: Sequence[str], prog: str) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(ANALYZE, end="")
        return 0
    name = arguments[0]
    if name not in INSTRUMENTS:
        raise ConfigError(f"instrument {name!r} is unknown; choose {' or '.join(INSTRUMENTS)}")
    return analyze_command(name, _parse(INSTRUMENTS[name], arguments[1:], f"{prog} {name}"))


_COMMANDS: dict[str, Callable[[Sequence[str], str], int]] = {
    "train": _train,
    "compare": _compare,
    "evaluate": _evaluate,
    "predict": _predict,
    "recalibrate": _recalibrate,
    "export": _export,
    "analyze": _analyze,
    "recipes": _recipes,
    "reproduce": _reproduce,
    "report": _report,
    "bench": _bench,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, 2 for bad input, 130 for Ctrl-C).

    Of several processes that torchrun started, one prints, and one ends with the code of what happened to all.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    command, rest = arguments[0], arguments[1:]
    try:
        if command not in _COMMANDS:
            raise ConfigError(f"command {command!r} is unknown; choose one of {', '.join(_COMMANDS)}")
        if command != "train" and (size := launched_ranks()) > 1:
            raise ConfigError(f"{command} runs in one process, but torchrun started {size}; leave torchrun out")
        return _COMMANDS[command](rest, f"residrop {command}")
    except SaidElsewhere:
        return 0
    except UsageError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(3.0)  # if rank 0 says the same, torchrun ends this process before it repeats it
        who = "" if rank == "0" else f"rank {rank}: "
        print(f"residrop: {who}error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted as error:
        if os.environ.get("RANK", "0") != "0":
            return 0
        print(f"residrop: {error}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("residrop: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        return 0
