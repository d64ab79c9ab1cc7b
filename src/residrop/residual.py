"""The residual block: the only place where shortcut, branch and rule meet."""

from torch import Tensor, nn

from residrop.rules import ConstantDepth, Rule

__all__ = ["Residual"]


class Residual(nn.Module):
    """y = post(rule(x, shortcut, branch)).

    Args:
        branch: the costly function F, Tensor[N, ...] to Tensor[N, ...]; knows nothing of rules.
        shortcut: the always-present path with the branch's output shape; None is the identity.
        rule: how the two are combined; None is `ConstantDepth()`.
        post: applied to the result; None is nothing.
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        rule: Rule | None = None,
        post: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.rule = ConstantDepth() if rule is None else rule
        self.post = nn.Identity() if post is None else post
        self._in_place = any(getattr(module, "inplace", False) for module in self.post.modules())

    def forward(self, x: Tensor) -> Tensor:
        y = self.rule(x, self.shortcut, self.branch)
        if y is x and self._in_place:  # a dead block gives its input back, which is not ours to overwrite
            y = x.clone()
        return self.post(y)
