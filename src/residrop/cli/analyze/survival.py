"""Which blocks a budget should be spent on: sensitivities, costs and the rates of every mode."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from residrop.cli.analyze.instrument import Found, Unit, analyze, costs_with_bar
from residrop.cli.analyze.targets import Analysis, Target
from residrop.cli.pictures import panels
from residrop.cli.shared import parse, table_of
from residrop.common.checks import check_rate
from residrop.common.errors import ConfigError
from residrop.schedule import budgets as spend
from residrop.theory import discrepancy, regularizer, removal_losses, sensitivity

__all__ = ["run"]


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

    def check(self) -> None:
        """Refuse shares and a rate outside [0, 1]."""
        for budget in self.budgets:
            check_rate("budgets", budget)
        check_rate("least", self.least)


def run(arguments: Sequence[str], prog: str) -> int:
    """Read the options and analyze."""
    return analyze("survival", parse(AnalyzeSurvival, arguments, prog), _measure, _tables, _draw)


def _measure(options: AnalyzeSurvival, target: Target) -> Found:
    """Scores, discrepancies and costs of the blocks, and rates at every budget in every mode that can meet it."""
    costs, unit, least = costs_with_bar(target, options.unit), options.unit, options.least
    scores = sensitivity(target.model, target.batches, target.loss)
    removal = removal_losses(target.model, target.batches, target.loss)
    curvature = discrepancy(target.model, target.batches, target.loss).curvature
    per_cost = [score / cost for score, cost in zip(scores.scores.tolist(), costs.branches, strict=True)]
    blocks, rows = len(costs.branches), []
    for budget in options.budgets:
        left = budget * costs.total - costs.fixed
        modes = {
            "uniform": lambda left=left: spend.uniform_at(blocks, left, costs.branches),
            "linear": lambda left=left: spend.linear_at(blocks, left, costs.branches),
            "sensitivity": lambda left=left: spend.sensitivity_at(
                scores.scores.tolist(), left, costs.branches, least=least
            ),
            "sensitivity per cost": lambda left=left: spend.sensitivity_at(per_cost, left, costs.branches, least=least),
            "max_regularization": lambda left=left: spend.max_regularization_at(
                curvature.clamp_min(1e-30).tolist(), left, costs.branches
            ),
        }
        if unit == "blocks":
            del modes["sensitivity per cost"]
        for mode, rates_of in modes.items():
            row: dict[str, Any] = {"budget": budget, "mode": mode}
            try:
                rates = rates_of()
                row |= {
                    "rates": list(rates),
                    "depth": math.fsum(rates),
                    "regularizer": regularizer(curvature, rates),
                    "never": sum(rate == 0.0 for rate in rates),
                    "always": sum(rate == 1.0 for rate in rates),
                }
            except ConfigError as error:
                row["refused"] = str(error)
            rows.append(row)
    return {
        "target": target.name,
        "inputs": target.inputs,
        "unit": unit,
        "costs": list(costs.branches),
        "costs_spread": None if costs.spread is None else list(costs.spread),
        "fixed": costs.fixed,
        "scores": scores.scores.tolist(),
        "removal_losses": removal.tolist(),
        "curvature": curvature.tolist(),
        "rows": rows,
        "course": target.lines("survival.jsonl"),
    }


def _tables(found: Found) -> list[Table]:
    """What is known of every block, and one row per budget and mode."""
    whole = found["fixed"] + sum(found["costs"])
    errors = [f" ± {error / whole:.4f}" for error in found["costs_spread"] or ()] or [""] * len(found["costs"])
    columns = (found["scores"], found["removal_losses"], found["curvature"], found["costs"], errors)
    blocks = [
        (str(number), f"{score:+.4g}", f"{-removal:+.4g}", f"{curvature:.4g}", f"{cost / whole:.4f}{error}")
        for number, (score, removal, curvature, cost, error) in enumerate(zip(*columns, strict=True), start=1)
    ]
    of_blocks = ("block", "S (SenseMode)", "loss change without it", "discrepancy h", f"cost ({found['unit']})")
    headings = ("budget", "mode", "expected blocks", "never", "always", "regulariser", "rates")
    return [
        table_of(f"{found['target']}: its blocks, on {found['inputs']}", of_blocks, blocks),
        table_of(
            f"survival rates at shares of {found['unit']}", headings, map(_cells, found["rows"]), ("mode", "rates")
        ),
    ]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    start = f"{row['budget']:g}", row["mode"]
    if "refused" in row:
        return *start, "", "", "", "", row["refused"]
    numbers = f"{row['depth']:.2f}", str(row["never"]), str(row["always"]), f"{row['regularizer']:.4g}"
    return *start, *numbers, " ".join(f"{rate:.2f}" for rate in row["rates"])


def _draw(found: Found, path: Path) -> None:
    """Rates at the middle budget by mode, what the loss needs, and the course of a run that measured for itself."""
    budgets = list(dict.fromkeys(row["budget"] for row in found["rows"]))
    count = len(found["costs"])
    numbers = range(1, count + 1)
    with panels(path, len(budgets) + 1 + bool(found["course"]), f"{found['target']}: survival rates") as axes:
        first, *others = axes
        first.bar([n - 0.2 for n in numbers], [abs(s) for s in found["scores"]], 0.4, label="|S|, in one backward pass")
        first.bar(
            [n + 0.2 for n in numbers], [abs(s) for s in found["removal_losses"]], 0.4, label="|loss change|, exact"
        )
        first.set(xlabel="block (rule)", ylabel="what the loss needs of it")
        for axis, budget in zip(others, budgets, strict=False):
            for row in found["rows"]:
                if row["budget"] == budget and "rates" in row:
                    axis.plot(numbers, row["rates"], "o-", ms=3, label=row["mode"])
            axis.set(title=f"budget {budget:g} of {found['unit']}", xlabel="block (rule)", ylim=(-0.03, 1.03))
        if found["course"]:
            for block in range(count):
                rates = [line["rates"][block] for line in found["course"]]
                others[-1].plot([line["epoch"] for line in found["course"]], rates, ".-", label=f"block {block + 1}")
            others[-1].set(title="along the training", xlabel="epoch", ylim=(-0.03, 1.03))
