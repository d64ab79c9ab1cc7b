"""What the glue for all loops shares: the start of a training, and one plan for all micro-batches of an update."""

from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

from torch import nn

from residrop.blocks.attach import sampler_of
from residrop.common.errors import ConfigError
from residrop.engines.distributed import check_ranks
from residrop.schedule.sampler import DepthSampler

__all__ = ["Per", "Updates", "check_per", "started"]

Per = Literal["forward", "update"]


def check_per(per: str) -> Any:
    """`per`, or ConfigError if it is none of the choices."""
    if per not in get_args(Per):
        raise ConfigError(f"per is {per!r}; choose 'forward' (each is a step) or 'update' (micro-batches share a step)")
    return per


def started(model: nn.Module, saved: dict[str, int] | None) -> DepthSampler:
    """The sampler of a model whose training begins now, or goes on where `saved` stood; RankError if ranks disagree."""
    sampler = sampler_of(model)
    if saved:
        sampler.load_state_dict(saved)
    check_ranks(model)
    return sampler


class Updates:
    """Gives a sampler's plans by hand while micro-batches run; a step is over when the update is.

    Block coins are those of the step for all micro-batches, rows and units are drawn afresh for each.
    """

    def __init__(self, sampler: DepthSampler) -> None:
        self.sampler = sampler
        self._part = 0
        self._given: AbstractContextManager[None] | None = None

    def begin(self) -> None:
        """Before the forward of a micro-batch."""
        self._given = self.sampler.giving(self.sampler.plan(part=self._part))
        self._given.__enter__()

    def end(self, updated: bool) -> None:
        """After its backward; `updated` says whether the optimizer has made its update, too."""
        if self._given is None:
            return
        self._given.__exit__(None, None, None)
        self._given = None
        self._part = 0 if updated else self._part + 1
        self.sampler.step += updated
