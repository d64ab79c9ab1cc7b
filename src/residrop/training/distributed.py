"""A training on several processes, as torchrun starts them: who does what, and how they stay together.

Every rank holds the whole network and takes its share of each batch. Rank 0 alone writes, prints and reads run
directories; what it finds is told to the others. Errors and stops are agreed upon, so that no rank waits for one that
has left.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from residrop.common.errors import ConfigError, SaidElsewhere, UsageError
from residrop.common.orphans import leave_with_parent
from residrop.common.torchrun import world_size

__all__ = ["ALONE", "Ranks", "Votes", "process_group"]

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # ranks that are gone are noticed at once, as their connections are closed


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, and the place of this one among them.

    Attributes:
        rank: number of this process.
        size: number of processes; all methods are the plain thing if it is 1.
        group: the group of their messages (None: the default one), in which a rank may wait for days: rank 0 decodes
            data and measures alone, and the default group gives up after minutes.
    """

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, compare=False)

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor, as a new one."""
        values = values.clone()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def agree(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank. A UsageError anywhere ends all: the first rank raises its own."""
        if self.size == 1:
            return work()
        result: Any = None
        own: UsageError | None = None
        try:
            result = work()
        except UsageError as error:
            own = error
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, None if own is None else str(own), group=self.group)
        failed = [rank for rank, text in enumerate(every) if text is not None]
        if own is not None and failed[0] == self.rank:
            raise own
        if failed:
            raise SaidElsewhere(every[failed[0]])
        return result

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0, then on the others, which find what it left in caches. Errors as of `agree`."""
        result: Any = self.agree(lambda: work() if self.main else None)
        return self.agree(lambda: result if self.main else work())

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, where alone it is done, on every rank. Errors as of `agree`."""
        found: list[Any] = [self.agree(lambda: work() if self.main else None)]
        if self.size > 1:
            dist.broadcast_object_list(found, src=0, group=self.group)
        return found[0]

    def wait_for_all(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            dist.barrier(group=self.group)


ALONE = Ranks()


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """The processes that torchrun started (one without it); nccl if they train on GPUs, one each, else gloo.

    A process group that exists already is used, and left as it is. Processes of torchrun end when torchrun has gone.

    Args:
        device: as in a recipe: "auto", "cpu", "cuda", ...

    Raises:
        ConfigError: there are fewer GPUs than processes, or `device` is a single GPU.
    """
    if dist.is_available() and dist.is_initialized():
        with _patient() as ranks:
            yield ranks
        return
    size = world_size()
    if size == 1:
        yield ALONE
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if device not in ("auto", "cuda"):
            raise ConfigError(f"device {device!r} is a single one, but there are {size} processes; give --device cuda")
        if local >= gpus:
            raise ConfigError(
                f"process {local} of this machine has no GPU of its own (there are {gpus}); "
                f"start at most {gpus} with --nproc-per-node, or give --device cpu"
            )
        torch.cuda.set_device(local)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        leave_with_parent()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        with _patient() as ranks:
            yield ranks
    finally:
        dist.destroy_process_group()


@contextmanager
def _patient() -> Iterator[Ranks]:
    """The ranks of the default group, with a group of their own for messages that are waited for."""
    if dist.get_world_size() == 1:
        yield ALONE
        return
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(group)


class Votes:
    """Requests (to save, to stop) that any rank may make, and that all ranks act on after the same update.

    On several ranks a vote is collected while the next update runs, so that nobody waits for it, and is known one
    update later. The highest request counts.
    """

    def __init__(self, ranks: Ranks) -> None:
        # a group of its own on the CPU: messages of the gradients' group may come from another thread
        self._group: Any = dist.new_group(backend="gloo") if ranks.size > 1 else None
        self._pending: tuple[Tensor, Any] | None = None

    def cast(self, request: int) -> int:
        """Give this rank's request after an update (0 for none); returns the highest one of the update before."""
        if self._group is None:
            return request
        before = self._collect()
        vote = torch.tensor([request], dtype=torch.int32)
        work = dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = vote, work
        return before

    def settle(self, request: int) -> int:
        """The highest request of now and of votes still open, known at once; to be called by all ranks."""
        if self._group is None:
            return request
        vote = torch.tensor([max(request, self._collect())], dtype=torch.int32)
        dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group)
        return int(vote)

    def _collect(self) -> int:
        if self._pending is None:
            return 0
        vote, work = self._pending
        work.wait()
        self._pending = None
        return int(vote)
