"""Rules: how a block's shortcut and branch are combined in training, at test time and when sampling.

A rule has no parameters and no state of its own but its rates. It receives the shortcut and the branch as callables,
so that it can leave the branch uncalled; nothing else in residrop may. What a rule does in a pass is decided by its
draw: coins in training (and inside `residrop.sampling`), expectation in `eval()`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from residrop.common.checks import check_choice
from residrop.common.errors import PlanError
from residrop.functional.call import Map
from residrop.rules.executor import EAGER, Executor
from residrop.schedule.sampler import DepthSampler, Draw, Granularity, Scope, Site

__all__ = ["Rescale", "Rule"]

Rescale = Literal["test", "train", "none"]
_IDENTITY = nn.Identity()


class Rule(nn.Module, ABC):
    """Base of all rules: `forward(x, shortcut, branch)` reads the draw and combines.

    Attributes:
        rates: survival rates or thetas, one per coin of the rule, in [0, 1]; `residrop.set_survival` changes them.
        granularity: what one coin decides: `block`, `row` or `unit`.
        scope: whether ranks of a distributed run share the draw; default `shared` for blocks, `per_rank` otherwise.
        earlier: how many earlier outputs of its stage, besides the block's input, the rule combines (`units.Mix`).
        repeat: how often the branch is applied (`units.Mix`).
        rows: how live rows are chosen, for rules that may cut a batch; None for others.
        fewest: number of rows that live at least where any do; `residrop.attach` makes it 2 where the branch has a norm
            that one row may be too few for.
        rescale: who multiplies the branch by p or 1/p, see `StochasticDepth`.
        runs_absent: whether a training forward computes absent branches, too (`BackwardDepth`).
    """

    earlier: int = 0
    repeat: int = 1
    rows: Literal["window", "bernoulli"] | None = None
    fewest: int = 1
    rescale: Rescale = "none"
    runs_absent: bool = False

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

    @property
    def executor(self) -> Executor:
        """What runs the parts that are present; engines replace it."""
        # torch 2.9 exports no module that reads an object from its class, but follows a property
        return self.__dict__.get("_executor", EAGER)

    @executor.setter
    def executor(self, executor: Executor) -> None:
        self._executor = executor

    @property
    def site(self) -> Site:
        """What the sampler needs to know of this rule."""
        return Site(self.rates, self.granularity, self.scope, self.fewest, self.runs_absent)

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

    def is_traced(self) -> bool:
        """Whether `torch.compile` traces a pass with coins, which its graphs must not know (see `tracing`)."""
        return torch.compiler.is_compiling() and self.tosses()

    def cuts_rows(self) -> bool:
        """Whether only some rows of the batch, as tensors of their own, may enter the branch in this pass."""
        return self.granularity == "row" and (self.is_traced() or self.draw().key is not None)

    def draw(self) -> Draw:
        """The draw in force for this pass."""
        if self.is_traced():
            from residrop.rules import tracing

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

    def check_parts(self, parts: Iterable[object]) -> None:
        """ConfigError if the rule is not right for a branch with these modules and parameters (called by `attach`)."""

    def branch_rate(self, rates: tuple[float, ...]) -> float:
        """Probability that the branch (or a unit of it) is present under these rates of the rule."""
        return rates[0] if rates else 1.0

    def presence(self, draw: Draw) -> float:
        """Share of the branch that is present under a draw: 0 or 1 for block-level coins, else the rate."""
        return float(draw.alive) if draw.alive is not None else self.branch_rate(draw.rates or self.rates)

    def is_plain_sum(self) -> bool:
        """Whether this pass is exactly shortcut(x) + branch(x), the block without a rule."""
        return False

    def forward_block(self, x: Tensor, block: Map, along: Sequence[Any] = ()) -> Tensor:
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
        state = super().__getstate__()
        state.pop("_executor", None)  # copies are not compiled, as those of any module that was compiled in place
        return state

    def extra_repr(self) -> str:
        return ", ".join(map(repr, self.rates))
