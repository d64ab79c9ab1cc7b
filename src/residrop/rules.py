"""Rules: how a block's shortcut and branch are combined in training, at test time and when sampling.

A rule has no parameters and no state of its own but its rates. It receives the shortcut and the branch as callables,
so that it can leave the branch uncalled; nothing else in residrop may. What a rule does in a pass is decided by its
draw: coins in training (and inside `residrop.sampling`), expectation in `eval()`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from residrop import functional
from residrop.errors import ConfigError, PlanError
from residrop.rows import Lane, combined, keep_index, keep_rows
from residrop.sampler import DepthSampler, Draw, Granularity, Scope, Site
from residrop.survival import check_rate
from residrop.touch import touch

__all__ = [
    "ConstantDepth",
    "DepthDropout",
    "Rule",
    "StochasticDepth",
]

Rescale = Literal["test", "train", "none"]
Map = Callable[..., Tensor]
_IDENTITY = nn.Identity()


def _after(post: Map | None, y: Tensor) -> Tensor:
    return y if post is None else post(y)


def check_choice(name: str, value: str, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}")


class Rule(nn.Module, ABC):
    """Base of all rules: `forward(x, shortcut, branch)` reads the draw and combines.

    Attributes:
        rates: survival rates or thetas, one per coin of the rule, in [0, 1]; `residrop.set_survival` changes them.
        granularity: what one coin decides: `block`, `row` or `unit`.
        scope: whether ranks of a distributed run share the draw; default `shared` for blocks, `per_rank` otherwise.
        earlier: how many earlier outputs of its stage, besides the block's input, the rule combines (`units.Mix`).
    """

    earlier: int = 0

    def __init__(
        self, rates: tuple[float, ...], granularity: Granularity = "block", scope: Scope | None = None
    ) -> None:
        super().__init__()
        check_choice("granularity", granularity, Granularity)
        self.rates = rates
        self._random = len(rates) > 0  # a compiler that reads the rates themselves makes a graph for each
        self.granularity: Granularity = granularity
        self.scope: Scope = ("shared" if granularity == "block" else "per_rank") if scope is None else scope
        check_choice("scope", self.scope, Scope)
        self._sampler: DepthSampler | None = None
        self._index = -1
        self.compiled: Any = None

    @property
    def site(self) -> Site:
        """What the sampler needs to know of this rule."""
        return Site(self.rates, self.granularity, self.scope)

    def join(self, sampler: DepthSampler, index: int) -> None:
        """Take draws from place `index` of `sampler`'s plans (called by `residrop.attach`)."""
        self._sampler, self._index = sampler, index

    def leave(self) -> None:
        """Take no draws any more (called by `residrop.attach` and `detach`)."""
        self._sampler, self._index = None, -1

    @property
    def sampler(self) -> DepthSampler | None:
        """The sampler this rule takes its draws from; None before `residrop.attach`."""
        return self._sampler

    @property
    def index(self) -> int:
        """The rule's place in the sampler's plans."""
        return self._index

    def tosses(self) -> bool:
        """Whether coins are tossed in this pass; elsewhere expectation takes their place."""
        if not self._random:
            return False
        return self.training or (self._sampler is not None and self._sampler.in_force.always)

    def deferred(self) -> bool:
        """Whether `torch.compile` traces a pass with coins, which its graphs must not know (`residrop.tracing`)."""
        return torch.compiler.is_compiling() and self.tosses()

    def cuts_rows(self) -> bool:
        """Whether only some rows of the batch, as tensors of their own, may enter the branch in this pass."""
        return self.granularity == "row" and (self.deferred() or self.draw().key is not None)

    def draw(self) -> Draw:
        """The draw in force for this pass."""
        if self.deferred():
            from residrop import tracing

            return tracing.draw(self)
        if self._sampler is not None:
            # inside a backward pass this forward is a recomputation, which must repeat the draw of its original
            recomputing = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
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

    def as_built(self) -> bool:
        """Whether this pass is exactly shortcut(x) + branch(x), the block without a rule."""
        return False

    def _called(self, branch: Map, x: Tensor, along: Sequence[Any]) -> Tensor:
        return branch(x, *along) if self.compiled is None else self.compiled.part(branch, x, along)

    def _whole(
        self,
        x: Tensor,
        shortcut: Map,
        branch: Map,
        scale: float,
        includes_input: bool,
        post: Map | None,
        along: Sequence[Any],
    ) -> Tensor:
        """A block whose branch is present for all rows."""
        if self.compiled is not None:
            return self.compiled.present(x, shortcut, branch, scale, includes_input, post, along)
        return _after(post, combined(shortcut(x), branch(x, *along), scale, includes_input))

    def around(self, x: Tensor, block: Map, along: Sequence[Any] = ()) -> Tensor:
        """The same for a block that has a shortcut of its own: its branch is block(x, *along) - x, the shortcut x."""
        return self(x, _IDENTITY, lambda x, *along: block(x, *along) - x, along=along)

    @abstractmethod
    def forward(
        self, x: Tensor, shortcut: Map, branch: Map, *, post: Map | None = None, along: Sequence[Any] = ()
    ) -> Tensor:
        """Combine `shortcut(x)` and, where the draw says so, `branch(x)`; both Tensor[N, ...] of one shape.

        Args:
            x: Tensor[N, ...].
            shortcut: always called, on all of x.
            branch: called as `branch(x, *along)`, on live rows only, or not at all.
            post: applied to the result. It may be left out where the branch is absent, so what the shortcut gives must
                be a fixed point of it (as a ReLU's input is that is not negative).
            along: further arguments of the branch; tensors in them have the batch dimension first.
        """

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compiled": None}  # as of any module that was compiled in place

    def extra_repr(self) -> str:
        return ", ".join(map(repr, self.rates))


