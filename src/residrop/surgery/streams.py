"""Whole blocks that update several streams at once, as the double-stream blocks of diffusion transformers do,
or layers that hand more than the hidden state to the next one.

Both streams skip the block together: side by side in one tensor they are x, of which the block gives x + F(x), and that
is how its rule sees it.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from residrop.common.errors import PlanError
from residrop.surgery.blocks import AppliedBlock
from residrop.surgery.generic import GenericBlock, Taken

__all__ = ["StreamBlock", "stream_mixin"]


class StreamBlock(GenericBlock):
    """A block of which several outputs are arguments with something added.

    Attributes:
        residrop_streams: for every output the name of the argument that it is a sum over; None for other outputs.
    """

    residrop_streams: ClassVar[tuple[str | None, ...]]

    def residrop_take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Taken, Callable[[Any], Any]]:
        given = dict(self.residrop_signature.own.bind(*args, **kwargs).arguments)
        for parameter in self.residrop_signature.own.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
            elif parameter.kind is parameter.VAR_POSITIONAL and given.pop(parameter.name, ()):
                raise PlanError(f"{type(self).__name__} of several streams was called with unnamed further arguments")
        names = {
            place: name
            for place, name in enumerate(self.residrop_streams)
            if name is not None and isinstance(given.get(name), Tensor)
        }
        streams: list[Tensor] = [given.pop(name) for name in names.values()]
        if not streams or len({(len(one), one.dtype, one.device) for one in streams}) != 1:
            raise PlanError(
                f"{type(self).__name__} updates several streams at once, which have to be tensors of one dtype and "
                f"batch, but got {', '.join(f'{tuple(one.shape)} {one.dtype}' for one in streams) or 'none'}; leave it "
                "out of `blocks`"
            )
        shapes = [one.shape[1:] for one in streams]
        forward = super(AppliedBlock, self).forward

        def joined(x: Tensor, **others: Any) -> tuple[Any, ...]:
            parts = dict(zip(names.values(), _apart(x, shapes), strict=True))
            out = forward(**parts, **others)
            found = list(out) if isinstance(out, (tuple, list)) else [out]
            y = torch.cat([found[place].flatten(1) for place in names], 1)
            return y, *(one for place, one in enumerate(found) if place not in names)

        def restored(out: tuple[Any, ...]) -> Any:
            y, *others = out
            parts, rest = iter(_apart(y, shapes)), iter(others)
            total = len(names) + len(others)
            return tuple(next(parts) if place in names else next(rest) for place in range(total))

        return Taken(torch.cat([one.flatten(1) for one in streams], 1), (), given, None, joined), restored


def _apart(x: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = x.split([prod(shape) for shape in shapes], 1)
    return [part.unflatten(1, shape) if shape else part[:, 0] for part, shape in zip(parts, shapes, strict=True)]


_MADE: dict[tuple[str | None, ...], type[StreamBlock]] = {}


def stream_mixin(streams: Sequence[str | None]) -> type[StreamBlock]:
    """The mixin for blocks with these streams."""
    key = tuple(streams)
    if key not in _MADE:
        attributes = {
            "residrop_streams": key,
            "residrop_made": (stream_mixin, (key,), {}),
            "__doc__": StreamBlock.__doc__,
        }
        _MADE[key] = type("StreamBlock", (StreamBlock,), attributes)
    return _MADE[key]
