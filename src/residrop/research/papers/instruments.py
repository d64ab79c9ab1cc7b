"""The instruments that fill timed and theoretical rows and curves: `measure` a row, `trace` a curve.

What each name means is in `rows.INSTRUMENTS`; what it takes is in the row's or curve's `setting`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from residrop.common.errors import ConfigError
from residrop.models import create, num_blocks
from residrop.research.papers.rows import Curve, Metric, Row
from residrop.research.papers.timings import Bench, milliseconds, time_updates
from residrop.schedule import survival
from residrop.theory import depth_law, discrepancy, flat_discrepancy, growth, measure_growth, train_regression

__all__ = ["Reading", "Trace", "measure", "trace"]


class Reading(NamedTuple):
    """What an instrument found for a row.

    Attributes:
        value: in the row's metric.
        error: its standard error, or None if the instrument knows none.
        note: how it was measured.
    """

    value: float
    error: float | None = None
    note: str = ""


class Trace(NamedTuple):
    """What an instrument found for a curve.

    Attributes:
        x: positions.
        y: values.
        error: their standard errors, or None.
        predicted: the theory's values at the same positions, or None.
        note: how it was measured.
    """

    x: list[float]
    y: list[float]
    error: list[float] | None = None
    predicted: list[float] | None = None
    note: str = ""


Setting = Mapping[str, Any]


def measure(row: Row, seed: int, bench: Bench) -> Reading:
    """Fill a row with its instrument; ConfigError if it has none that gives one number."""
    if row.instrument not in _ROWS:
        raise ConfigError(f"row {row.key!r} has the instrument {row.instrument!r}; rows take {', '.join(_ROWS)}")
    return _ROWS[row.instrument](row.metric, row.setting, seed, bench)


def trace(curve: Curve, seed: int, bench: Bench) -> Trace:
    """Fill a curve with its instrument; ConfigError if it has none that gives a curve."""
    if curve.instrument not in _CURVES:
        raise ConfigError(f"curve {curve.label!r} has the instrument {curve.instrument!r}; there are {list(_CURVES)}")
    return _CURVES[curve.instrument](curve.setting, seed, bench)


# Rows


def _counts(metric: Metric, setting: Setting, seed: int, bench: Bench) -> Reading:
    """Expected live blocks, or the share of all branches' work saved, shortcuts that cost something counted."""
    blocks = setting["blocks"]
    droppable = setting.get("droppable", blocks)
    live = blocks - droppable + math.fsum(survival.parse(setting["survival"], droppable))
    if metric == "blocks":
        return Reading(live)
    work = live + droppable * setting.get("shortcut", 0.0)
    return Reading(100.0 * (1.0 - work / blocks))


def _growth_row(metric: Metric, setting: Setting, seed: int, bench: Bench) -> Reading:
    note = f"{setting['samples']} samples a level, width {setting['width']}"
    level = setting["layer"]
    found = _growth_of(setting, setting["survival"], seed, (level,))
    if metric == "growth_rate":
        return Reading(float(found.rates[0]), float(found.rates_error[0]), note)
    other = _growth_of(setting, setting["against"], seed + 1, (level,))
    errors = [float(one.q_error[0] / one.q[0]) for one in (found, other)]
    return Reading(math.log10(float(other.q[0] / found.q[0])), math.hypot(*errors) / math.log(10.0), note)


def _growth_of(setting: Setting, rates: str, seed: int, levels: tuple[int, ...] | None) -> Any:
    blocks = num_blocks(setting["network"])
    return measure_growth(
        survival.parse(rates, blocks),
        width=setting["width"],
        stable=setting["network"].startswith("stable"),
        samples=setting["samples"],
        levels=levels,
        seed=seed,
    )


def _training_time(metric: Metric, setting: Setting, seed: int, bench: Bench) -> Reading:
    steps = time_updates(setting, seed, bench)
    if metric == "share_saved":
        saved, low, high = steps.saved("update")
        return Reading(saved, note=f"quartiles of {len(steps.update)} steps: {low:.1f} to {high:.1f}; {_threads()}")
    minutes = milliseconds(steps, "update") / 60_000.0 * setting["updates"]
    note = f"median of {len(steps.update)} updates times {setting['updates']}, not a whole training; {_threads()}"
    return Reading(minutes, note=note)


def _update_time(metric: Metric, setting: Setting, seed: int, bench: Bench) -> Reading:
    steps = time_updates(setting, seed, bench)
    part = setting["part"]
    if metric == "share_saved":
        saved, low, high = steps.saved(part)
        return Reading(saved, note=f"quartiles of {len(steps.update)} steps: {low:.1f} to {high:.1f}; {_threads()}")
    return Reading(milliseconds(steps, part), note=f"median of {len(steps.update)} updates; {_threads()}")


def _threads() -> str:
    return f"{torch.get_num_threads()} threads"


# Curves


def _rates(setting: Setting, seed: int, bench: Bench) -> Trace:
    rates = survival.parse(setting["survival"], setting["blocks"])
    return Trace([float(block) for block in range(1, len(rates) + 1)], list(rates))


