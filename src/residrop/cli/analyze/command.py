"""`residrop analyze`: options, dispatch, tables, pictures and JSON of the instruments."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from residrop.cli.analyze.depth import draw_depth, measure_depth, table_of_depth
from residrop.cli.analyze.discrepancy import draw_discrepancy, measure_discrepancy, table_of_discrepancy
from residrop.cli.analyze.gradients import draw_gradients, measure_gradients, table_of_gradients
from residrop.cli.analyze.noise import draw_noise, measure_noise, table_of_noise
from residrop.cli.analyze.survival import draw_survival, measure_survival, table_of_survival
from residrop.cli.analyze.targets import Common, Target, find_target
from residrop.common.checks import check_rate, check_whole
from residrop.common.errors import ConfigError
from residrop.common.output import check_target, console_for, write

__all__ = ["ANALYZE", "INSTRUMENTS", "analyze_command"]

ANALYZE = """usage: residrop analyze INSTRUMENT [TARGET] [OPTIONS]

What random presence does to a network, and which blocks a budget should be spent on.

instruments:
  depth         live blocks and work of a step: exact laws          residrop analyze depth resnet-110
  survival      rates for a budget in every mode, and why           residrop analyze survival runs/digits-001
  gradients     growth towards the input; a run's first gradients   residrop analyze gradients vanilla-50
  discrepancy   what the absence of each block does to the loss     residrop analyze discrepancy torchvision:resnet18
  noise         is the noise of random presence Gaussian            residrop analyze noise stable-vanilla-100

