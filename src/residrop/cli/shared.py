"""What several commands share: reading options, opening runs, showing evaluations."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, cast

import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from residrop.common.errors import ConfigError, RunError
from residrop.common.torchrun import rank
from residrop.inference import Evaluation
from residrop.inference.uncertainty.calibration import check_temperature
from residrop.training import Recipe, Run, load_run
from residrop.training.calibration import FILE, load_fitted
from residrop.training.loggers import LoggerName

__all__ = [
    "RECALIBRATED",
    "Device",
    "Fields",
    "Json",
    "Log",
    "Quiet",
    "RecipeName",
    "RunPath",
    "Temperature",
    "Weights",
    "free_directory",
    "open_run",
    "parse",
    "peek",
    "resumed",
    "show",
    "table_of",
    "temperature_of",
]

RECALIBRATED = "recalibrated"  # the weights file that `residrop recalibrate` writes, beside model.safetensors

RunPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="Run directory.")]
Weights = Annotated[
    Literal["model", "best", "recalibrated"],
    tyro.conf.arg(
        help="Which weights of the run: model, best (of the validation) or recalibrated (by residrop recalibrate)."
    ),
]
Temperature = Annotated[
    float | None,
    tyro.conf.arg(
        help="Divide logits by this number (of samples: the log of their mean probabilities); 1 changes nothing. "
        "Default: what residrop evaluate --uncertainty fitted for these weights, if anything."
    ),
]
Device = Annotated[str, tyro.conf.arg(help="cpu, cuda, ...; auto takes a GPU where there is one.")]
Json = Annotated[str | None, tyro.conf.arg(help="Write the results to this file as JSON (- for standard output).")]
Quiet = Annotated[bool, tyro.conf.arg(help="Print the final table only.")]
Log = Annotated[
    tuple[LoggerName, ...],
    tyro.conf.arg(
        name="loggers",  # torchrun takes --log for the beginning of options of its own
        aliases=("--log",),
        help="Where metrics go besides metrics.jsonl: tensorboard, csv (metrics.csv of the run), wandb, mlflow, which "
        "read their own environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI, ...). Under torchrun write "
        "--loggers.",
    ),
]
RecipeName = Annotated[
    str,
    tyro.conf.arg(
        help="What the other options start from: a preset, residrop recipes lists them, or the path of your own "
        ".toml file."
    ),
]

T = TypeVar("T")


# Options


def parse(kind: type[T], arguments: Sequence[str], prog: str, default: T | None = None) -> T:
    """The options of a command as its dataclass.

    Raises:
        ConfigError: a whole number that 64 bits cannot hold.
        SystemExit: tyro has printed the help (code 0) or what is wrong (code 2); of several processes one prints.
    """
    values = tyro.cli(kind, args=list(arguments), prog=prog, default=default, console_outputs=rank() == 0)
    assert isinstance(values, kind)
    _check_sizes(values)
    return values


def _check_sizes(values: Any, option: str = "") -> None:
    """Raise ConfigError for a whole number that 64 bits cannot hold, in options or options of options."""
    if dataclasses.is_dataclass(values):
        for one in dataclasses.fields(values):
            _check_sizes(getattr(values, one.name), f"--{one.name.replace('_', '-')}")
    elif isinstance(values, tuple):
        for value in cast(tuple[Any, ...], values):
            _check_sizes(value, option)
    elif isinstance(values, int) and not -(2**63) <= values < 2**63:
        raise ConfigError(
            f"{option} has a number of {len(str(abs(values)))} digits; give one between -2^63 and 2^63 - 1"
        )


def peek(arguments: Sequence[str], option: str) -> str | None:
    """The value of an option that decides the defaults of all others, before these are parsed."""
    found = None
    for i, word in enumerate(arguments):  # the last one counts, as for the parser
        if word == option and i + 1 < len(arguments):
            found = arguments[i + 1]
        elif word.startswith(option + "="):
            found = word.split("=", 1)[1]
    return found


def resumed(arguments: Sequence[str], saved: str) -> Path | None:
    """The file `saved` of the directory that `--resume` continues; None without it, or if --recipe replaces the file.

    Raises:
        UsageError: there is no such directory.
    """
    if "--resume" not in arguments:
        return None
    out = peek(arguments, "--out")
    if out is None:
        raise ConfigError("--resume needs the directory to continue; add --out DIRECTORY")
    if saved != "settings.json" and (Path(out) / "settings.json").exists():
        raise RunError(f"{out} holds several runs; continue them with residrop compare --resume --out {out}")
    if not (Path(out) / saved).exists():
        raise RunError(f"{out} holds nothing to continue ({saved} is missing); leave --resume out to start anew")
    return None if peek(arguments, "--recipe") else Path(out) / saved


@dataclass(frozen=True, kw_only=True)
class Fields(Recipe):
    """What to train, on what, and how. Every field can be overridden on the command line."""

    weights: Annotated[str | None, tyro.conf.arg(aliases=("--start",))] = None

    def __post_init__(self) -> None:
        """Leave the check to `recipe`: tyro would print its errors in a box, as if they were its own."""

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """The fields of a recipe."""
        return cls(**recipe.to_dict())

    def recipe(self) -> Recipe:
        """The recipe with these fields; ConfigError if there is none."""
        return Recipe(**self.to_dict())


# Runs


@contextmanager
def free_directory(name: str) -> Iterator[Path]:
    """Make the first of runs/NAME-001, runs/NAME-002, ... that does not exist; it is removed if it stays empty.

    Raises:
        RunError: it cannot be made.
    """
    stem, runs = re.sub(r"[^A-Za-z0-9._-]+", "-", name), Path("runs")
    new = not runs.exists()
    path = next(path for number in count(1) if _made(path := runs / f"{stem}-{number:03d}"))
    try:
        yield path
    finally:
        with suppress(OSError):  # not empty
            path.rmdir()
            if new:
                runs.rmdir()


def _made(path: Path) -> bool:
    """Make a directory; False if it exists, as that of another training, which may have begun just now."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if path.parent.is_dir():
            return False
        raise RunError(f"{path.parent} is a file here, where runs are kept; choose another --out") from None
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}); choose another --out") from None
    return True


