"""Rules: how a block's shortcut and branch are combined in training, at test time and when sampling.

A rule has no parameters and no state of its own but its rates. It receives the shortcut and the branch as callables,
so that it can leave the branch uncalled; nothing else in residrop may. What a rule does in a pass is decided by its
draw: coins in training (and inside `residrop.sampling`), expectation in `eval()`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from residrop import functional
from residrop.errors import ConfigError, PlanError
from residrop.sampler import DepthSampler, Draw, Granularity, Scope, Site
from residrop.survival import check_rate

__all__ = [
    "ConstantDepth",
    "DepthDropout",
    "Mix",
    "Rule",
    "SkipForward",
    "StochasticDepth",
    "Swapout",
    "UnitDropout",
]

Rescale = Literal["test", "train", "none"]
Map = Callable[[Tensor], Tensor]


def _check_choice(name: str, value: str, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}")


class Rule(nn.Module, ABC):
    """Base of all rules: `forward(x, shortcut, branch)` reads the draw and combines.

    Attributes:
        rates: survival rates or thetas, one per coin of the rule, in [0, 1]; attach again after changing them.
        granularity: what one coin decides: `block`, `row` or `unit`.
        scope: whether ranks of a distributed run share the draw; default `shared` for blocks, `per_rank` otherwise.
    """

    def __init__(
        self, rates: tuple[float, ...], granularity: Granularity = "block", scope: Scope | None = None
    ) -> None:
        super().__init__()
        _check_choice("granularity", granularity, Granularity)
        self.rates = rates
        self.granularity: Granularity = granularity
        self.scope: Scope = ("shared" if granularity == "block" else "per_rank") if scope is None else scope
        _check_choice("scope", self.scope, Scope)
        self._sampler: DepthSampler | None = None
        self._index = -1

    @property
    def site(self) -> Site:
        """What the sampler needs to know of this rule."""
        return Site(self.rates, self.granularity, self.scope)

    def join(self, sampler: DepthSampler, index: int) -> None:
        """Take draws from place `index` of `sampler`'s plans (called by `residrop.attach`)."""
        self._sampler, self._index = sampler, index

    @property
    def sampler(self) -> DepthSampler | None:
        """The sampler this rule takes its draws from; None before `residrop.attach`."""
        return self._sampler

    def draw(self) -> Draw:
        """The draw in force for this pass."""
        if self._sampler is not None:
            # inside a backward pass this forward is a recomputation, which must repeat the draw of its original
            recomputing = torch._C._current_graph_task_id() != -1
            draw = self._sampler.draw(self._index, self.training, recomputing)
            if draw is not None:
                return draw if draw.rates else draw._replace(rates=self.rates)
        elif self.training and self.rates:
            raise PlanError(
                f"{type(self).__name__} has no coins: call residrop.attach(model, seed=...) once the model is built"
            )
        return Draw(self.rates)

    def branch_rate(self, rates: tuple[float, ...]) -> float:
        """Probability that the branch (or a unit of it) is present under these rates of the rule."""
        return rates[0] if rates else 1.0

    def presence(self, draw: Draw) -> float:
        """Share of the branch that is present under a draw: 0 or 1 for block-level coins, else the rate."""
        return float(draw.alive) if draw.alive is not None else self.branch_rate(draw.rates or self.rates)

    @abstractmethod
    def forward(self, x: Tensor, shortcut: Map, branch: Map) -> Tensor:
        """Combine `shortcut(x)` and, where the draw says so, `branch(x)`; both Tensor[N, ...] of one shape."""

    def extra_repr(self) -> str:
        return ", ".join(map(repr, self.rates))


class ConstantDepth(Rule):
    """shortcut(x) + branch(x) in every mode: the plain residual block. It has no coins."""

    def __init__(self) -> None:
        super().__init__(())

    def forward(self, x: Tensor, shortcut: Map, branch: Map) -> Tensor:
        return shortcut(x) + branch(x)


