"""The fully connected residual network in which stochastic depth is analysed (Hayou & Ayed, Sec. 2)."""

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from residrop.blocks.residual import Chain, Residual
from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError
from residrop.models.blocks import Scale
from residrop.models.checks import complete_rules
from residrop.rules.base import Rule

__all__ = ["Vanilla"]


class Vanilla(nn.Module):
    """`y_0 = W_0 x`, `y_l = y_{l-1} + delta_l W_l relu(y_{l-1})` for l = 1..L, `y_out = W_out y_L` (eq. 1).

    No bias and no normalisation anywhere. With N = `width`: W_l ~ N(0, 2/N), W_out ~ N(0, 1/N),
    W_0 ~ N(0, 1/in_features). The ReLU comes before the matrix, as in Sec. 2 and the proofs; Sec. 6 of the paper says
    the reverse. The defaults are the paper's regression task, from R^256 to one number.

    `Tensor[n, ...]` with `in_features` numbers a row becomes `Tensor[n, out_features]`.

    Args:
        depth: number of blocks L.
        width: N, the same in every block.
        in_features: numbers in one row of the input, flattened.
        out_features: numbers in one row of the output.
        stable: multiplies every branch by 1 / sqrt(L) (eq. 3).
        rules: one rule per block, input to output; None keeps every block.
    """

    def __init__(
        self,
        depth: int,
        *,
        width: int = 512,
        in_features: int = 256,
        out_features: int = 1,
        stable: bool = False,
        rules: Sequence[Rule] | None = None,
    ) -> None:
        super().__init__()
        counts = {"depth": depth, "width": width, "in_features": in_features, "out_features": out_features}
        for option, value in counts.items():
            check_whole(option, value, least=1)
        todo = complete_rules(rules, depth)

        self.in_features = in_features
        self.stem = _gaussian(in_features, width, variance=1 / in_features)
        self.blocks = Chain()
        for number, rule in enumerate(todo, start=1):
            parts: dict[str, nn.Module] = {"relu": nn.ReLU(), "linear": _gaussian(width, width, 2 / width)}
            if stable:
                parts["scale"] = Scale(1 / math.sqrt(depth))
            branch = nn.Sequential(OrderedDict(parts))
            self.blocks.add_module(f"block{number}", Residual(branch, None, rule))
        self.tail = _gaussian(width, out_features, variance=1 / width)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1:].numel() != self.in_features:
            raise ConfigError(
                f"the input has shape {list(x.shape)}; this network reads [n, ...] with {self.in_features} numbers "
                "a row. Build it with in_features=... to change that"
            )
        return self.tail(self.blocks(self.stem(x.flatten(1))))


def _gaussian(n_in: int, n_out: int, variance: float) -> nn.Linear:
    linear = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(linear.weight, std=math.sqrt(variance))
    return linear
