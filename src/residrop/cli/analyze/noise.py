"""Is the noise of random presence Gaussian: Theorem 2 and Figures 4 and 5 of Hayou & Ayed on any model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from residrop.cli.analyze.instrument import Found, analyze, progress
from residrop.cli.analyze.targets import Analysis, Target
from residrop.cli.pictures import panels
from residrop.cli.shared import parse
from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError
from residrop.models import create
from residrop.theory import Noise, noise, sine_task, train_regression, uniformity

__all__ = ["run"]


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

    def check(self) -> None:
        """Refuse too few draws, and epochs that do not rise."""
        for name, least in (("networks", 1), ("inputs", 1), ("masks", 3)):
            check_whole(name, getattr(self, name), least=least)
        if not self.epochs or self.epochs[0] < 0 or list(self.epochs) != sorted(set(self.epochs)):
            raise ConfigError(f"epochs are {self.epochs}; give rising numbers, from 0")


def run(arguments: Sequence[str], prog: str) -> int:
    """Read the options and analyze."""
    return analyze("noise", parse(AnalyzeNoise, arguments, prog), _measure, _tables, _draw)


def _measure(options: AnalyzeNoise, target: Target) -> Found:
    """Shapiro-Wilk tests of a neuron of every block under random masks, condition 2, and variances.

    Of a Vanilla network it pools `networks` draws of the weights; with `epochs` beyond 0 each is trained on the sine
    task, and measured after these epochs. `depths` are further numbers of blocks for which condition 2 is measured at
    the same width and mean rate (Figure 4).
    """
    networks, by_depth = 1, {}
    if target.vanilla is None:
        for name, given in (("epochs", options.epochs != (0,)), ("depths", options.depths)):
            if given:
                raise ConfigError(f"{name} is for Vanilla networks; {target.name} is none. Leave it out")
        drawn = {"masks": options.masks, "neurons": 1, "rates": target.rates, "seed": options.seed}
        p_values, ratios, variance, first = _parts(noise(target.model, target.x[: options.inputs], **drawn))
    else:
        networks = options.networks
        with progress(networks * (1 + len(options.depths)), "networks") as tell:
            p_values, ratios, variance, first = _pooled(options, target, options.masks, tell)
            by_depth = {str(blocks): _ratios_at(options, target, blocks, tell) for blocks in options.depths}
    rows = []
    for number, epoch in enumerate(options.epochs):
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
        "networks": networks,
        "inputs": options.inputs,
        "masks": options.masks,
        "rates": list(target.rates),
        "rows": rows,
        "by_depth": by_depth,
    }


def _parts(found: Noise) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p-values, ratios of condition 2, variances and their first-order parts, each with a dimension for one epoch."""
    return found.p_values[None], found.ratio[None], found.variance[None], found.first_order[None]


def _pooled(
    options: AnalyzeNoise, target: Target, masks: int, tell: Callable[[], None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of Vanilla networks, for each epoch, over all draws of the weights."""
    drawn = [_vanilla(options, target, masks, options.seed + n, tell) for n in range(options.networks)]
    p_values, ratios, variance, first = (torch.cat(each, dim=-2) for each in zip(*drawn, strict=True))
    return p_values, ratios, variance, first


def _vanilla(
    options: AnalyzeNoise, target: Target, masks: int, seed: int, tell: Callable[[], None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert target.vanilla is not None
    blocks, width, stable = target.vanilla
    tell()
    how: dict[str, Any] = {"width": width, "survival": target.rates, "seed": seed}
    if options.epochs == (0,):
        name = f"{'stable-' if stable else ''}vanilla-{blocks}"
        model = create(name, rule="stochastic-depth", in_features=256, classes=1, **how)
        return _parts(noise(model, sine_task(options.inputs, seed)[0], masks=masks, seed=seed))
    how |= {"epochs": options.epochs, "inputs": options.inputs, "masks": masks}
    course = train_regression(blocks, stable=stable, **how)
    return course.p_values, course.ratios, course.variance, course.first_order


def _ratios_at(options: AnalyzeNoise, target: Target, blocks: int, tell: Callable[[], None]) -> list[float]:
    """Condition 2 at another number of blocks, with the same width and mean rate: one number per epoch."""
    assert target.vanilla is not None
    mean = sum(target.rates) / len(target.rates)
    other = replace(target, rates=(mean,) * blocks, vanilla=(blocks, *target.vanilla[1:]))
    return [float(each.nanmean()) for each in _pooled(options, other, 3, tell)[1]]


def _some(count: int) -> list[int]:
    """Blocks that a table shows."""
    return sorted({n for n in (1, 2, 5, 10, 20, 30, 50, 75) if n <= count} | {count})


def _tables(found: Found) -> list[Table]:
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
    return [table]


def _draw(found: Found, path: Path) -> None:
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
