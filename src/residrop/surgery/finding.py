"""Which modules of a model are its residual blocks.

A module is one if its forward adds a function of a value to that value (see `surgery.reading`), and what is added holds
most of its weights. Of modules within each other those are taken that stand in lists: the layers of an encoder rather
than the encoder, and the layers rather than what is inside of them. A module that stands alone and is named after its
embedding adds positions to it.
"""

from collections import Counter
from collections.abc import Container, Iterator
from typing import Any

from torch import nn

from residrop.blocks.skippable import parameters_of
from residrop.surgery.blocks import AppliedBlock
from residrop.surgery.generic import GenericBlock
from residrop.surgery.read_block import ReadBlock, mixin_of
from residrop.surgery.reading.questions import part_at
from residrop.surgery.reading.read import read
from residrop.surgery.streams import stream_mixin

__all__ = ["as_whole", "candidates", "inside_branches", "named"]

_LEAST_SHARE = 0.5  # of a block's parameters that its branches hold
_LEAST_SHARE_OF_ENDING = 0.2  # the same where the block returns its last sum
_NEARLY_ALL = 0.9
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_TORCH = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # of torch's own layers those that are blocks


def candidates(
    model: nn.Module, names: dict[nn.Module, str], drops: Container[nn.Module]
) -> tuple[dict[nn.Module, type[AppliedBlock]], list[tuple[str, str]]]:
    """The residual blocks of a model, each with what takes the place of its forward, in the order of its modules.

    Args:
        model: any model.
        names: its modules with their names.
        drops: modules that are blocks in any case.

    Returns:
        The blocks; and (name, why) of modules of the same classes that are none.
    """
    times = Counter(map(type, names))
    listed = {part for one in names if isinstance(one, _LISTS) for part in one.modules()}
    chosen = {
        block: mixin
        for block, mixin, _ in _found(model, drops, listed=False, root=True)
        if block in listed or times[type(block)] > 1 or "Embed" not in type(block).__name__
    }
    kinds = {type(block) for block in chosen}
    inside = {part for block in chosen for part in block.modules()}
    left = [
        (name, "it has no residual sum (blocks that change the stride or the width often have none)")
        for module, name in names.items()
        if type(module) in kinds and module not in inside
    ]
    return {block: chosen[block] for block in names if block in chosen}, left


def _found(
    module: nn.Module, drops: Container[nn.Module], *, listed: bool, root: bool = False
) -> list[tuple[nn.Module, type[AppliedBlock], bool]]:
    """The blocks in a module (or the module itself), each with whether it stands in a list."""
    inner = [one for child in module.children() for one in _found(child, drops, listed=isinstance(module, _LISTS))]
    if root or isinstance(module, _LISTS):
        return inner
    if module in drops:
        return [(module, GenericBlock, listed)]
    mixin = _mixin(module)
    if mixin is None:
        return inner
    within = [block for block, _, in_list in inner if in_list]
    if len(within) > 1 and (
        _size(within) >= _LEAST_SHARE * _size([module])
        or _outside(module, mixin, within) >= _LEAST_SHARE * _size(within)
    ):
        return inner
    return [(module, mixin, listed)]


def _outside(module: nn.Module, mixin: type[AppliedBlock], blocks: list[nn.Module]) -> int:
    """How many parameters of inner blocks are in no branch of the module around them."""
    covered = {id(one) for _, part in inside_branches(module, mixin) for one in part.parameters()}
    return sum(one.numel() for one in parameters_of(blocks) if id(one) not in covered)


def _mixin(module: nn.Module) -> type[AppliedBlock] | None:
    """What takes the place of a module's forward if it is a residual block; None if it is none."""
    if type(module).__module__.startswith("torch.") and not isinstance(module, _TORCH):
        return None
    if next(module.parameters(), None) is None or next(module.children(), None) is None:
        return None
    reading = read(module)
    entire = whole_mixin(module)
    if not reading.branches:
        return entire if _weighs(module) else None
    parts = [part_at(module, path) for branch in reading.branches for path in branch.paths]
    share = _size([part for part in parts if part is not None]) / _size([module])
    one_coin = len(reading.branches) == 1 or sum(one is not None for one in reading.streams) > 1
    if entire is not None and (share < _LEAST_SHARE or (one_coin and share < _NEARLY_ALL)):
        return entire  # the same law where there is one branch, and more is left out with it
    if share >= _LEAST_SHARE or (reading.branches[-1].last and share >= _LEAST_SHARE_OF_ENDING):
        return mixin_of(module)
    return None


def _weighs(module: nn.Module) -> bool:
    """Whether there are weights of layers in a module, rather than of norms and activations (x + sin(ax)^2 / a)."""
    return any(one.numel() > max(one.shape, default=1) for one in module.parameters())


def whole_mixin(module: nn.Module) -> type[AppliedBlock] | None:
    """What takes the place of a module's forward if what it returns is its input and sums over it."""
    streams = read(module).streams
    if not any(streams):
        return None
    return GenericBlock if sum(one is not None for one in streams) == 1 else stream_mixin(streams)


def named(block: nn.Module) -> type[AppliedBlock]:
    """What takes the place of the forward of a block that a user has named."""
    if isinstance(block, _LISTS):
        return GenericBlock
    return _mixin(block) or GenericBlock


def as_whole(mixin: type[AppliedBlock]) -> type[AppliedBlock]:
    """The same for the block as a whole."""
    if issubclass(mixin, ReadBlock):
        streams = mixin.residrop_reading.streams
        return stream_mixin(streams) if sum(one is not None for one in streams) > 1 else GenericBlock
    return mixin


def inside_branches(block: nn.Module, mixin: type[AppliedBlock]) -> Iterator[tuple[int, Any]]:
    """The modules of a block's branches, each with the number of its branch."""
    if not issubclass(mixin, ReadBlock):
        yield from ((0, module) for module in block.modules())
        return
    for number, branch in enumerate(mixin.residrop_reading.branches):
        for path in branch.paths:
            part = part_at(block, path)
            if isinstance(part, nn.Module):
                yield from ((number, module) for module in part.modules())


def _size(parts: Any) -> int:
    return sum({id(one): one.numel() for one in parameters_of(list(parts))}.values())