TARGET is a run directory, a network of residrop (residrop recipes --networks), or torchvision:NAME or timm:NAME.
Each prints a table and draws a picture; residrop analyze INSTRUMENT --help explains its options.
"""

Where = Annotated[str, tyro.conf.Positional]
Unit = Literal["blocks", "flops", "time"]


@dataclass(frozen=True, kw_only=True)
class Analysis(Common):
    """What all instruments share."""

    target: Where = "stable-vanilla-50"
    """A run directory, a network of residrop, torchvision:NAME or timm:NAME."""
    survival: str | None = None
    """Survival rates, as of residrop train (default: the run's own, elsewhere uniform(0.5))."""
    width: int | None = None
    """Width of a network of residrop (Vanilla: units of a layer)."""
    data: str | None = None
    """Images to measure on: digits, cifar10 or the path of a folder (default: a run's test images, elsewhere noise)."""
    images: int = 64
    """How many of them."""
    pretrained: bool = False
    """With torchvision and timm: load their pretrained weights (needs network or cache)."""
    seed: int = 0
    """Seed of weights, masks and noise."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    picture: Path | None = None
    """PNG to draw (default: analyze-INSTRUMENT.png in the run directory, or in this one)."""
    json: str | None = None
    """Write all numbers to this file as JSON (- for standard output)."""


@dataclass(frozen=True, kw_only=True)
class AnalyzeDepth(Analysis):
    """The law of the number of live blocks and of the work of a step: exact, with the bound of Lemma 1.

    Hayou & Ayed (2021), Figure 1a: of all rates of one sum, uniform ones make the depth most variable.
    """

    unit: Unit = "blocks"
    """What work is counted in: blocks, FLOPs of a forward, or time of a step measured here."""
    beta: float = 0.05
    """Share of steps outside the interval and the bound."""


@dataclass(frozen=True, kw_only=True)
class AnalyzeSurvival(Analysis):
    """Rates for a budget in every mode, beside what they come from: sensitivity, discrepancy and cost of each block.

    Of a run that measured its own rates (--budget --refresh) the picture shows their course, too.
    """

    budgets: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    """Shares of a full step."""
    unit: Unit = "blocks"
    """What the shares are of: blocks, FLOPs of a forward, or time of a step measured here."""
    least: float = 0.0
    """Smallest rate in the modes by sensitivity."""


@dataclass(frozen=True, kw_only=True)
class AnalyzeGradients(Analysis):
    """Growth of the squared gradient from the last block to block l.

    Vanilla networks: Table 1 and Figure 2 of Hayou & Ayed (2021), measured and predicted (Proposition 1). Other models:
    measured at full depth and under their rates. Runs: Figure 7 of Huang et al. (2016), too.
    """

    budgets: tuple[float, ...] = (0.5, 0.7)
    """Vanilla networks: mean survival rates of the uniform and linear modes."""
    samples: int = 500
    """Vanilla networks: samples of weights, masks and data."""
    passes: int = 8
    """Other models: draws for every input."""
    beside: tuple[Path, ...] = ()
    """Further run directories whose first gradients are drawn beside those of the target."""


@dataclass(frozen=True, kw_only=True)
class AnalyzeDiscrepancy(Analysis):
    """h_l: how much the absence of a block bends the loss, and so regularises (eq. 4 to 6, Theorem 1, Figure 3).

    Of a run trained with --watch discrepancy the picture shows it along the training, too.
    """

    networks: int = 150
    """Vanilla networks: draws of the weights."""


@dataclass(frozen=True, kw_only=True)
class AnalyzeNoise(Analysis):
    """Shapiro-Wilk tests of a neuron of every block under random masks (Theorem 2, Figures 4 and 5).

    Where the share of tests below 0.05 is about 0.05, presence acts on that neuron as Gaussian noise.
    """

    masks: int = 200
    """Masks for each input."""
    inputs: int = 20
    """Inputs, each of which gives one test per block."""
    networks: int = 4
    """Vanilla networks: draws of the weights, pooled."""
    epochs: tuple[int, ...] = (0,)
    """Vanilla networks: train on the sine task and measure after these epochs, such as 0 1 5 10."""
    depths: tuple[int, ...] = ()
    """Vanilla networks: measure condition 2 for these numbers of blocks, too (Figure 4)."""


INSTRUMENTS: dict[str, type[Analysis]] = {
    "depth": AnalyzeDepth,
    "survival": AnalyzeSurvival,
    "gradients": AnalyzeGradients,
    "discrepancy": AnalyzeDiscrepancy,
    "noise": AnalyzeNoise,
}


@contextmanager
def _progress(console: Console, total: int, what: str) -> Iterator[Callable[[], None]]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _timing(unit: Unit, target: Target, console: Console) -> AbstractContextManager[Callable[[], None]]:
    return _progress(console, 5 * len(target.rates) if unit == "time" else 0, "timing blocks")


def _depth(a: AnalyzeDepth, target: Target, console: Console) -> dict[str, Any]:
    with _timing(a.unit, target, console) as tell:
        return measure_depth(target, a.unit, a.beta, tell=tell)


def _survival(a: AnalyzeSurvival, target: Target, console: Console) -> dict[str, Any]:
    with _timing(a.unit, target, console) as tell:
        return measure_survival(target, a.budgets, a.unit, a.least, tell=tell)


def _gradients(a: AnalyzeGradients, target: Target, console: Console) -> dict[str, Any]:
    return measure_gradients(target, a.budgets, a.samples, a.passes, a.seed, a.beside)


def _discrepancy(a: AnalyzeDiscrepancy, target: Target, console: Console) -> dict[str, Any]:
    with _progress(console, a.networks if target.vanilla else 0, "networks") as tell:
        return measure_discrepancy(target, a.networks, a.seed, tell=tell)


def _noise(a: AnalyzeNoise, target: Target, console: Console) -> dict[str, Any]:
    total = a.networks * (1 + len(a.depths)) if target.vanilla else 0
    with _progress(console, total, "networks") as tell:
        return measure_noise(target, a.networks, a.inputs, a.masks, a.epochs, a.depths, a.seed, tell=tell)


_HOW: dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., Any], Callable[[dict[str, Any], Path], None]]] = {
    "depth": (_depth, table_of_depth, draw_depth),
    "survival": (_survival, table_of_survival, draw_survival),
    "gradients": (_gradients, table_of_gradients, draw_gradients),
    "discrepancy": (_discrepancy, table_of_discrepancy, draw_discrepancy),
    "noise": (_noise, table_of_noise, draw_noise),
}


def _check(arguments: Analysis) -> None:
    """Refuse numbers out of range before anything is built."""
    for name in ("samples", "passes", "networks", "inputs", "masks"):
        if hasattr(arguments, name):
            check_whole(name, getattr(arguments, name), least=3 if name == "masks" else 2 if name == "samples" else 1)
    for name in ("budgets", "beta", "least"):
        values: Any = getattr(arguments, name, ())
        for value in values if isinstance(values, tuple) else (values,):
            check_rate(name, value)
    if isinstance(arguments, AnalyzeDepth) and not 0.0 < arguments.beta < 1.0:
        raise ConfigError(f"beta is {arguments.beta}; give a probability between 0 and 1")
    epochs: Sequence[int] = getattr(arguments, "epochs", (0,))
    if not epochs or epochs[0] < 0 or list(epochs) != sorted(set(epochs)):
        raise ConfigError(f"epochs are {tuple(epochs)}; give rising numbers, from 0")


def _plain(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity: None takes their place."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def analyze_command(instrument: str, arguments: Analysis) -> int:
    """Measure, print, draw."""
    check_target(arguments.json)
    _check(arguments)
    console = console_for(arguments.json)
    target = find_target(arguments)
    vanilla_only = [name for name in ("epochs", "depths") if getattr(arguments, name, ()) not in ((), (0,))]
    if vanilla_only and target.vanilla is None:
        raise ConfigError(f"{vanilla_only[0]} is for Vanilla networks; {target.name} is none. Leave it out")
    measure, table, draw = _HOW[instrument]
    found = measure(arguments, target, Console(stderr=True))
    for one in tables if isinstance(tables := table(found), list) else [tables]:
        console.print(one)
    folder = target.run.path if target.run is not None else Path()
    picture = arguments.picture or folder / f"analyze-{instrument}.png"
    draw(found, picture)
    console.print(f"drawn: {picture}")
    write(arguments.json, _plain({"instrument": instrument, **found}))
    return 0
