"""What the absence of a block does to outputs and loss: the regulariser, at initialisation and along a training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from residrop.blocks.attach import rules_of
from residrop.cli.analyze.instrument import Found, analyze, progress
from residrop.cli.analyze.targets import Analysis, Target
from residrop.cli.pictures import panels
from residrop.cli.shared import parse, table_of
from residrop.common.checks import check_whole
from residrop.models import create
from residrop.schedule.sampler import derive_key
from residrop.theory import discrepancy, flat_discrepancy, regularizer

__all__ = ["run"]

_INPUTS, _OUTPUTS, _FEATURES = 4, 8, 256  # of every network drawn


def _squared(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().sum(dim=1).mean()


@dataclass(frozen=True, kw_only=True)
class AnalyzeDiscrepancy(Analysis):
    """Discrepancy h_l: the second-order effect on the loss of whether block l is present (Hayou & Ayed 2021).

    Survival rates p_l add the regulariser 1/2 sum_l p_l (1 - p_l) h_l to the expected loss (eq. 4 to 6, Theorem 1,
    Figure 3). Of a run trained with --watch discrepancy the picture shows it along the training, too.
    """

    networks: int = 150
    """Vanilla networks: draws of the weights."""

    def check(self) -> None:
        """Refuse no network."""
        check_whole("networks", self.networks, least=1)


def run(arguments: Sequence[str], prog: str) -> int:
    """Read the options and analyze."""
    return analyze("discrepancy", parse(AnalyzeDiscrepancy, arguments, prog), _measure, _tables, _draw)


def _measure(options: AnalyzeDiscrepancy, target: Target) -> Found:
    """h_l of every block: of a model for its weights and inputs, of a Vanilla network over draws of its weights."""
    predicted = None
    if target.vanilla is not None:
        blocks, width, stable = target.vanilla
        networks = options.networks
        with progress(networks, "networks") as tell:
            draws = torch.stack([_drawn(blocks, width, stable, options.seed + n, tell) for n in range(networks)])
        curvature, error = draws.mean(dim=0), draws.std(dim=0) / networks**0.5
        predicted = flat_discrepancy(blocks, _OUTPUTS, 1.0) / blocks if stable else None
        inputs = f"{networks} networks at initialisation, {_INPUTS} inputs each, squared loss of {_OUTPUTS} outputs"
    else:
        found = discrepancy(target.model, target.batches, target.loss)
        curvature, error, inputs = found.curvature, found.standard_error, target.inputs
    return {
        "target": target.name,
        "inputs": inputs,
        "rates": list(target.rates),
        "curvature": curvature.tolist(),
        "standard_error": error.tolist(),
        "predicted": predicted,
        "regularizer": regularizer(curvature, target.rates),
        "course": [line for line in target.lines("instruments.jsonl") if "discrepancy" in line],
    }


def _drawn(blocks: int, width: int, stable: bool, seed: int, tell: Callable[[], None]) -> torch.Tensor:
    name = f"{'stable-' if stable else ''}vanilla-{blocks}"
    model = create(
        name, rule="stochastic-depth", width=width, in_features=_FEATURES, classes=_OUTPUTS, survival=0.5, seed=seed
    )
    generator = torch.Generator().manual_seed(derive_key(seed, 6) >> 1)
    x = torch.randn(_INPUTS, _FEATURES, generator=generator)
    tell()
    assert len(rules_of(model)) == blocks
    return discrepancy(model, [(x, torch.zeros(_INPUTS, _OUTPUTS))], _squared).curvature


def _tables(found: Found) -> list[Table]:
    """One row per block."""
    mean = sum(found["curvature"]) / len(found["curvature"])
    rows: list[tuple[str, ...]] = []
    columns = zip(found["curvature"], found["standard_error"], found["rates"], strict=True)
    for number, (h, error, p) in enumerate(columns, start=1):
        part = 0.5 * p * (1 - p) * h / found["regularizer"] if found["regularizer"] else 0.0
        rows.append((str(number), f"{h:.4g}", f"{error:.2g}", f"{h / mean:.3f}", f"{p:.3f}", f"{100 * part:.1f}%"))
    headings = ("block", "h", "± se", "of the mean", "survival rate", "its part of the regulariser")
    table = table_of(f"{found['target']}: discrepancy, {found['inputs']}", headings, rows)
    if found["predicted"] is not None:
        table.caption = f"Theorem 1: h = {found['predicted']:.4g} for every block (mean measured: {mean:.4g})"
    return [table]


def _draw(found: Found, path: Path) -> None:
    """h_l by block (Figure 3), and along the training of a run that watched it."""
    count = len(found["curvature"])
    with panels(path, 1 + bool(found["course"]), f"{found['target']}: discrepancy") as axes:
        axes[0].errorbar(
            range(1, count + 1), found["curvature"], found["standard_error"], fmt="o", ms=3, label="measured"
        )
        if found["predicted"] is not None:
            axes[0].axhline(found["predicted"], color="grey", linestyle="--", label="Theorem 1")
        axes[0].set(xlabel="block (rule) l", ylabel="h, what its absence does to the loss", ylim=(0, None))
        if found["course"]:
            grid = torch.tensor([line["discrepancy"] for line in found["course"]]).clamp_min(1e-12).log10().T
            epochs = [line["epoch"] for line in found["course"]]
            mesh = axes[1].pcolormesh(
                range(len(epochs) + 1), [n + 0.5 for n in range(count + 1)], grid.numpy(), cmap="viridis"
            )
            some = list(range(0, len(epochs), max(1, len(epochs) // 8)))
            axes[1].set_xticks([place + 0.5 for place in some], [str(epochs[place]) for place in some])
            axes[1].figure.colorbar(mesh, ax=axes[1], label="log10 h")
            axes[1].set(xlabel="epoch", ylabel="block (rule) l", title="along the training")