class StochasticDepth(Rule):
    """The branch is present with probability p, for the whole mini-batch or for every row (Huang et al. 2016, eq. 2).

    - Drawn: one coin per mini-batch (`block`), or per row. Rows live in a random wrapping window of p * n rows rounded
      at random (`rows="window"`), or by one coin each (`rows="bernoulli"`).
    - Training: shortcut(x) + b branch(x), times 1/p under `rescale="train"`. A dead branch is not called.
    - Test: shortcut(x) + p branch(x) under `rescale="test"` (eq. 5), else shortcut(x) + branch(x).
    - Batch norm in the branch sees, and keeps statistics of, live rows only; nothing when the branch is dead.
    - Parameters of a dead branch get no gradient (`grad is None`), so optimizers leave them alone.

    Args:
        survival: p in [0, 1].
        granularity: `block` or `row`.
        rescale: `test` (the paper), `train` (torchvision, timm) or `none` (depth dropout).
        rows: `window` or `bernoulli`; only for granularity `row`.
        scope: see `Rule`.
    """

    def __init__(
        self,
        survival: float,
        granularity: Literal["block", "row"] = "block",
        rescale: Rescale = "test",
        rows: Literal["window", "bernoulli"] = "window",
        scope: Scope | None = None,
    ) -> None:
        _check_choice("granularity", granularity, Literal["block", "row"])
        _check_choice("rescale", rescale, Rescale)
        _check_choice("rows", rows, Literal["window", "bernoulli"])
        if rows != "window" and granularity != "row":
            raise ConfigError(
                f"rows is {rows!r}, which a {granularity}-level rule has no use for; set granularity='row'"
            )
        super().__init__((check_rate("survival", survival),), granularity, scope)
        self.rescale: Rescale = rescale
        self.rows: Literal["window", "bernoulli"] = rows

    def forward(self, x: Tensor, shortcut: Map, branch: Map) -> Tensor:
        draw = self.draw()
        survival = draw.rates[0]
        if draw.expected:
            scale = survival if self.rescale == "test" else 1.0
        else:
            scale = 1.0 / survival if self.rescale == "train" and survival > 0 else 1.0
        if draw.alive is False or scale == 0.0:
            return shortcut(x)
        if draw.alive or draw.expected:
            f = branch(x)
            return shortcut(x) + (f if scale == 1.0 else f * scale)
        if self.rows == "bernoulli":
            assert draw.key is not None
            return _bernoulli_rows(x, shortcut, branch, survival, draw.key, scale)
        return functional.keep_rows(x, shortcut, branch, draw.rows(x.shape[0]), scale)

    def extra_repr(self) -> str:
        rows = f", rows={self.rows!r}" if self.granularity == "row" else ""
        return f"{self.rates[0]!r}, granularity={self.granularity!r}, rescale={self.rescale!r}{rows}"


def _bernoulli_rows(x: Tensor, shortcut: Map, branch: Map, survival: float, key: int, scale: float) -> Tensor:
    live = functional.row_mask(x.shape[0], survival, key).nonzero().squeeze(1).to(x.device)
    skip = shortcut(x)
    if live.numel() == 0:
        return skip
    f = branch(x.index_select(0, live))
    # scaled before it is added: `alpha` would be rounded to the dtype
    return skip.index_add(0, live, (f * scale).to(skip.dtype))


class DepthDropout(StochasticDepth):
    """Uniform block-level dropping for speed, never rescaled (Guo & Gould 2016, eq. 3-4).

    The paper's networks give every droppable block a trainable shortcut (1x1 convolution, batch norm, ReLU) and never
    drop the first block of a group; `residrop.create(..., rule="depth-dropout")` builds both. The paper's p is the
    *drop* ratio; `survival` is 1 - p.
    """

    def __init__(self, survival: float, scope: Scope | None = None) -> None:
        super().__init__(survival, "block", "none", scope=scope)

    def extra_repr(self) -> str:
        return f"{self.rates[0]!r}"


class _UnitRule(Rule):
    def __init__(self, rates: tuple[float, ...], scope: Scope | None = None) -> None:
        super().__init__(tuple(check_rate(f"theta_{i}", rate) for i, rate in enumerate(rates, 1)), "unit", scope)