def open_run(path: Path, weights: str = "model") -> tuple[Run, nn.Module]:
    """A run directory and its network, on the CPU; RunError if it is damaged or has no such weights."""
    if weights == RECALIBRATED and path.is_dir() and not (path / f"{weights}.safetensors").exists():
        raise RunError(f"{path} has no recalibrated weights; make them with residrop recalibrate {path}")
    return load_run(path, weights)


def temperature_of(run: Run, weights: str, samples: int, given: float | None) -> tuple[float, str]:
    """The temperature for a number of sampled passes, and what to say of it (nothing where nobody asked for one).

    Raises:
        ConfigError: one that was given is not above 0 or not finite.
        RunError: what was fitted is damaged.
    """
    if given is not None:
        check_temperature(given)
        return given, "" if given == 1 else f"temperature {given:g} of the probabilities, as given"
    if not (run.path / FILE).exists():
        return 1.0, ""
    fitted, why = load_fitted(run, weights, samples)
    if fitted is None:
        return 1.0, f"without a temperature: {why}"
    if fitted.temperature is None:
        return 1.0, f"without a temperature: all {fitted.images} {fitted.source} are decided rightly"
    text = f"temperature {fitted.temperature:.2f} of the probabilities, fitted on {fitted.images} {fitted.source}"
    return fitted.temperature, f"{text} (--temperature 1 leaves it out)"


# Results


def table_of(
    title: str | None, headings: Iterable[str], rows: Iterable[Sequence[str]], left: Collection[str] = ()
) -> Table:
    """A table for the terminal; the columns in `left` are words, the others numbers. Long cells are folded, not cut."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def show(console: Console, title: str, found: Evaluation, facts: dict[str, str]) -> None:
    """Both kinds of inference as a table, then facts line by line."""
    kinds = {"deterministic (expectation)": found.deterministic, f"sampled ({found.samples} passes)": found.sampled}
    headings = ["inference", "error", "± se", "NLL", "ECE"]
    rows = [
        [name, f"{one.error:.2f}%", f"{one.error_se:.2f}", f"{one.nll:.4f}", f"{one.ece:.2f}%"]
        for name, one in kinds.items()
        if one is not None
    ]
    if found.deterministic.top5_error is not None:
        headings.append("top-5 error")
        for row, one in zip(rows, filter(None, kinds.values()), strict=True):
            row.append(f"{one.top5_error:.2f}%")
    console.print(table_of(title, headings, rows, left=("inference",)))
    if found.single_pass_error_se is not None:
        facts = {
            "single sampled pass": f"{found.single_pass_error:.2f} ± {found.single_pass_error_se:.2f}% error "
            "(mean ± standard error over passes)",
            "standard error of a probability": f"{found.probability_se:.4f} (mean over {found.images} images)",
            **facts,
        }
    for name, value in facts.items():
        console.print(f"{name}: {value}")
