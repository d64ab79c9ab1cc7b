"""Unit-level rules: every unit of the shortcut's and the branch's output is present or absent by itself."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from residrop import functional
from residrop.common.checks import check_choice, check_rate, check_whole
from residrop.common.errors import ConfigError
from residrop.functional.call import Map
from residrop.rules.base import Rule
from residrop.schedule.sampler import Draw, Scope

__all__ = ["Mix", "SkipForward", "Swapout", "UnitDropout"]


class _UnitRule(Rule):
    def __init__(self, rates: tuple[float, ...], scope: Scope | None = None) -> None:
        super().__init__(tuple(check_rate(f"theta_{i}", rate) for i, rate in enumerate(rates, 1)), "unit", scope)

    def forward(
        self, x: Tensor, shortcut: Map, branch: Map, *, post: Map | None = None, along: Sequence[Any] = ()
    ) -> Tensor:
        return self._combined(post, shortcut(x), self.executor.part(branch, x, along))

    def _combined(self, post: Map | None, *tensors: Tensor) -> Tensor:
        if self.is_traced():
            from residrop.rules import tracing

            y = tracing.units(self, *tensors)
        else:
            y = self.combine(self.draw(), *tensors)
        return y if post is None else post(y)

    @abstractmethod
    def combine(self, draw: Draw, *tensors: Tensor) -> Tensor:
        """The sum of the shortcut's and the branch's output, under a draw."""


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

    def combine(self, draw: Draw, *tensors: Tensor) -> Tensor:
        skip, f = tensors
        return functional.swapout(skip, f, draw.rates[0], draw.rates[1], draw.key)


class SkipForward(_UnitRule):
    """Every unit is F(X) or X, never both and never neither (Singh et al. 2016, eq. 4, complementary masks).

    Args:
        theta: probability in [0, 1].
        of: which of the two `theta` is the probability of. `branch` makes the first block of Linear(1, 0.5) a plain
            feed-forward block; `shortcut` is eq. 4 to the letter, where that block would never be used.
        scope: see `Rule`.
    """

    def __init__(self, theta: float, of: Literal["branch", "shortcut"] = "branch", scope: Scope | None = None) -> None:
        check_choice("of", of, Literal["branch", "shortcut"])
        super().__init__((theta,), scope)
        self.of: Literal["branch", "shortcut"] = of

    def branch_rate(self, rates: tuple[float, ...]) -> float:
        return rates[0] if self.of == "branch" else 1.0 - rates[0]

    def combine(self, draw: Draw, *tensors: Tensor) -> Tensor:
        skip, f = tensors
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
        check_choice("on", on, Literal["branch", "residual", "sum"])
        super().__init__((theta,), scope)
        self.on: Literal["branch", "residual", "sum"] = on

    def combine(self, draw: Draw, *tensors: Tensor) -> Tensor:
        skip, f = tensors
        if self.on == "sum":
            return functional.unit_dropout(skip + f, draw.rates[0], draw.key)
        dropped = functional.unit_dropout(f, draw.rates[0], draw.key)
        return dropped if self.on == "branch" else skip + dropped

    def extra_repr(self) -> str:
        return f"{self.rates[0]!r}, on={self.on!r}"


class Mix(_UnitRule):
    """sum_i Theta_i * F_i over any tensors already computed, one theta each (Singh et al. 2016, eq. 2).

    F_1 is the shortcut's output, F_2 the branch's, then the branch applied to its own output `repeat - 1` times
    (F o F, F o F o F, ..., Sec. 5), and then `earlier` outputs of the stage, the latest last. So `Mix((t1, t2))` is
    `Swapout(t1, t2)`; (1, 1) is a residual block, (0, 1) a feed-forward one, (0, t) dropout, (1, t) dropout of the
    branch.

    - A branch that is repeated has one set of weights, gets gradients from every use, and its batch norm sees (and
      counts) every use.
    - `residrop.create(..., rule="mix", earlier=..., repeat=...)` builds networks of it.

    Args:
        thetas: one probability in [0, 1] per tensor, in that order.
        scope: see `Rule`.
        repeat: how often the branch is applied; its output must have the shape of its input if more than once.
    """

    def __init__(self, thetas: tuple[float, ...], scope: Scope | None = None, *, repeat: int = 1) -> None:
        check_whole("repeat", repeat, least=1)
        if len(thetas) < 1 + repeat:
            raise ConfigError(
                f"Mix has {len(thetas)} thetas; give one for the shortcut, one for each of the {repeat} uses of the "
                "branch, one per earlier tensor"
            )
        super().__init__(tuple(thetas), scope)
        self.repeat = repeat
        self.earlier = len(thetas) - 1 - repeat

    def branch_rate(self, rates: tuple[float, ...]) -> float:
        return rates[1]

    def forward(
        self,
        x: Tensor,
        shortcut: Map,
        branch: Map,
        *earlier: Tensor,
        post: Map | None = None,
        along: Sequence[Any] = (),
    ) -> Tensor:
        uses = [self.executor.part(branch, x, along)]
        while len(uses) < self.repeat:
            uses.append(self.executor.part(branch, uses[-1], along))
        return self._combined(post, shortcut(x), *uses, *earlier)

    def combine(self, draw: Draw, *tensors: Tensor) -> Tensor:
        return functional.mix(tensors, draw.rates, draw.key)

    @classmethod
    def in_stage(
        cls,
        theta_1: float,
        theta_2: float | None = None,
        *,
        repeat: int = 1,
        earlier: float = 0.0,
        place: int = 1,
        scope: Scope | None = None,
    ) -> "Mix":
        """The rule of a block at a place in its stage.

        Args:
            theta_1: probability of the shortcut's units.
            theta_2: probability of the branch's units, in each of its uses (default: theta_1).
            repeat: uses of the branch; one in the first block of a stage, which may change the shape.
            earlier: expected number of earlier outputs that a unit sums besides, in [0, 1]: each of the k outputs that
                the stage had before the block's input is present with probability earlier / k.
            place: 0-based place of the block in its stage.
            scope: see `Rule`.
        """
        check_rate("earlier", earlier)
        theta_2 = theta_1 if theta_2 is None else theta_2
        uses, others = (repeat if place else 1), max(0, place - 1) if earlier else 0
        thetas = (theta_1, *[theta_2] * uses, *[earlier / max(1, others)] * others)
        return cls(thetas, scope, repeat=uses)

    def extra_repr(self) -> str:
        return ", ".join(map(repr, self.rates)) + (f", repeat={self.repeat}" if self.repeat > 1 else "")
