"""How much the loss needs each block: SenseMode's scores (Hayou & Ayed, Sec. 5)."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residrop.blocks.attach import rules_of
from residrop.common.errors import ConfigError
from residrop.inference.sampled.batch import Batch
from residrop.theory.gates import gated, kept_as_is

__all__ = ["Sensitivity", "removal_losses", "sensitivity"]

Loss = Callable[[Any, Any], Tensor]


class Sensitivity(NamedTuple):
    """Scores of the blocks.

    Attributes:
        scores: float64 Tensor[L], S_l, mean over batches.
        standard_error: float64 Tensor[L], of that mean; NaN for one batch.
        batches: number of batches.
    """

    scores: Tensor
    standard_error: Tensor
    batches: int


def sensitivity(
    model: nn.Module, batches: Iterable[tuple[Any, Any]], loss: Loss = F.cross_entropy, *, training: bool = True
) -> Sensitivity:
    """S_l = dLoss / d delta_l at delta = 1, for all blocks in one backward pass a batch.

    It approximates Loss(1) - Loss(1_l), the change of the loss without block l (`removal_losses` measures that). A
    negative score is a block that lowers the loss. Nothing about the model changes: no draw, step, gradient, statistic
    or flag.

    Args:
        model: a model with rules.
        batches: pairs of inputs (a tensor, a tuple of arguments, or a mapping of arguments by name) and target.
        loss: from the model's output and the target to Tensor[].
        training: whether batch norm takes the statistics of the batch (before training its own mean nothing).

    Raises:
        ConfigError: no batch, or scores that are not finite, naming the block.
    """
    found: list[Tensor] = []
    with kept_as_is(model, training=training):
        for x, y in batches:
            gates = torch.ones(len(rules_of(model)), device=Batch(x).device, requires_grad=True)
            with torch.enable_grad(), gated(model, gates):
                (grad,) = torch.autograd.grad(loss(Batch(x).called(model), y), gates)
            found.append(grad.double())
    if not found:
        raise ConfigError("no batch was given; sensitivity needs at least one")
    scores = torch.stack(found)
    bad = (~scores.isfinite()).any(dim=0).nonzero().flatten().tolist()
    if bad:
        raise ConfigError(f"the score of block {bad[0] + 1} is not finite: the loss or its gradient overflows")
    spread = scores.std(dim=0) / len(found) ** 0.5 if len(found) > 1 else torch.full_like(scores[0], torch.nan)
    return Sensitivity(scores.mean(dim=0), spread, len(found))


@torch.no_grad()
def removal_losses(
    model: nn.Module, batches: Iterable[tuple[Any, Any]], loss: Loss = F.cross_entropy, *, training: bool = True
) -> Tensor:
    """Loss(1) - Loss(1_l) for every block l, exactly: L + 1 passes a batch. float64 Tensor[L], mean over batches."""
    found: list[Tensor] = []
    with kept_as_is(model, training=training):
        for x, y in batches:
            count = len(rules_of(model))
            losses: list[Tensor] = []
            for absent in range(-1, count):
                gates = torch.ones(count, device=Batch(x).device)
                if absent >= 0:
                    gates[absent] = 0.0
                with gated(model, gates):
                    losses.append(loss(Batch(x).called(model), y).double())
            found.append(losses[0] - torch.stack(losses[1:]))
    if not found:
        raise ConfigError("no batch was given; removal losses need at least one")
    return torch.stack(found).mean(dim=0)
