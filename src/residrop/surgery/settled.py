"""Blocks whose last activation may be left out where their branch is absent."""

import sys
from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from residrop.surgery.read_block import ReadBlock
from residrop.surgery.reading.questions import part_at
from residrop.surgery.reading.read import Branching
from residrop.surgery.sites import Found

__all__ = ["mark_settled"]

# networks, their activation before the first stage, what follows it, and the first stage
_STEMS = (
    ("torchvision.models.resnet.ResNet", "_forward_impl", "relu", "maxpool", "layer1"),
    ("timm.models.resnet.ResNet", "forward_features", "act1", "maxpool", "layer1"),
)


def mark_settled(model: nn.Module, found: list[Found]) -> None:
    """Mark the blocks whose input is known to be the output of a ReLU, and which end with one over an identity
    shortcut: where the branch is absent the input is the result, and nothing has to be computed or kept.

    That an input is not negative is seen from where the block stands: behind a block of such an ending in an
    `nn.Sequential`, or first behind the stem of a ResNet. Elsewhere it is not assumed.
    """
    ends = {one.block: last.plain for one in found if (last := _ending_in_relu(one)) is not None}
    for before, block in _neighbours(model):
        if ends.get(block) and (before is None or before in ends):
            block.__dict__["residrop_settled"] = True


def _ending_in_relu(one: Found) -> Branching | None:
    """The last branch of a block that returns what a ReLU makes of its sum."""
    if not issubclass(one.mixin, ReadBlock):
        return None
    last = one.mixin.residrop_reading.branches[-1]
    ends = last.last and bool(last.post) and type(part_at(one.block, last.post)) is nn.ReLU
    return last if ends else None


def _neighbours(model: nn.Module) -> Iterator[tuple[nn.Module | None, nn.Module]]:
    """Modules that get just what the one before gives; None stands for the stem of a ResNet."""
    for module in model.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from pairwise(module)
        for target, forward, act, pool, stage in _STEMS:
            where, _, name = target.rpartition(".")
            known = getattr(sys.modules.get(where), name, None)
            if known is None or not isinstance(module, known):
                continue
            same = getattr(type(module), forward) is getattr(known, forward)
            plain = type(getattr(module, act)) is nn.ReLU
            if same and plain and type(getattr(module, pool)) in (nn.MaxPool2d, nn.Identity):
                yield None, next(iter(getattr(module, stage)))
