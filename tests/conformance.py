"""Every rule as one line of arithmetic: out = a * shortcut(x) + b * branch(x).

A `Case` says how a rule is built and what a and b are, unit by unit in float64, for a draw, for the expectation and on
average. `test_rules.py` runs every rule through the same checks with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from reference import live_rows, normal_of, row_normals, unit_coins
from residrop import (
    ConstantDepth,
    DepthDropout,
    GaussianDepth,
    Mix,
    Residual,
    Rule,
    SkipForward,
    StochasticDepth,
    Swapout,
    UnitDropout,
    attach,
)
from residrop.schedule.sampler import Draw

Pair = tuple[Tensor | float, Tensor | float]


@dataclass(frozen=True)
class Case:
    """One rule with its law.

    Attributes:
        name: for test ids.
        build: makes a fresh rule.
        weights: (a, b) of a training draw for an output of the given shape; broadcast against it.
        eval_weights: (a, b) of deterministic inference.
        mean_weights: (a, b) averaged over draws; differs from `eval_weights` only where the rule never rescales.
        granularity: what one coin decides; None for a rule without coins.
        text: what `repr` shows between the parentheses.
    """

    name: str
    build: Callable[[], Rule]
    weights: Callable[[Draw, tuple[int, ...]], Pair]
    eval_weights: tuple[float, float]
    mean_weights: tuple[float, float]
    granularity: Literal["block", "row", "unit"] | None
    text: str

    def __repr__(self) -> str:
        return self.name


def _block(scale: float) -> Callable[[Draw, tuple[int, ...]], Pair]:
    return lambda draw, shape: (1.0, scale if draw.alive else 0.0)


def _row(scale: float, rows: str) -> Callable[[Draw, tuple[int, ...]], Pair]:
    def weights(draw: Draw, shape: tuple[int, ...]) -> Pair:
        assert draw.key is not None
        total = shape[0]
        if rows == "window":
            alive = live_rows(draw.key, draw.rates[0], total)
        else:
            alive = [row for row, coin in enumerate(unit_coins(draw.key, (total,), draw.rates[0])) if coin]
        b = torch.zeros(total, *[1] * (len(shape) - 1), dtype=torch.float64)
        b[alive] = scale
        return 1.0, b

    return weights


def _units(combine: Callable[[list[Tensor]], Pair]) -> Callable[[Draw, tuple[int, ...]], Pair]:
    def weights(draw: Draw, shape: tuple[int, ...]) -> Pair:
        assert draw.key is not None
        return combine([unit_coins(draw.key, shape, theta, coin) for coin, theta in enumerate(draw.rates)])

    return weights


def _stochastic_depth() -> list[Case]:
    p = 0.6
    test_scale = {"test": p, "train": 1.0, "none": 1.0}
    mean = {"test": p, "train": 1.0, "none": p}
    cases = []
    for rescale in ("test", "train", "none"):
        scale = 1 / p if rescale == "train" else 1.0
        for granularity, rows in (("block", "window"), ("row", "window"), ("row", "bernoulli")):
            shown = f", rows='{rows}'" if granularity == "row" else ""
            cases.append(
                Case(
                    f"stochastic-depth-{granularity}-{rows}-{rescale}",
                    lambda g=granularity, r=rescale, w=rows: StochasticDepth(p, granularity=g, rescale=r, rows=w),
                    _block(scale) if granularity == "block" else _row(scale, rows),
                    (1.0, test_scale[rescale]),
                    (1.0, mean[rescale]),
                    granularity,
                    f"0.6, granularity='{granularity}', rescale='{rescale}'{shown}",
                )
            )
    return cases


def _number(gain: float) -> Callable[[Draw, tuple[int, ...]], Pair]:
    def weights(draw: Draw, shape: tuple[int, ...]) -> Pair:
        assert draw.key is not None
        (p,) = draw.rates
        return 1.0, gain * (p + (p * (1 - p)) ** 0.5 * normal_of(draw.key))

    return weights


def _row_numbers(gain: float) -> Callable[[Draw, tuple[int, ...]], Pair]:
    def weights(draw: Draw, shape: tuple[int, ...]) -> Pair:
        assert draw.key is not None
        (p,) = draw.rates
        xi = row_normals(draw.key, shape[0]).view(-1, *[1] * (len(shape) - 1))
        return 1.0, gain * (p + (p * (1 - p)) ** 0.5 * xi)

    return weights


def _gaussian_depth() -> list[Case]:
    p = 0.6
    gain = {"test": 1.0, "train": 1 / p, "none": 1.0}
    at_test = {"test": p, "train": 1.0, "none": 1.0}
    return [
        Case(
            f"gaussian-depth-{granularity}-{rescale}",
            lambda g=granularity, r=rescale: GaussianDepth(p, granularity=g, rescale=r),
            (_number if granularity == "block" else _row_numbers)(gain[rescale]),
            (1.0, at_test[rescale]),
            (1.0, gain[rescale] * p),
            granularity,
            f"0.6, granularity='{granularity}', rescale='{rescale}'",
        )
        for granularity in ("block", "row")
        for rescale in ("test", "train", "none")
    ]


CASES = [
    Case("constant", ConstantDepth, lambda draw, shape: (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), None, ""),
    *_stochastic_depth(),
    *_gaussian_depth(),
    Case("depth-dropout", lambda: DepthDropout(0.6), _block(1.0), (1.0, 1.0), (1.0, 0.6), "block", "0.6"),
    Case(
        "swapout",
        lambda: Swapout(0.7, 0.4),
        _units(lambda masks: (masks[0], masks[1])),
        (0.7, 0.4),
        (0.7, 0.4),
        "unit",
        "0.7, 0.4",
    ),
    Case(
        "swapout-one-theta",
        lambda: Swapout(0.7),
        _units(lambda masks: (masks[0], masks[1])),
        (0.7, 0.7),
        (0.7, 0.7),
        "unit",
        "0.7, 0.7",
    ),
    Case(
        "skipforward-branch",
        lambda: SkipForward(0.7),
        _units(lambda masks: (1 - masks[0], masks[0])),
        (0.3, 0.7),
        (0.3, 0.7),
        "unit",
        "0.7, of='branch'",
    ),
    Case(
        "skipforward-shortcut",
        lambda: SkipForward(0.7, of="shortcut"),
        _units(lambda masks: (masks[0], 1 - masks[0])),
        (0.7, 0.3),
        (0.7, 0.3),
        "unit",
        "0.7, of='shortcut'",
    ),
    Case(
        "dropout-branch",
        lambda: UnitDropout(0.7),
        _units(lambda masks: (0.0, masks[0])),
        (0.0, 0.7),
        (0.0, 0.7),
        "unit",
        "0.7, on='branch'",
    ),
    Case(
        "dropout-residual",
        lambda: UnitDropout(0.7, on="residual"),
        _units(lambda masks: (1.0, masks[0])),
        (1.0, 0.7),
        (1.0, 0.7),
        "unit",
        "0.7, on='residual'",
    ),
    Case(
        "dropout-sum",
        lambda: UnitDropout(0.7, on="sum"),
        _units(lambda masks: (masks[0], masks[0])),
        (0.7, 0.7),
        (0.7, 0.7),
        "unit",
        "0.7, on='sum'",
    ),
    Case(
        "mix",
        lambda: Mix((0.7, 0.4)),
        _units(lambda masks: (masks[0], masks[1])),
        (0.7, 0.4),
        (0.7, 0.4),
        "unit",
        "0.7, 0.4",
    ),
]
RANDOM = [case for case in CASES if case.granularity is not None]


class Affine(nn.Module):
    """weight * x + bias, element by element: results of a row do not depend on its batch, not even in the last bit."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator))
        self.bias = nn.Parameter(torch.randn(shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.bias


class Counted(nn.Module):
    """A module that records the batch size of each of its calls."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.inner(x)


def tower(case: Case, shape: tuple[int, ...] = (4,), depth: int = 3, *, seed: int = 0) -> nn.Sequential:
    """An attached chain of residual blocks of one rule; the middle block has a learned shortcut."""
    blocks = [
        Residual(Affine(shape, 2 * i), Affine(shape, 2 * i + 1) if i == 1 else None, case.build(), nn.Tanh())
        for i in range(depth)
    ]
    model = nn.Sequential(*blocks)
    attach(model, seed=seed)
    return model


def naive_tower(
    model: nn.Sequential, weights: list[Pair], x: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of a tower by masked arithmetic in float64, and the (double) parameters it was computed from."""
    parameters = {name: p.detach().to(dtype).double().requires_grad_() for name, p in model.named_parameters()}

    def affine(prefix: str, x: Tensor) -> Tensor:
        if f"{prefix}.weight" not in parameters:
            return x
        return parameters[f"{prefix}.weight"] * x + parameters[f"{prefix}.bias"]

    for i, (a, b) in enumerate(weights):
        x = torch.tanh(a * affine(f"{i}.shortcut", x) + b * affine(f"{i}.branch", x))
    return x, parameters
