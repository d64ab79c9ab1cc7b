"""How many blocks live, and what that costs: Lemma 1 and Figure 1a of Hayou & Ayed on any model."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from residrop.cli.analyze.instrument import Found, Unit, analyze, costs_with_bar
from residrop.cli.analyze.targets import Analysis, Target
from residrop.cli.pictures import panels
from residrop.cli.shared import parse, table_of
from residrop.common.errors import ConfigError
from residrop.schedule.budgets import linear_at, uniform_at
from residrop.theory import cost_law, depth_bound, depth_bound_probability, depth_law

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class AnalyzeDepth(Analysis):
    """The law of the number of live blocks and of the work of a step: exact, with the bound of Lemma 1.

    Hayou & Ayed (2021), Figure 1a: of all rates of one sum, uniform ones make the depth most variable.
    """

    unit: Unit = "blocks"
    """What work is counted in: blocks, FLOPs of a forward, or time of a step measured here."""
    beta: float = 0.05
    """Share of steps outside the interval and the bound."""

    def check(self) -> None:
        """Refuse a share that is none."""
        if not 0.0 < self.beta < 1.0:
            raise ConfigError(f"beta is {self.beta}; give a number between 0 and 1")


def run(arguments: Sequence[str], prog: str) -> int:
    """Read the options and analyze."""
    return analyze("depth", parse(AnalyzeDepth, arguments, prog), _measure, _tables, _draw)


def _measure(options: AnalyzeDepth, target: Target) -> Found:
    """Exact laws of depth and cost under the target's rates, and under uniform and linear ones of the same sum."""
    costs, beta = costs_with_bar(target, options.unit), options.beta
    blocks, budget = len(target.rates), math.fsum(target.rates)
    modes = {"its own": target.rates, "uniform": uniform_at(blocks, budget)}
    with contextlib.suppress(ConfigError):  # linear decay cannot drop that much
        modes["linear"] = linear_at(blocks, budget)
    rows = []
    for mode, rates in modes.items():
        law = depth_law(rates)
        work = cost_law(rates, costs.branches, costs.fixed)
        low, high = law.interval(1.0 - beta)
        bound = depth_bound(rates, beta)
        rows.append(
            {
                "mode": mode,
                "rates": list(rates),
                "mean": law.mean,
                "std": law.variance**0.5,
                "interval": [low, high],
                "bound": bound,
                "bound_at_interval": depth_bound_probability(rates, max(law.mean - low, high - law.mean)),
                "work_mean": work.mean / costs.total,
                "work_std": work.variance**0.5 / costs.total,
                "values": (work.values / costs.total).tolist(),
                "probabilities": work.probabilities.tolist(),
            }
        )
    return {
        "target": target.name,
        "blocks": blocks,
        "unit": options.unit,
        "beta": beta,
        "costs": list(costs.branches),
        "fixed": costs.fixed,
        "rows": rows,
    }


def _tables(found: Found) -> list[Table]:
    """One row per mode."""
    share = f"{100 * (1 - found['beta']):g}%"
    work = f"work ({found['unit']})"
    headings = ("rates", "mean", "std", f"{share} of steps", f"Lemma 1 at {share}", work, "± std")
    rows = [
        (
            row["mode"],
            f"{row['mean']:.2f}",
            f"{row['std']:.2f}",
            "{:g} to {:g}".format(*row["interval"]),
            f"{row['mean']:.1f} ± {row['bound']:.1f}",
            f"{row['work_mean']:.3f}",
            f"{row['work_std']:.3f}",
        )
        for row in found["rows"]
    ]
    title = f"{found['target']}: live blocks of {found['blocks']} in a step"
    return [table_of(title, headings, rows, left=("rates",))]


def _draw(found: Found, path: Path) -> None:
    """The laws of the work of a step, and the rates they come from."""
    total = found["fixed"] + sum(found["costs"])
    with panels(path, 2, f"{found['target']}: depth of a step") as (left, right):
        for number, row in enumerate(found["rows"]):
            places, heights = np.array(row["values"]), np.array(row["probabilities"])
            if len(places) > found["blocks"] + 1:  # unequal costs make many sums close to each other
                bins = min(60, found["blocks"] + 1)
                heights, edges = np.histogram(places, bins, range=(found["fixed"] / total, 1.0), weights=heights)
                places = (edges[:-1] + edges[1:]) / 2
            left.plot(places, heights, drawstyle="steps-mid", color=f"C{number}", label=row["mode"])
            left.axvline(row["work_mean"], color=f"C{number}", linestyle=":")
            right.plot(range(1, found["blocks"] + 1), row["rates"], "o-", ms=3, color=f"C{number}", label=row["mode"])
        left.set(xlabel=f"share of a full step ({found['unit']})", ylabel="probability")
        right.set(xlabel="block (rule)", ylabel="survival rate", ylim=(-0.03, 1.03))
