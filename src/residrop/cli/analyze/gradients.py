"""Growth of gradients towards the input: Proposition 1 on Vanilla networks, measured on others; Figure 7 of runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from residrop.cli.analyze.instrument import Found, analyze
from residrop.cli.analyze.targets import Analysis, Target
from residrop.cli.pictures import panels
from residrop.cli.shared import parse, table_of
from residrop.common.checks import check_rate, check_whole
from residrop.common.errors import RunError
from residrop.schedule.budgets import linear_at, uniform_at
from residrop.theory import Growth, gradient_growth, growth, growth_rates, measure_growth
from residrop.training import Run

__all__ = ["run"]


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

    def check(self) -> None:
        """Refuse shares outside [0, 1] and too few samples."""
        for budget in self.budgets:
            check_rate("budgets", budget)
        check_whole("samples", self.samples, least=2)
        check_whole("passes", self.passes, least=1)


def run(arguments: Sequence[str], prog: str) -> int:
    """Read the options and analyze."""
    return analyze("gradients", parse(AnalyzeGradients, arguments, prog), _measure, _tables, _draw)


def _measure(options: AnalyzeGradients, target: Target) -> Found:
    """Growth of the squared gradient from the last block down, in every mode; the course of runs.

    Of a Vanilla network the measurement is over weights, masks and data at initialisation, beside the prediction; of
    any other it is over masks and inputs, for its weights as they are.
    """
    rows: list[dict[str, Any]] = []
    if target.vanilla is not None:
        blocks, width, stable = target.vanilla
        modes = {("standard", 1.0): (1.0,) * blocks}
        for budget in options.budgets:
            modes["uniform", budget] = uniform_at(blocks, budget * blocks)
            if budget >= 0.5 - 0.5 / blocks:
                modes["linear", budget] = linear_at(blocks, budget * blocks)
        for (mode, budget), rates in modes.items():
            found = measure_growth(rates, width=width, stable=stable, samples=options.samples, seed=options.seed)
            q, predicted = growth(rates, stable=stable), growth_rates(rates, stable=stable)
            rows.append(
                {
                    "mode": mode,
                    "budget": budget,
                    **_numbers(found),
                    "predicted_q": [q[level] for level in found.levels],
                    "predicted_rates": [predicted[level] for level in found.levels],
                }
            )
    else:
        for mode, rates in (("full depth", 1.0), ("its own rates", None)):
            at = (rates,) * len(target.rates) if rates is not None else target.rates
            drawn = {"rates": at, "passes": options.passes, "seed": options.seed}
            found = gradient_growth(target.model, target.batches, target.loss, **drawn)
            rows.append({"mode": mode, "budget": math.fsum(at) / len(at), **_numbers(found)})
    runs = [*([] if target.run is None else [target.run.path]), *options.beside]
    return {"target": target.name, "inputs": target.inputs, "rows": rows, "runs": {str(p): _course(p) for p in runs}}


def _numbers(found: Growth) -> dict[str, Any]:
    return {
        "levels": list(found.levels),
        "q": found.q.tolist(),
        "q_error": found.q_error.tolist(),
        "rates": found.rates.tolist(),
        "rates_error": found.rates_error.tolist(),
        "samples": found.samples,
    }


def _course(path: Path) -> list[dict[str, float]]:
    """Mean |gradient| of the first convolution of block 1 and learning rate, epoch by epoch."""
    file = path / "metrics.jsonl"
    if not file.exists():
        raise RunError(f"{file} does not exist; give directories that residrop train wrote")
    known = [line for line in Run(path).history() if line.get("first_gradient") is not None]
    return [{"epoch": line["epoch"], "first_gradient": line["first_gradient"], "lr": line["lr"]} for line in known]


def _tables(found: Found) -> list[Table]:
    """One row per level, one column per mode: measured rate (predicted), as Table 1 of Hayou & Ayed."""
    title = f"{found['target']}: growth of the squared gradient per block, from block L down to l"
    headings = ("l", *(f"{row['mode']} {row['budget']:.2g}" for row in found["rows"]))
    levels = enumerate(found["rows"][0]["levels"])
    rows = [(str(level), *(_cell(row, place) for row in found["rows"])) for place, level in levels]
    return [table_of(title, headings, rows)]


def _cell(row: dict[str, Any], place: int) -> str:
    predicted = f" ({row['predicted_rates'][place]:.4f})" if "predicted_rates" in row else ""
    return f"{row['rates'][place]:.4f} ± {row['rates_error'][place]:.4f}{predicted}"


def _draw(found: Found, path: Path) -> None:
    """Growth against the block (Figure 2), and the first gradients of runs (Figure 7 of Huang et al.)."""
    runs = {name: lines for name, lines in found["runs"].items() if lines}
    with panels(path, 1 + bool(runs), f"{found['target']}: gradients") as axes:
        for number, row in enumerate(found["rows"]):
            axes[0].errorbar(
                row["levels"],
                row["q"],
                row["q_error"],
                fmt="o",
                ms=4,
                color=f"C{number}",
                label=f"{row['mode']} {row['budget']:.2g}",
            )
            if "predicted_q" in row:
                axes[0].plot(row["levels"], row["predicted_q"], "-", color=f"C{number}", linewidth=1)
        values = [value for row in found["rows"] for value in row["q"] if 0 < value < math.inf]
        if values and max(values) > 20 * min(values):
            axes[0].set_yscale("log")
        lines = "; lines: Proposition 1" if "predicted_q" in found["rows"][0] else ""
        axes[0].set(xlabel=f"block l{lines}", ylabel="q: squared gradient at l over that at L")
        for name, course in runs.items():
            axes[1].plot(
                [line["epoch"] for line in course], [line["first_gradient"] for line in course], label=Path(name).name
            )
            drops = [b["epoch"] for a, b in pairwise(course) if b["lr"] < a["lr"]]
            for drop in drops:
                axes[1].axvline(drop, color="grey", linestyle=":", linewidth=1)
        if runs:
            axes[1].set(xlabel="epoch", ylabel="mean |gradient|, first convolution of block 1", yscale="log")
