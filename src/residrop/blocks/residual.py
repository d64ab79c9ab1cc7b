"""The residual block: the only place where shortcut, branch and rule meet."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as module_hooks

from residrop.blocks.skippable import Skippable, left_whole
from residrop.functional.call import BranchCall
from residrop.functional.layout import relu_by_signs
from residrop.functional.rows import InPlaceChain
from residrop.rules.base import Rule
from residrop.rules.depth import ConstantDepth, StochasticDepth

__all__ = ["Chain", "Residual", "Shortcut"]


class Residual(Skippable):
    """y = post(rule(x, shortcut, branch)).

    Args:
        branch: the costly function F, Tensor[N, ...] to Tensor[N, ...]; knows nothing of rules.
        shortcut: the always-present path with the branch's output shape; None is the identity.
        rule: how the two are combined; None is `ConstantDepth()`.
        post: applied to the result; None is nothing.
        settled: whether what the shortcut gives is a fixed point of `post`, as a ReLU's input is that is not negative.
            Then `post` is not computed where the branch is absent.
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        rule: Rule | None = None,
        post: nn.Module | None = None,
        *,
        settled: bool = False,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.rule = ConstantDepth() if rule is None else rule
        self.post = nn.Identity() if post is None else post
        self.settled = settled
        self._in_place = any(getattr(module, "inplace", False) for module in self.post.modules())

    def residrop_branches(self) -> Sequence[tuple[Rule, Sequence[nn.Module]]]:
        return [(self.rule, [self.branch])]

    def forward(self, x: Tensor, *earlier: Tensor) -> Tensor:
        """Tensor[N, ...] to Tensor[N, ...]; `earlier` outputs of the stage are for rules that combine them."""
        if isinstance(x, Proxy) and (node := left_whole(self, [self.rule], (x, *earlier), {})) is not None:
            return node
        if isinstance(self.post, nn.Identity):
            return self.rule(x, self.shortcut, self.branch, *earlier)
        if self.settled:
            return self.rule(x, self.shortcut, self.branch, *earlier, post=self.post)
        y = self.rule(x, self.shortcut, self.branch, *earlier)
        if self.rule.cuts_rows() and (z := relu_by_signs(self.post, y)) is not None:
            return z
        if self._in_place and (y is x or y._base is not None):
            y = y.clone()  # a dead block gives its input back (or a view of it), which is not ours to overwrite
        return self.post(y)

    def unobserved(self) -> bool:
        """Whether this is a row-level block and no hook sees its input or output."""
        rule = self.rule
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        return (
            type(rule) is StochasticDepth  # a subclass may have a forward of its own
            and rule.granularity == "row"
            and (self.settled or isinstance(self.post, nn.Identity))
            and not any(hooks)
            and not (rule._forward_hooks or rule._forward_pre_hooks)
        )

    def forward_in_chain(self, x: Tensor, chain: InPlaceChain) -> Tensor:
        """As calling an `unobserved` block, for a batch that only the blocks of a chain see."""
        assert isinstance(self.rule, StochasticDepth)
        post = None if isinstance(self.post, nn.Identity) else self.post
        return self.rule.forward_in_chain(x, BranchCall(self.shortcut, self.branch, post), chain)


class Shortcut(nn.Module):
    """What is left of a residual block without its branch: y = post(shortcut(x))."""

    def __init__(self, block: Residual) -> None:
        super().__init__()
        self.shortcut = block.shortcut
        self.post = nn.Identity() if block.settled else block.post
        self.train(block.training)
        if isinstance(self.shortcut, nn.Identity):
            for module in self.post.modules():  # what comes in is not ours to overwrite
                if hasattr(module, "inplace"):
                    module.inplace = False  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[N, ...] to Tensor[N, ...]."""
        return self.post(self.shortcut(x))


class Chain(nn.Sequential):
    """Blocks one after another, as `nn.Sequential`, that pass a batch on without showing it to anybody else.

    Row-level blocks then write live rows in place. Where somebody may look at what goes from block to block (hooks,
    engines that change the class of a block, compilers), the chain is an ordinary sequence. Blocks whose rule combines
    earlier outputs (`Rule.earlier`) get the last ones of the chain.
    """

    def forward(self, input: Tensor) -> Tensor:
        if any(map(_earlier, self)):
            return self._dense(input)
        if torch.compiler.is_compiling() or _anybody_hooks() or (self.training and isinstance(input, Proxy)):
            return super().forward(input)
        x, chain = input, InPlaceChain()
        for block in self:
            x = (
                block.forward_in_chain(x, chain)
                if type(block) is Residual and block.unobserved()
                else block(chain.release(x))
            )
        return chain.release(x)

    def _dense(self, x: Tensor) -> Tensor:
        """Blocks that also take outputs from before their input: memory for one output a block, as backward keeps."""
        outputs = [x]
        for block in self:
            outputs.append(block(outputs[-1], *outputs[-1 - _earlier(block) : -1]))
        return outputs[-1]


def _earlier(block: nn.Module) -> int:
    return block.rule.earlier if isinstance(block, Residual) else 0


def _anybody_hooks() -> bool:
    names = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(module_hooks, f"_global_{name}") for name in names)
