"""Rules of whole branches and rows: constant depth, stochastic depth, depth dropout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from residrop import functional
from residrop.common.checks import check_choice, check_rate
from residrop.common.errors import ConfigError, PlanError
from residrop.functional.call import BranchCall, Map
from residrop.functional.rows import InPlaceChain, keep_index, keep_rows
from residrop.functional.zero_gradients import with_zero_gradients
from residrop.rules.base import Rescale, Rule
from residrop.rules.executor import EAGER
from residrop.schedule.sampler import Draw, Scope

__all__ = ["ConstantDepth", "DepthDropout", "StochasticDepth"]

_IDENTITY = nn.Identity()


class ConstantDepth(Rule):
    """shortcut(x) + branch(x) in every mode: the plain residual block. It has no coins."""

    def __init__(self) -> None:
        super().__init__(())

    def is_plain_sum(self) -> bool:
        return self.executor is EAGER

    def forward(
        self, x: Tensor, shortcut: Map, branch: Map, *, post: Map | None = None, along: Sequence[Any] = ()
    ) -> Tensor:
        return self.executor.present(x, BranchCall(shortcut, branch, post, along), 1.0)


class StochasticDepth(Rule):
    """The branch is present with probability p, for the whole mini-batch or for every row (Huang et al. 2016, eq. 2).

    - Drawn: one coin per mini-batch (`block`), or per row. Rows live in a random wrapping window of p * n rows rounded
      at random (`rows="window"`), or by one coin each (`rows="bernoulli"`). Where p * n < 2 and the branch has batch
      norm, a window has 2 rows, with probability p * n / 2, or none: one row may be too few for the norm.
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
        check_choice("granularity", granularity, Literal["block", "row"])
        check_choice("rescale", rescale, Rescale)
        check_choice("rows", rows, Literal["window", "bernoulli"])
        if rows != "window" and granularity != "row":
            raise ConfigError(
                f"rows is {rows!r}, which a {granularity}-level rule has no use for; set granularity='row'"
            )
        super().__init__((check_rate("survival", survival),), granularity, scope)
        self.rescale: Rescale = rescale
        self.rows = rows

    def forward(
        self, x: Tensor, shortcut: Map, branch: Map, *, post: Map | None = None, along: Sequence[Any] = ()
    ) -> Tensor:
        return self._present(x, BranchCall(shortcut, branch, post, along))

    def forward_in_chain(self, x: Tensor, call: BranchCall, chain: InPlaceChain) -> Tensor:
        """As `forward`, for a batch that only the blocks of a chain see (`residrop.functional.rows.InPlaceChain`)."""
        draw = self.draw()
        if self.rows == "window" and draw.alive is None and not draw.expected:
            rows = draw.rows(x.shape[0])
            if rows.live == 0 and isinstance(call.shortcut, nn.Identity) and not self.may_live_on_other_ranks():
                return x
            if rows.live > 0:
                return keep_rows(x, self._on_rows(call, x), rows, self.scale(draw), chain)
        return self._present(chain.release(x), call)

    def forward_block(self, x: Tensor, block: Map, along: Sequence[Any] = ()) -> Tensor:
        return self._present(x, BranchCall(_IDENTITY, block, along=along, includes_input=True))

    def _present(self, x: Tensor, call: BranchCall) -> Tensor:
        if self.is_traced():
            from residrop.rules import tracing

            return tracing.present(self, x, call)
        draw = self.draw()
        scale = self.scale(draw)
        if draw.alive is False:
            return self._absent(x, call)
        if draw.alive or draw.expected:
            return call.shortcut(x) if scale == 0.0 else self.executor.present(x, call, scale)
        if self.rows == "bernoulli":
            assert draw.key is not None
            live = functional.row_mask(x.shape[0], draw.rates[0], draw.key).nonzero().squeeze(1)
            if live.numel() > 0:
                with _explaining_one_row(live.numel() == 1 < x.shape[0]):
                    return keep_index(x, self._on_rows(call, x), live.to(x.device), scale)
        elif (rows := draw.rows(x.shape[0])).live > 0:
            return keep_rows(x, self._on_rows(call, x), rows, scale)
        return self._absent(x, call)

    def _on_rows(self, call: BranchCall, x: Tensor) -> BranchCall:
        """The block, with its branch for some rows of x."""
        if self.executor is EAGER:
            return call
        return call._replace(branch=self.executor.on_rows(call.branch, self.fixed(x.shape[0])))

    def is_plain_sum(self) -> bool:
        if self.is_traced() or self.executor is not EAGER:
            return False
        draw = self.draw()
        present = draw.expected or draw.alive or (draw.alive is None and draw.rates[0] == 1.0)
        return present and self.scale(draw) == 1.0

    def scale(self, draw: Draw) -> float:
        """Factor of a branch that is present: p at test under `rescale="test"`, 1/p in training under `"train"`."""
        survival = draw.rates[0]
        if draw.expected:
            return survival if self.rescale == "test" else 1.0
        return 1.0 / survival if self.rescale == "train" and survival > 0 else 1.0

    def _absent(self, x: Tensor, call: BranchCall) -> Tensor:
        y = call.shortcut(x)
        return with_zero_gradients(x, y, call) if self.may_live_on_other_ranks() else y

    def fixed(self, total: int) -> bool:
        """Whether the same number of rows of a batch of `total` lives in every step."""
        steady = self._sampler is not None and self._sampler.schedule.timing.steady
        mean = self.rates[0] * total
        return steady and mean % 1.0 == 0.0 and not 0.0 < mean < min(self.fewest, total)

    def may_live_on_other_ranks(self) -> bool:
        """Whether a branch that is absent here may be present on another rank of this step."""
        return self.scope == "per_rank" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def extra_repr(self) -> str:
        rows = f", rows={self.rows!r}" if self.granularity == "row" else ""
        return f"{self.rates[0]!r}, granularity={self.granularity!r}, rescale={self.rescale!r}{rows}"


@contextmanager
def _explaining_one_row(alone: bool) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if not alone or "more than 1 value per channel" not in str(error):
            raise
        raise PlanError(
            "rows='bernoulli' left one row to a norm that needs two on a map of one pixel; use rows='window', which "
            "leaves such branches none or at least two, or larger batches"
        ) from error


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
