"""How many inputs fit into a bound of memory, found by one pass over one of them."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from residrop.common.checks import is_number
from residrop.common.errors import ConfigError

__all__ = ["Peak", "rows_within"]

_SPARE = 2  # a walk of samples holds activations where they part, besides those of the pass itself


class Peak(TorchDispatchMode):
    """Inside, `bytes` is the most memory that tensors made inside have held at once (without workspaces)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._alive = {number: one for number, one in self._alive.items() if not one[0].expired()}
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return out


def rows_within(model: nn.Module, x: Tensor, memory_mb: object) -> int:
    """Rows of x that can go through the model together within `memory_mb` MiB of activations (weights excluded).

    Raises:
        ConfigError: no positive number, or less than one row takes.
    """
    if not is_number(memory_mb) or not 0.0 < memory_mb < math.inf:
        raise ConfigError(f"memory_mb is {memory_mb!r}; give a positive number of MiB")
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), Peak() as peak:
            model(x[:1])
    finally:
        for module, flag in flags.items():
            module.training = flag
    each = _SPARE * max(1, peak.bytes) / 2**20
    rows = int(memory_mb / each)
    if rows < 1:
        raise ConfigError(f"memory_mb is {memory_mb}, but one input takes about {each:.3g} MiB; give at least that")
    return rows
