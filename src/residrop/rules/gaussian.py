"""Gaussian noise in place of coins: what stochastic depth tends to in deep Stable networks (Hayou & Ayed 2021)."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from residrop.common.checks import check_choice, check_rate
from residrop.functional.call import BranchCall, Map, combined
from residrop.functional.units import row_normal
from residrop.functional.zero_gradients import with_zero_gradients
from residrop.rules.base import Rescale, Rule
from residrop.rules.executor import EAGER
from residrop.schedule.sampler import Scope, Site, derive_key

__all__ = ["GaussianDepth"]

_NORMAL = NormalDist()


class GaussianDepth(Rule):
    """The branch is multiplied by m = p + sqrt(p (1 - p)) xi, xi ~ N(0, 1): the coin's mean and variance, no coin.

    To first order in the branches (Hayou & Ayed 2021, eq. 7) the noise of a neuron then has the law that Theorem 2 says
    stochastic depth has in the limit of depth, at any depth. For comparison, not for speed: every branch is computed in
    every step, but where p is 0 or 1 exactly. m may be negative or above 1.

    - Drawn: one number per mini-batch (`block`), the same on all ranks and in all micro-batches of an update; or one
      per row (`row`).
    - Training: shortcut(x) + m branch(x), times 1/p under `rescale="train"`.
    - Test: shortcut(x) + p branch(x) under `rescale="test"`, else shortcut(x) + branch(x).
    - Batch norm in the branch sees the whole batch, and every parameter gets a gradient, in every step.

    Args:
        survival: p in [0, 1].
        granularity: `block` or `row`.
        rescale: `test`, `train` or `none`, as in `residrop.StochasticDepth`.
        scope: see `Rule`.
    """

    def __init__(
        self,
        survival: float,
        granularity: Literal["block", "row"] = "block",
        rescale: Rescale = "test",
        scope: Scope | None = None,
    ) -> None:
        check_choice("granularity", granularity, Literal["block", "row"])
        check_choice("rescale", rescale, Rescale)
        super().__init__((check_rate("survival", survival),), granularity, scope)
        self.rescale: Rescale = rescale

    @property
    def site(self) -> Site:
        return Site(self.rates, "number" if self.granularity == "block" else "unit", self.scope)

    def cuts_rows(self) -> bool:
        return False

    def is_plain_sum(self) -> bool:
        if self.is_traced() or self.executor is not EAGER:
            return False
        factor = self.factor(0)
        return not isinstance(factor, Tensor) and factor == 1.0

    def factor(self, total: int) -> float | Tensor:
        """What the branch is multiplied by in this pass: one number, or float64 Tensor[total] on the CPU.

        Args:
            total: rows of the batch.
        """
        draw = self.draw()
        p = draw.rates[0]
        if draw.expected:
            return p if self.rescale == "test" else 1.0
        if p in (0.0, 1.0):
            return p
        assert draw.key is not None
        gain = 1.0 / p if self.rescale == "train" else 1.0
        mean, spread = gain * p, gain * math.sqrt(p * (1.0 - p))
        if self.granularity == "row":
            return mean + spread * row_normal(total, draw.key)
        # 52 bits and a half: the ends 0 and 1, which have no quantile, cannot be reached by rounding
        return mean + spread * _NORMAL.inv_cdf(((derive_key(draw.key, 1) >> 12) + 0.5) * 2.0**-52)

    def forward(
        self, x: Tensor, shortcut: Map, branch: Map, *, post: Map | None = None, along: Sequence[Any] = ()
    ) -> Tensor:
        call = BranchCall(shortcut, branch, post, along)
        if self.is_traced():
            from residrop.rules import tracing

            factor: float | Tensor | None = tracing.in_python(self._as_data, x)
        else:
            factor = self.factor(x.shape[0])
            if not isinstance(factor, Tensor) and factor != 0.0:
                return self.executor.present(x, call, factor)
        if not isinstance(factor, Tensor):  # 0
            y = shortcut(x)
            if self.tosses() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                y = with_zero_gradients(x, y, call)  # engines that do not know of p = 0 wait for its gradients
        elif factor.ndim == 0:
            y = combined(shortcut(x), branch(x, *along), factor)
        else:
            y = _by_rows(shortcut(x), self.executor.part(branch, x, along), factor)
        return call.finished(y)

    def _as_data(self, x: Tensor) -> Tensor | None:
        """The factor for a graph, which would be compiled anew for every number; None is 0."""
        factor = self.factor(x.shape[0])
        if isinstance(factor, Tensor):
            return factor
        return None if factor == 0.0 else torch.tensor(factor, dtype=torch.float64)

    def extra_repr(self) -> str:
        return f"{self.rates[0]!r}, granularity={self.granularity!r}, rescale={self.rescale!r}"


def _by_rows(skip: Tensor, out: Tensor, factors: Tensor) -> Tensor:
    """skip + factors[i] * out[i] for every row i; the product is rounded once, also in half precision."""
    wide = torch.promote_types(out.dtype, torch.float32)
    column = factors.to(device=out.device, dtype=wide, non_blocking=True).view(-1, *[1] * (out.ndim - 1))
    return skip + (out * column).to(out.dtype)