class Swapout(_UnitRule):
    """Theta_1 * X + Theta_2 * F(X) with independent masks per unit (Singh et al. 2016, eq. 3).

    - Drawn: two coins per unit of every row. Training: as above, never rescaled. Test: theta_1 X + theta_2 F(X).
    - X is the shortcut's output (in blocks that change shape: the projected input). Batch norm sees the whole batch.
    - Sampled inference (`residrop.sampling`) is the better of the paper's two predictions.

    Args:
        theta_1: probability in [0, 1] that a unit of the shortcut is present.
        theta_2: the same for the branch (default: theta_1).
    """

    def __init__(self, theta_1: float, theta_2: float | None = None, scope: Scope | None = None) -> None:
        super().__init__((theta_1, theta_1 if theta_2 is None else theta_2), scope)

    def branch_rate(self, rates: tuple[float, ...]) -> float:
        return rates[1]

    def forward(self, x: Tensor, shortcut: Map, branch: Map) -> Tensor:
        draw = self.draw()
        return functional.swapout(shortcut(x), branch(x), draw.rates[0], draw.rates[1], draw.key)


class SkipForward(_UnitRule):
    """Every unit is F(X) or X, never both and never neither (Singh et al. 2016, eq. 4, complementary masks).

    Args:
        theta: probability in [0, 1].
        of: which of the two `theta` is the probability of. `branch` makes the first block of Linear(1, 0.5) a plain
            feed-forward block; `shortcut` is eq. 4 to the letter, where that block would never be used.
        scope: see `Rule`.
    """

    def __init__(self, theta: float, of: Literal["branch", "shortcut"] = "branch", scope: Scope | None = None) -> None:
        _check_choice("of", of, Literal["branch", "shortcut"])
        super().__init__((theta,), scope)
        self.of: Literal["branch", "shortcut"] = of

    def branch_rate(self, rates: tuple[float, ...]) -> float:
        return rates[0] if self.of == "branch" else 1.0 - rates[0]

    def forward(self, x: Tensor, shortcut: Map, branch: Map) -> Tensor:
        draw = self.draw()
        skip, f = shortcut(x), branch(x)
        if self.of == "branch":
            return functional.skip_forward(skip, f, draw.rates[0], draw.key)
        return functional.skip_forward(f, skip, draw.rates[0], draw.key)

    def extra_repr(self) -> str:
        return f"{self.rates[0]!r}, of={self.of!r}"


class UnitDropout(_UnitRule):
    """Dropout of the block's output without rescaling (Singh et al. 2016, eq. 1); expectation theta times it.

    Args:
        theta: probability in [0, 1] that a unit is present.
        on: the output meant: `branch`, Theta F(X) without a skip (eq. 1 to the letter); `residual`, X + Theta F(X);
            `sum`, Theta (X + F(X)). The paper's table does not say which one it ran.
        scope: see `Rule`.
    """

    def __init__(
        self, theta: float, on: Literal["branch", "residual", "sum"] = "branch", scope: Scope | None = None
    ) -> None:
        _check_choice("on", on, Literal["branch", "residual", "sum"])
        super().__init__((theta,), scope)
        self.on: Literal["branch", "residual", "sum"] = on

    def forward(self, x: Tensor, shortcut: Map, branch: Map) -> Tensor:
        draw = self.draw()
        f = branch(x)
        if self.on == "sum":
            return functional.unit_dropout(shortcut(x) + f, draw.rates[0], draw.key)
        dropped = functional.unit_dropout(f, draw.rates[0], draw.key)
        return dropped if self.on == "branch" else shortcut(x) + dropped

    def extra_repr(self) -> str:
        return f"{self.rates[0]!r}, on={self.on!r}"


class Mix(_UnitRule):
    """sum_i Theta_i * F_i over any tensors already computed, one theta each (Singh et al. 2016, eq. 2).

    In a residual block F_1 is the shortcut and F_2 the branch, so `Mix((t1, t2))` is `Swapout(t1, t2)`; further thetas
    belong to `earlier` tensors, given to `forward` in that order.

    Args:
        thetas: one probability in [0, 1] per tensor.
        scope: see `Rule`.
    """

    def __init__(self, thetas: tuple[float, ...], scope: Scope | None = None) -> None:
        if len(thetas) < 2:
            raise ConfigError(
                f"Mix has {len(thetas)} thetas; give one for the shortcut, one for the branch, one per earlier tensor"
            )
        super().__init__(tuple(thetas), scope)

    def branch_rate(self, rates: tuple[float, ...]) -> float:
        return rates[1]

    def forward(self, x: Tensor, shortcut: Map, branch: Map, *earlier: Tensor) -> Tensor:
        draw = self.draw()
        return functional.mix((shortcut(x), branch(x), *earlier), draw.rates, draw.key)
