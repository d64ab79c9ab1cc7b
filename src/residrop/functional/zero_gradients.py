"""Branches that are absent here and present on another rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from residrop.functional.call import BranchCall, Map

__all__ = ["with_zero_gradients"]


class _ZeroGradients(torch.autograd.Function):
    """x, and zero gradients for what `out` was computed from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor) -> Tensor:
        ctx.like = (out.shape, out.dtype, out.device)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return grads[0], torch.zeros(shape, dtype=dtype, device=device)


def with_zero_gradients(x: Tensor, skip: Tensor, call: BranchCall) -> Tensor:
    """skip, with a branch that is absent here run all the same, on one row, in eval mode, for gradients of zero.

    For draws that differ between ranks: a branch that lives on another rank takes part in that rank's collectives (of
    gradients, of sharded parameters), so it has to run here, too.
    """
    along = call.cut_along(lambda tensor: tensor[:1])
    row = x[:1].detach().requires_grad_(x.requires_grad)  # an overflow in the branch must not reach x as 0 * inf
    with _norms_in_eval(call.branch):
        out = call.branch(row, *along)
    return _ZeroGradients.apply(skip, out)  # pyright: ignore[reportReturnType]


@contextmanager
def _norms_in_eval(branch: Map) -> Iterator[None]:
    """One row that counts for nothing must not move the statistics of batch norm."""
    owner = branch if isinstance(branch, nn.Module) else getattr(branch, "__self__", None)
    modules = owner.modules() if isinstance(owner, nn.Module) else ()
    norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    try:
        for norm in norms:
            norm.training = False
        yield
    finally:
        for norm in norms:
            norm.training = True
