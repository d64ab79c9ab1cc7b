"""Which rows of a batch are live, as slices of it, and cutting them out."""

import torch
from torch import Tensor

from residrop.schedule.sampler import Rows

__all__ = ["Window", "cut", "runs", "take_rows"]


class Window:
    """The rows of a window, and the other ones, as slices of a batch of `total` rows.

    Attributes:
        there: the live rows in the batch, in one piece or, where the window wraps around, in two.
        here: the same in the batch of the live rows.
        others: the rows outside, as slices that are not empty.
    """

    __slots__ = ("here", "live", "others", "there", "total")

    def __init__(self, rows: Rows, total: int) -> None:
        start, live = rows
        end = start + live
        self.live, self.total = live, total
        if end <= total:
            self.there, self.here = (slice(start, end),), (slice(0, live),)
            self.others = tuple(part for part in (slice(0, start), slice(end, total)) if part.start < part.stop)
        else:
            first, end = total - start, end - total
            self.there, self.here = (slice(start, total), slice(0, end)), (slice(0, first), slice(first, live))
            self.others = (slice(end, start),) if end < start else ()

    def piece(self, x: Tensor, here: slice) -> Tensor:
        """The rows `here` of a batch of the live rows."""
        return x if len(self.here) == 1 else x[here]

    @property
    def bits(self) -> int:
        """The live rows, row n as bit n."""
        return sum((1 << there.stop) - (1 << there.start) for there in self.there)

    def pending_in(self, pending: int) -> list[tuple[slice, slice]]:
        """The live rows among `pending`, as slices of the batch and of the batch of the live rows."""
        return [
            run for there, here in zip(self.there, self.here, strict=True) for run in runs(there, here.start, pending)
        ]


def runs(rows: slice, offset: int, chosen: int) -> list[tuple[slice, slice]]:
    """The rows in a slice whose bits are set in `chosen`, as slices; beside each the same, counted from `offset`."""
    found, start, bits = [], rows.start, (chosen & (1 << rows.stop) - 1) >> rows.start
    while bits:
        skip = (bits & -bits).bit_length() - 1
        start, bits = start + skip, bits >> skip
        length = (~bits & bits + 1).bit_length() - 1
        here = offset + start - rows.start
        found.append((slice(start, start + length), slice(here, here + length)))
        start, bits = start + length, bits >> length
    return found


def cut(x: Tensor, window: Window, *, own: bool) -> Tensor:
    """The live rows of x; with `own`, in memory of their own (a view would keep all of x alive)."""
    if len(window.there) == 1:
        view = x[window.there[0]]
        return view.clone(memory_format=torch.preserve_format) if own else view
    return torch.cat([x[there] for there in window.there])


def take_rows(x: Tensor, rows: Rows) -> Tensor:
    """The live rows of Tensor[N, ...] in the order of the window: Tensor[rows.live, ...]; differentiable."""
    return x if rows.live == x.shape[0] else cut(x, Window(rows, x.shape[0]), own=False)
