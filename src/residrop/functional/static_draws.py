"""Draws of units at one place in memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from residrop.functional.units import coins_of

__all__ = ["StaticDraws"]


class StaticDraws:
    """One place for what unit-level rules draw in every pass, for CUDA graphs, which read it where it was recorded."""

    def __init__(self) -> None:
        self._data: Tensor | None = None
        self._rows: list[Tensor | None] = []

    def take(self, rules: Sequence[Any], made: Sequence[Tensor | None], device: torch.device) -> list[Tensor | None]:
        """Move what the rules drew, on the CPU, to its place: one transfer for all. None for rules without a draw."""
        data = self._data
        if data is None or data.device != device:
            sizes = [_words(rule) if rule.granularity == "unit" else 0 for rule in rules]
            width = -(-max(sizes) // 4) * 4  # tensors begin at multiples of 16 bytes, as compilers take for granted
            self._data = data = torch.zeros(len(rules), width, dtype=torch.int32, device=device)
            self._rows = [data[row, :size] if size else None for row, size in enumerate(sizes)]
        host = torch.zeros(data.shape, dtype=torch.int32)
        for row, one in enumerate(made):
            if one is not None:
                host[row, : len(one)] = one
        data.copy_(host.pin_memory() if device.type == "cuda" else host, non_blocking=True)
        return [None if one is None else row for one, row in zip(made, self._rows, strict=True)]


def _words(rule: Any) -> int:
    return len(coins_of(rule.rates, 0, torch.device("cpu")))
