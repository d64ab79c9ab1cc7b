"""Counting the floating-point operations of what runs."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["Operations"]


class Operations(TorchDispatchMode):
    """Inside, operations are counted as torch's own `FlopCounterMode` counts them, but not by module: its hooks on
    modules and gradients are in the way of models that switch gradients on and off.

    Attributes:
        total: what was counted so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out