def _law(setting: Setting, seed: int, bench: Bench) -> Trace:
    law = depth_law(survival.parse(setting["survival"], setting["blocks"]))
    return Trace(law.values.tolist(), law.probabilities.tolist(), note="exact")


def _growth_curve(setting: Setting, seed: int, bench: Bench) -> Trace:
    found = _growth_of(setting, setting["survival"], seed, None)
    rates = survival.parse(setting["survival"], num_blocks(setting["network"]))
    theory = growth(rates, stable=setting["network"].startswith("stable"))
    return Trace(
        [float(level) for level in found.levels],
        found.q.tolist(),
        found.q_error.tolist(),
        [theory[level] for level in found.levels],
        f"{setting['samples']} samples a level, width {setting['width']}; predicted by Proposition 1",
    )


_NETWORKS, _INPUTS = 20, 16  # of the discrepancy: networks, and Gaussian inputs to each


def _discrepancies(setting: Setting, seed: int, bench: Bench) -> Trace:
    """g_l of the quadratic loss ||y - t||^2, whose curvature 2 is the factor 2 in Theorem 1, a mean over networks."""
    width = setting["width"]
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    moments: list[float] = []
    for number in range(_NETWORKS):
        network = {"width": width, "seed": seed * _NETWORKS + number}
        model = create(setting["network"], rule="stochastic-depth", survival=0.5, **network)  # not drawn here
        x = torch.randn(_INPUTS, 256, generator=generator)
        found.append(discrepancy(model, [(x, torch.zeros(_INPUTS, 1))], _quadratic).g)
        with torch.no_grad():
            moments.append(float(model.get_submodule("stem")(x).square().mean()))
    every = torch.stack(found)
    blocks = every.shape[1]
    return Trace(
        [float(block) for block in range(1, blocks + 1)],
        every.mean(dim=0).tolist(),
        (every.std(dim=0) / _NETWORKS**0.5).tolist(),
        [flat_discrepancy(blocks, 1, math.fsum(moments) / _NETWORKS)] * blocks,
        f"{_NETWORKS} networks of width {width}, {_INPUTS} Gaussian inputs each; predicted by Theorem 1",
    )


def _quadratic(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(dim=1).mean()


_EPOCHS = (0, 1, 2, 5, 10)
_COURSE = f"sin(beta x), Adam, measured after epochs {', '.join(map(str, _EPOCHS))}"


def _course(setting: Setting, seed: int, **more: Any) -> Any:
    return train_regression(
        num_blocks(setting["network"]),
        width=setting["width"],
        stable=setting["network"].startswith("stable"),
        survival=setting.get("survival", 0.7),
        epochs=setting.get("epochs", _EPOCHS),
        size=setting.get("size", 1024),
        seed=seed,
        **more,
    )


def _condition(setting: Setting, seed: int, bench: Bench) -> Trace:
    course = _course(setting, seed, neurons=8, masks=3)  # masks do not enter the ratio
    return Trace([float(epoch) for epoch in course.epochs], *_mean(course.ratios), note=f"{_COURSE}; 8 neurons")


def _normality(setting: Setting, seed: int, bench: Bench) -> Trace:
    course = _course(setting, seed, masks=setting["masks"])
    note = f"{_COURSE}; mean over inputs: 0.5 if normal"
    if setting["over"] == "epoch":
        return Trace([float(epoch) for epoch in course.epochs], *_mean(course.p_values[:, -1]), note=note)
    return Trace(
        [float(layer) for layer in course.layers],
        *_mean(course.p_values[-1]),
        note=f"{note}; after epoch {course.epochs[-1]}",
    )


def _mean(values: Tensor) -> tuple[list[float], list[float]]:
    """Mean over all but the first dimension, and its standard error, of what is not NaN."""
    rows = [row[~row.isnan()] for row in values.flatten(1)]
    means = [float(row.mean()) if len(row) else math.nan for row in rows]
    return means, [float(row.std()) / len(row) ** 0.5 if len(row) > 1 else math.nan for row in rows]


def _time_point(setting: Setting, seed: int, bench: Bench) -> Trace:
    """One point: minutes of the training over the mean survival rate (1 without dropping)."""
    steps = time_updates(setting, seed, bench)
    blocks = num_blocks(setting["network"])
    rates = [1.0] if setting["survival"] is None else survival.parse(setting["survival"], blocks)
    minutes = milliseconds(steps, "update") / 60_000.0 * setting["updates"]
    ratio = 1.0 - steps.saved("update")[0] / 100.0
    note = f"minutes: median of {len(steps.update)} updates times {setting['updates']}; {ratio:.3f} of no dropout"
    return Trace([math.fsum(rates) / len(rates)], [minutes], note=f"{note}; {_threads()}")


_ROWS: dict[str, Callable[[Metric, Setting, int, Bench], Reading]] = {
    "counts": _counts,
    "gradients.growth": _growth_row,
    "timing.training": _training_time,
    "timing.update": _update_time,
}
_CURVES: dict[str, Callable[[Setting, int, Bench], Trace]] = {
    "survival.rates": _rates,
    "depth.law": _law,
    "gradients.growth": _growth_curve,
    "discrepancy.layers": _discrepancies,
    "noise.condition": _condition,
    "noise.normality": _normality,
    "timing.training": _time_point,
}
