"""The rule of presence in backward only."""

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from residrop.common.checks import check_choice
from residrop.common.errors import ConfigError
from residrop.functional.backward_only import Piece, joined, pieces_of, recorded
from residrop.functional.call import BranchCall
from residrop.functional.zero_gradients import with_zero_gradients
from residrop.rules.depth import StochasticDepth
from residrop.schedule.sampler import Draw, Rows, Scope

__all__ = ["BackwardDepth"]


class BackwardDepth(StochasticDepth):
    """Every branch is computed; an absent one is not differentiated (DropBP, Woo et al. 2024, arXiv 2402.17812).

    - Training: shortcut(x) + branch(x), whatever is drawn, so that the loss is that of the whole network. An absent
      branch keeps nothing for backward, and the gradient goes past it through the shortcut alone. Its parameters get
      none (`grad is None`), so optimizers leave them alone. Batch norm takes statistics in every forward.
    - Test, and sampled passes (`residrop.sampling`): shortcut(x) + branch(x). There is nothing random to average.
    - Cost: a branch costs its forward in every step, and with probability p its backward, which is about twice that,
      and the memory that it keeps for it.
    - Draws: as `StochasticDepth` has them; rows live in windows.

    What the estimator's bias is: with J_l the Jacobian of branch l, prod_l (I + b_l J_l^T) g arrives at the input. With
    independent coins its mean is prod_l (I + p_l J_l^T) g under `rescale="none"`: a path through k branches counts by
    the product of their p, and the parameters of branch l get p_l times the gradient of a network whose later branches
    are damped so. Under `rescale="train"` the gradient for a present branch is multiplied by 1/p_l: then the mean is
    the gradient of the whole network, exactly, while the variance grows with 1/p. Coupled coins have other means.

    In eval mode under a plan that is given (`residrop.using`) an absent branch is left out, as one of stochastic depth
    is, never rescaled: for measurements of what a branch does, costs and loss.

    Args:
        survival: p in [0, 1], the probability that the branch is differentiated.
        granularity: `block` or `row`. A branch with batch norm, which takes statistics of the whole batch, cannot be
            run for some rows at a time: `residrop.attach` and `apply` refuse it at row level.
        rescale: `none` (the paper) or `train`, see above.
        scope: see `Rule`.
    """

    runs_absent = True

    def __init__(
        self,
        survival: float,
        granularity: Literal["block", "row"] = "block",
        rescale: Literal["none", "train"] = "none",
        scope: Scope | None = None,
    ) -> None:
        if rescale == "test":
            raise ConfigError(
                "rescale is 'test', and forwards of BackwardDepth are whole, so there is nothing to rescale at test "
                "time; use 'none' or 'train'"
            )
        check_choice("rescale", rescale, Literal["none", "train"])
        super().__init__(survival, granularity, rescale, scope=scope)

    def check_parts(self, parts: Iterable[object]) -> None:
        modules = (one for part in parts if isinstance(part, nn.Module) for one in part.modules())
        norm = next((one for one in modules if isinstance(one, _BatchNorm)), None)
        if self.granularity == "row" and norm is not None:
            raise ConfigError(
                f"BackwardDepth runs the live rows of a branch apart from the others, and {type(norm).__name__} takes "
                "statistics of the whole batch; use granularity='block'"
            )

    def scale(self, draw: Draw) -> float:
        """Factor of the gradient of a branch that is present; forwards are never rescaled."""
        return super().scale(draw) if self.training else 1.0

    def _present(self, x: Tensor, call: BranchCall) -> Tensor:
        if not self.training:
            return super()._present(x, call)
        if self.is_traced():
            from residrop.rules import tracing

            return tracing.backward_only(self, x, call)
        pieces = self.pieces(x, call)
        if pieces is None:
            return self.executor.present(x, call, 1.0)
        return self.joined(x, call, pieces, [self._out(x, call, piece) for piece in pieces])

    def pieces(self, x: Tensor, call: BranchCall) -> list[Piece] | None:
        """The batch in parts that are differentiated and parts that are not; None if the block is an ordinary one."""
        draw, total = self.draw(), x.shape[0]
        if draw.expected or draw.alive is not None:
            rows = Rows(0, 0 if draw.alive is False else total)
        else:
            rows = draw.rows(total)
        return None if rows.live == total > 0 and self.scale(draw) == 1.0 else pieces_of(x, call, rows)

    def _out(self, x: Tensor, call: BranchCall, piece: Piece) -> Tensor:
        with recorded(piece.present):
            if piece.window is None:
                return self.executor.part(call.branch, piece.x, piece.along)
            return self.executor.on_rows(call.branch, self.fixed(x.shape[0]))(piece.x, *piece.along)

    def joined(self, x: Tensor, call: BranchCall, pieces: Sequence[Piece], outs: Sequence[Tensor]) -> Tensor:
        """The block's result, from what its branch gave for the pieces."""
        y = joined(x, call, pieces, outs, self.scale(self.draw()))
        if self.may_live_on_other_ranks() and not any(piece.present for piece in pieces):
            return with_zero_gradients(x, y, call)
        return y
