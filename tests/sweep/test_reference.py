"""The sweep's reference against blocks written out by hand with factors in front of their branches."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from sweep.reference import NoReferenceError, Place, Reference

ONES = (1.0, 1.0)


class Block(nn.Module):
    """A block with two branches, whose factors are known to it: `factors` is all it should take to mask them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)
        self.factors: Sequence[float | Tensor] = ONES


class PreNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.factors[0] * self.attn(self.norm1(x))
        return x + self.factors[1] * self.mlp(self.norm2(x))


class PostNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.factors[0] * self.attn(x) + x)
        return self.norm2(self.factors[1] * self.mlp(x) + x)


class Parallel(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        return x + self.factors[0] * self.attn(y) + self.factors[1] * self.mlp(y)


class SumsInside(Block):
    """A branch with a residual sum of its own, which is none of the block's, and a sum in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y = y + self.attn(y)
        x = x + self.factors[0] * (self.attn(y) + y)
        z = self.factors[1] * self.mlp(self.norm2(x))
        z += x
        return z


class Projected(Block):
    def __init__(self) -> None:
        super().__init__()
        self.downsample = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.downsample(x) + self.factors[0] * self.attn(x)).relu()
        return x + self.factors[1] * self.mlp(x)


class Windows(Block):
    """Attention on windows, two for every row."""

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(6, 2, 4)
        factor = self.factors[0]
        if isinstance(factor, Tensor):
            factor = factor.repeat_interleave(2, 0)
        x = (windows + factor * self.attn(self.norm1(windows))).reshape(x.shape)
        return x + self.factors[1] * self.mlp(self.norm2(x))


KINDS = (PreNorm, PostNorm, Parallel, SumsInside, Projected, Windows)
MASKS = ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.5, 1.0))


def pair(kind: type[Block]) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind()).double(), torch.randn(3, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masks", MASKS)
def test_branches_with_a_factor(kind: type[Block], masks: tuple[float, float]) -> None:
    model, x = pair(kind)
    places = [Place("0", 2, False), Place("1", 2, False)]
    found = Reference(model, lambda: model(x), places).run([*masks, 1.0, 1.0])
    model[0].factors = masks
    torch.testing.assert_close(found, model(x), rtol=0.0, atol=1e-14)
    assert not torch.allclose(found, pair(kind)[0](x))


@pytest.mark.parametrize("kind", KINDS)
def test_branches_with_a_factor_for_every_row(kind: type[Block]) -> None:
    model, x = pair(kind)
    rows = torch.tensor([1.0, 0.0, 1.0]).double(), torch.tensor([0.0, 0.0, 1.0]).double()
    places = [Place("0", 2, False), Place("1", 2, False)]
    found = Reference(model, lambda: model(x), places).run([*(lambda _, r=r: r for r in rows), 1.0, 1.0])
    model[0].factors = [one.reshape(3, 1, 1) for one in rows]
    torch.testing.assert_close(found, model(x), rtol=0.0, atol=1e-14)


def test_whole_blocks() -> None:
    model, x = pair(PreNorm)
    found = Reference(model, lambda: model(x), [Place("0", 1, True), Place("1", 1, True)]).run([0.0, 1.0])
    assert torch.equal(found, model[1](x))


def test_a_block_with_other_sums_than_rules_is_not_compared() -> None:
    model, x = pair(PreNorm)
    reference = Reference(model, lambda: model(x), [Place("0", 3, False)])
    with pytest.raises(NoReferenceError, match="PreNorm has 2 sums of its input, and 3 rules"):
        reference.run([0.0, 1.0, 1.0])


def test_parts_tell_which_sum_is_meant() -> None:
    model, x = pair(PreNorm)
    place = Place("0", 1, False, (("norm2", "mlp"),))
    found = Reference(model, lambda: model(x), [place]).run([0.0])
    model[0].factors = (1.0, 0.0)
    torch.testing.assert_close(found, model(x), rtol=0.0, atol=1e-14)
