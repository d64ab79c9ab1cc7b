"""How long models take to predict, side by side."""

from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from residrop.blocks.modes import evaluating
from residrop.common.checks import check_whole
from residrop.inference.sampled.batch import Batch

__all__ = ["seconds_of"]


@torch.no_grad()
def seconds_of(models: Sequence[nn.Module], inputs: Any, repeats: int = 15) -> list[float]:
    """The median time of a forward in eval mode, of every model; they take turns, so that a machine that now and then
    does other things favours none.

    Args:
        models: as `inputs` go into them, on one device.
        inputs: a tensor, a tuple of arguments, or a mapping of arguments by name.
        repeats: forwards of each model, after two that do not count.
    """
    check_whole("repeats", repeats, least=1)
    batch = Batch(inputs)
    times: list[list[float]] = [[] for _ in models]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        for number in range(repeats + 2):
            for model, own in zip(models, times, strict=True):
                _wait(batch)
                started = perf_counter()
                batch.called(model)
                _wait(batch)
                if number >= 2:
                    own.append(perf_counter() - started)
    return [median(own) for own in times]


def _wait(batch: Batch) -> None:
    if batch.device.type != "cpu":
        torch.accelerator.synchronize(batch.device)
