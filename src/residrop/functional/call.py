"""What a block computes, as its rule sees it, and the sum of its two paths."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["BranchCall", "Map", "combined", "scaled"]

Map = Callable[..., Tensor]


class BranchCall(NamedTuple):
    """The parts of a block in one pass.

    Attributes:
        shortcut: Tensor[N, ...] to Tensor[N, ...], always called, on all rows.
        branch: called as branch(x, *along), on all rows, on the live ones only, or not at all.
        post: applied to the result, or None. It may be left out for rows whose branch is absent, so what the shortcut
            gives must be a fixed point of it (as a ReLU's input is that is not negative).
        along: further arguments of the branch; tensors in them have the batch dimension first and are cut like x.
        includes_input: whether `branch` is a block with a shortcut of its own, so that branch(x) - x is meant.
    """

    shortcut: Map
    branch: Map
    post: Map | None = None
    along: Sequence[Any] = ()
    includes_input: bool = False

    def cut_along(self, cut: Callable[[Tensor], Tensor]) -> list[Any]:
        """`along` with every tensor in it cut to the live rows."""
        return [tree_map(lambda leaf: cut(leaf) if isinstance(leaf, Tensor) else leaf, one) for one in self.along]

    def finished(self, y: Tensor) -> Tensor:
        """post(y)."""
        return y if self.post is None else self.post(y)

    def whole(self, x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """The block with its branch, times `scale`, present for all rows of x."""
        return self.finished(combined(self.shortcut(x), self.branch(x, *self.along), scale, self.includes_input))


def combined(skip: Tensor, out: Tensor, scale: float | Tensor, includes_input: bool = False) -> Tensor:
    """skip + scale * F, where `out` is F or, with `includes_input`, skip + F; a `scale` that is data is Tensor[]."""
    if not includes_input:
        product = scaled(out, scale)
        # the product is ours, and a third tensor would cost more than the sum
        if product is not out and _alike(product, skip):
            return product.add_(skip)
        return skip + product
    return out if isinstance(scale, float) and scale == 1.0 else skip + scaled(out - skip, scale)


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.is_nested or b.is_nested:  # torch's fused encoder layers make them in eval mode; they have no sizes to compare
        return False
    return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


def scaled(x: Tensor, factor: float | Tensor) -> Tensor:
    """x * factor in the dtype of x."""
    if isinstance(factor, Tensor):  # in half precision a tensor, unlike a number, would be rounded first
        return (x.to(torch.promote_types(x.dtype, torch.float32)) * factor).to(x.dtype)
    return x if factor == 1.0 else x * factor
