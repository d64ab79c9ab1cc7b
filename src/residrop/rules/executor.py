"""How a block is run once its rule has decided what is present: as it is, compiled, or replayed from a CUDA graph."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from residrop.functional.call import BranchCall, Map

__all__ = ["EAGER", "Executor"]


class Executor:
    """Runs the parts of a block as they are. Engines put another one into `Rule.executor`."""

    def present(self, x: Tensor, call: BranchCall, scale: float) -> Tensor:
        """The block for all rows of x: Tensor[N, ...]; `scale` is the factor of the branch."""
        return call.whole(x, scale)

    def part(self, branch: Map, x: Tensor, along: Sequence[Any]) -> Tensor:
        """branch(x, *along)."""
        return branch(x, *along)

    def on_rows(self, branch: Map, fixed: bool) -> Map:
        """`branch` for the live rows of a batch, the number of which varies from step to step unless it is `fixed`."""
        return branch


EAGER = Executor()