class ConstantDepth(Rule):
    """shortcut(x) + branch(x) in every mode: the plain residual block. It has no coins."""

    def __init__(self) -> None:
        super().__init__(())

    def as_built(self) -> bool:
        return self.compiled is None

    def forward(
        self, x: Tensor, shortcut: Map, branch: Map, *, post: Map | None = None, along: Sequence[Any] = ()
    ) -> Tensor:
        return self._whole(x, shortcut, branch, 1.0, False, post, along)


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
        check_choice("granularity", granularity, Literal["block", "row"])
        check_choice("rescale", rescale, Rescale)
        check_choice("rows", rows, Literal["window", "bernoulli"])
        if rows != "window" and granularity != "row":
            raise ConfigError(
                f"rows is {rows!r}, which a {granularity}-level rule has no use for; set granularity='row'"
            )
        super().__init__((check_rate("survival", survival),), granularity, scope)
        self.rescale: Rescale = rescale
        self.rows: Literal["window", "bernoulli"] = rows

    def forward(
        self, x: Tensor, shortcut: Map, branch: Map, *, post: Map | None = None, along: Sequence[Any] = ()
    ) -> Tensor:
        return self._present(x, shortcut, branch, False, post, along)

    def carried(self, x: Tensor, shortcut: Map, branch: Map, post: Map | None, lane: Lane) -> Tensor:
        """As `forward`, for a batch that only the blocks of a chain see (`residrop.rows.Lane`)."""
        draw = self.draw()
        if self.rows == "window" and draw.alive is None and not draw.expected:
            rows = draw.rows(x.shape[0])
            if rows.live == 0 and isinstance(shortcut, nn.Identity) and not self.lives_elsewhere():
                return x
            if rows.live > 0:
                return keep_rows(x, shortcut, self._on_rows(branch, x), rows, self.scale(draw), post=post, lane=lane)
        return self._present(lane.settle(x), shortcut, branch, False, post, ())

    def around(self, x: Tensor, block: Map, along: Sequence[Any] = ()) -> Tensor:
        return self._present(x, _IDENTITY, block, True, None, along)

    def _present(
        self,
        x: Tensor,
        shortcut: Map,
        branch: Map,
        includes_input: bool,
        post: Map | None,
        along: Sequence[Any],
    ) -> Tensor:
        if self.deferred():
            from residrop import tracing

            return tracing.present(self, x, shortcut, branch, includes_input, post, along)
        draw = self.draw()
        scale = self.scale(draw)
        if draw.alive is False:
            return self._absent(x, shortcut, branch, along)
        if draw.alive or draw.expected:
            return shortcut(x) if scale == 0.0 else self._whole(x, shortcut, branch, scale, includes_input, post, along)
        run = self._on_rows(branch, x)
        options: dict[str, Any] = {"post": post, "along": along, "includes_input": includes_input}
        if self.rows == "bernoulli":
            assert draw.key is not None
            live = functional.row_mask(x.shape[0], draw.rates[0], draw.key).nonzero().squeeze(1)
            if live.numel() > 0:
                return keep_index(x, shortcut, run, live.to(x.device), scale, **options)
        elif (rows := draw.rows(x.shape[0])).live > 0:
            return keep_rows(x, shortcut, run, rows, scale, **options)
        return self._absent(x, shortcut, branch, along)

    def _on_rows(self, branch: Map, x: Tensor) -> Map:
        """The branch for some rows of x."""
        return branch if self.compiled is None else self.compiled.on_rows(branch, self.fixed(x.shape[0]))

    def as_built(self) -> bool:
        if self.deferred() or self.compiled is not None:
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

    def _absent(self, x: Tensor, shortcut: Map, branch: Map, along: Sequence[Any]) -> Tensor:
        return touch(x, shortcut(x), branch, along) if self.lives_elsewhere() else shortcut(x)

    def fixed(self, total: int) -> bool:
        """Whether the same number of rows of a batch of `total` lives in every step."""
        steady = self._sampler is not None and self._sampler.schedule.timing.steady
        return steady and (self.rates[0] * total) % 1.0 == 0.0

    def lives_elsewhere(self) -> bool:
        """Whether a branch that is absent here may be present on another rank of this step."""
        return self.scope == "per_rank" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def extra_repr(self) -> str:
        rows = f", rows={self.rows!r}" if self.granularity == "row" else ""
        return f"{self.rates[0]!r}, granularity={self.granularity!r}, rescale={self.rescale!r}{rows}"


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
