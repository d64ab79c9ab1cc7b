"""Time and memory of training steps."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["median_ratio", "peak_bytes", "quiet_collector", "saved_bytes", "seconds_of"]


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of wall clock that a call takes, on a GPU until all of its work is done."""
    _finish(device)
    started = time.perf_counter()
    step()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor] = (), casts: bool = False) -> int:
    """Bytes of memory that a forward keeps for its backward, those of `parameters` excluded.

    Every storage counts once and in full: a view of ten rows keeps the whole batch that it was cut from.

    Args:
        forward: what is measured.
        parameters: these and their views do not count.
        casts: whether autocast is in force; then its copies of parameters in another precision do not count, either.
    """
    own = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in parameters}
    kept = WeakSet[_Kept]()

    def pack(tensor: Tensor) -> _Kept:
        one = _Kept(tensor)
        kept.add(one)
        return one

    with saved_tensors_hooks(pack, lambda one: one.tensor), _Casts(own) if casts else nullcontext():
        out = forward()  # held, and with it the graph that keeps the tensors
    storages = {one.tensor.untyped_storage().data_ptr(): one.tensor.untyped_storage() for one in kept}
    del out
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Bytes of a GPU's memory that a call takes at most, beyond what is allocated before; `device` is of CUDA."""
    gc.collect()
    _finish(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    _finish(device)
    return torch.cuda.max_memory_allocated(device) - before


class _Kept:
    """A tensor in a graph; gone when that part of the graph is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output that its own graph keeps would keep that graph


class _Casts(TorchDispatchMode):
    """Adds to a set of storages the copies that are made of them in another precision."""

    def __init__(self, own: dict[int, torch.UntypedStorage]) -> None:
        super().__init__()
        self.own = own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage().data_ptr() in self.own:
            storage = out.untyped_storage()
            self.own[storage.data_ptr()] = storage
        return out


def median_ratio(times: list[float], others: list[float]) -> float:
    """The median over steps of the ratio of two times of the same step."""
    return median(a / b for a, b in zip(times, others, strict=True))


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Inside, Python collects garbage only where it is told to, not in the middle of a step, and only what is new."""
    was = gc.isenabled()
    gc.collect()
    gc.freeze()  # or every collection would look through all that torch has loaded
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was:
            gc.enable()
