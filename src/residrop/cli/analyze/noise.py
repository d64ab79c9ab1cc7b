"""Is the noise of random presence Gaussian: Theorem 2 and Figures 4 and 5 of Hayou & Ayed on any model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from residrop.cli.analyze.pictures import panels
from residrop.cli.analyze.targets import Target
from residrop.models import create
from residrop.theory import noise, sine_task, train_regression, uniformity

__all__ = ["draw_noise", "measure_noise", "table_of_noise"]


def measure_noise(
    target: Target,
    networks: int,
    inputs: int,
    masks: int,
    epochs: Sequence[int],
    depths: Sequence[int],
    seed: int,
    *,
    tell: Any = None,
) -> dict[str, Any]:
    """Shapiro-Wilk tests of a neuron of every block under random masks, condition 2, and variances.

    Of a Vanilla network it pools `networks` draws of the weights; with `epochs` beyond 0 each is trained on the sine
    task, and measured after these epochs. `depths` are further numbers of blocks for which condition 2 is measured at
    the same width and mean rate (Figure 4).
    """
    if target.vanilla is None:
        found = [noise(target.model, target.x[:inputs], masks=masks, neurons=1, rates=target.rates, seed=seed)]
        epochs = (0,)
        p_values = found[0].p_values[None]
        ratios, variance, first = (each[None] for each in (found[0].ratio, found[0].variance, found[0].first_order))
    else:
        parts = [_vanilla(target, inputs, masks, epochs, seed + n, tell) for n in range(networks)]
        p_values, ratios, variance, first = (torch.cat(each, dim=-2) for each in zip(*parts, strict=True))
    rows = []
    for number, epoch in enumerate(epochs):
        layers = [uniformity(layer) for layer in p_values[number]]
        seen = variance[number].isfinite() & (first[number] > 0)
        rows.append(
            {
                "epoch": epoch,
                "rejected": [layer.rejected for layer in layers],
                "distance": [layer.distance for layer in layers],
                "tests": [layer.tests for layer in layers],
                "ratio": float(ratios[number].nanmean()),
                "variance_over_first_order": float(variance[number][seen].sum() / first[number][seen].sum()),
                "p_values": [
                    [round(v, 6) for v in layer[~layer.isnan()].flatten().tolist()] for layer in p_values[number]
                ],
            }
        )
    return {
        "target": target.name,
        "networks": networks if target.vanilla else 1,
        "inputs": inputs,
        "masks": masks,
        "rates": list(target.rates),
        "rows": rows,
        "by_depth": _ratios_by_depth(target, depths, epochs, inputs, networks, seed, tell),
    }


def _vanilla(
    target: Target, inputs: int, masks: int, epochs: Sequence[int], seed: int, tell: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert target.vanilla is not None
    blocks, width, stable = target.vanilla
    if tell is not None:
        tell()
    options: dict[str, Any] = {"width": width, "survival": target.rates, "seed": seed}
    if tuple(epochs) == (0,):
        name = f"{'stable-' if stable else ''}vanilla-{blocks}"
        model = create(name, rule="stochastic-depth", in_features=256, classes=1, **options)
        found = noise(model, sine_task(inputs, seed)[0], masks=masks, seed=seed)
        return found.p_values[None], found.ratio[None], found.variance[None], found.first_order[None]
    course = train_regression(blocks, stable=stable, epochs=epochs, inputs=inputs, masks=masks, **options)
    return course.p_values, course.ratios, course.variance, course.first_order


def _ratios_by_depth(
    target: Target, depths: Sequence[int], epochs: Sequence[int], inputs: int, networks: int, seed: int, tell: Any
) -> dict[str, list[float]]:
    """Condition 2 by number of blocks, one number per epoch."""
    if target.vanilla is None:
        return {}
    found: dict[str, list[float]] = {}
    mean = sum(target.rates) / len(target.rates)
    for blocks in depths:
        other = replace(target, rates=(mean,) * blocks, vanilla=(blocks, *target.vanilla[1:]))
        parts = [_vanilla(other, inputs, 3, epochs, seed + n, tell)[1] for n in range(networks)]
        found[str(blocks)] = [float(each.nanmean()) for each in torch.cat(parts, dim=-2)]
    return found


def _some(count: int) -> list[int]:
    """Blocks that a table shows."""
    return sorted({n for n in (1, 2, 5, 10, 20, 30, 50, 75) if n <= count} | {count})


def table_of_noise(found: dict[str, Any]) -> Table:
    """Share of rejected tests by block, one column per epoch."""
    title = f"{found['target']}: share of Shapiro-Wilk tests below 0.05 (0.05 if Gaussian), {found['masks']} masks"
    table = Table(title=title, title_justify="left")
    table.add_column("block", justify="right")
    for row in found["rows"]:
        table.add_column(f"epoch {row['epoch']}" if len(found["rows"]) > 1 else "rejected", justify="right")
    for block in _some(len(found["rows"][0]["rejected"])):
        table.add_row(str(block), *(f"{row['rejected'][block - 1]:.2f}" for row in found["rows"]))
    table.add_section()
    table.add_row("condition 2", *(f"{row['ratio']:.3f}" for row in found["rows"]))
    table.add_row("var / first order", *(f"{row['variance_over_first_order']:.2f}" for row in found["rows"]))
    return table


def draw_noise(found: dict[str, Any], path: Path) -> None:
    """p-values by block at the first epoch measured (Figure 5, right); rejections by block; the last block by epoch."""
    rows = found["rows"]
    along = len(rows) > 1
    with panels(path, 2 + 2 * along + bool(found["by_depth"]), f"{found['target']}: noise of random presence") as axes:
        count = len(rows[0]["p_values"])
        shown = [n for n in range(1, count + 1) if rows[0]["p_values"][n - 1]]
        step = max(1, len(shown) // 25)
        shown = shown[::step]
        axes[0].boxplot(
            [rows[0]["p_values"][n - 1] for n in shown], positions=shown, widths=0.6 * step, manage_ticks=False
        )
        axes[0].axhline(0.05, color="grey", linestyle=":")
        axes[0].set(xlabel="block", ylabel="p-value (uniform if Gaussian)", ylim=(-0.02, 1.02))
        for row in rows:
            axes[1].plot(range(1, count + 1), row["rejected"], label=f"epoch {row['epoch']}" if along else None)
        axes[1].axhline(0.05, color="grey", linestyle=":", label="if Gaussian")
        axes[1].set(xlabel="block", ylabel="share of tests below 0.05", ylim=(-0.02, 1.02))
        if along:
            epochs = [row["epoch"] for row in rows]
            known = [row for row in rows if row["p_values"][-1]]
            axes[2].boxplot([row["p_values"][-1] for row in known], positions=range(len(known)))
            axes[2].set_xticks(range(len(known)), [str(row["epoch"]) for row in known])
            axes[2].set(xlabel="epoch", ylabel="p-value of the last block", ylim=(-0.02, 1.02))
            axes[3].plot(epochs, [row["ratio"] for row in rows], "o-")
            axes[3].set(xlabel="epoch", ylabel="condition 2: largest share of one block", ylim=(0, None))
        if found["by_depth"]:
            depths = [int(blocks) for blocks in found["by_depth"]]
            for number, row in enumerate(rows):
                ratios = [values[number] for values in found["by_depth"].values()]
                axes[-1].plot(depths, ratios, "o-", label=f"epoch {row['epoch']}")
            axes[-1].set(xlabel="blocks L", ylabel="condition 2: largest share of one block", ylim=(0, None))
