"""The paper's toy task, sin(beta^T x), on which the noise of neurons is followed along training (Sec. 6, Fig. 4, 5).

Inputs x and beta are standard Gaussian in R^256, so beta^T x has a standard deviation of 16 and the target is next to
noise: the task is there to move the weights. Its size, optimiser and epochs are not in the paper; they are chosen here.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError
from residrop.models import create
from residrop.schedule.sampler import derive_key
from residrop.theory.noise import Neurons, Noise, noise

__all__ = ["Course", "sine_task", "train_regression"]

_FEATURES = 256


class Course(NamedTuple):
    """Measurements along a training: E epochs, B blocks, n inputs, k neurons. What overflowed is NaN.

    Attributes:
        epochs: after which measurements were made; 0 is before training.
        layers: numbers of the blocks, 1 to B.
        p_values: float64 Tensor[E, B, n, k].
        ratios: float64 Tensor[E, n, k].
        variance: float64 Tensor[E, n, k].
        first_order: float64 Tensor[E, n, k], expanded at delta = 1.
        first_order_at_mean: float64 Tensor[E, n, k], at delta = p.
        losses: float64 Tensor[E], mean squared error of the average network (delta = p) on the training inputs.
        drawn_losses: float64 Tensor[E], the same with random presence, mean over the updates of the epoch; NaN at 0.
    """

    epochs: tuple[int, ...]
    layers: tuple[int, ...]
    p_values: Tensor
    ratios: Tensor
    variance: Tensor
    first_order: Tensor
    first_order_at_mean: Tensor
    losses: Tensor
    drawn_losses: Tensor


def sine_task(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs Tensor[size, 256] and targets Tensor[size], sin(beta^T x), with x and beta standard Gaussian."""
    generator = torch.Generator().manual_seed(derive_key(seed, 3) >> 1)
    beta = torch.randn(_FEATURES, generator=generator)
    x = torch.randn(size, _FEATURES, generator=generator)
    return x, torch.sin(x @ beta)


def train_regression(
    blocks: int = 100,
    *,
    width: int = 128,
    stable: bool = True,
    rule: str = "stochastic-depth",
    survival: str | float | Sequence[float] = 0.7,
    epochs: Sequence[int] = (0, 1, 2, 5, 10),
    inputs: int = 20,
    masks: int = 200,
    neurons: Neurons = 1,
    size: int = 1024,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
) -> Course:
    """Train a Vanilla network on `sine_task` and measure the noise of its neurons on the way.

    Optimiser: Adam, constant rate. With rule="gaussian-depth" the matching Gaussian numbers take the place of masks, in
    training and in the samples. Standard networks (stable=False) grow by 1 + p a block; what overflows is NaN, from
    there on.

    Args:
        blocks: L.
        width: N.
        stable: whether branches are scaled by 1 / sqrt(L).
        rule: a name in `residrop.RULES` of a rule with one rate per block.
        survival: rates, in any form that `residrop.schedule.survival.parse` reads.
        epochs: rising; after which epochs to measure, 0 being before training. The last one ends the training.
        inputs: the first so many training inputs are those whose neurons are sampled.
        masks: samples for each.
        neurons: as in `theory.noise.neuron_samples`.
        size: training inputs.
        batch_size: rows of an update.
        lr: rate of Adam.
        seed: of weights, data, order and draws; the same seed gives the same data and weights under any rule.

    Raises:
        ConfigError: epochs that do not rise, or an argument out of range.
    """
    epochs = _checked(epochs, inputs, size, batch_size)
    name = f"stable-vanilla-{blocks}" if stable else f"vanilla-{blocks}"
    model = create(name, rule=rule, survival=survival, width=width, in_features=_FEATURES, classes=1, seed=seed)
    x, y = sine_task(size, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    order = torch.Generator().manual_seed(derive_key(seed, 4) >> 1)
    law = "gaussian" if rule == "gaussian-depth" else "coins"
    found: list[Noise] = []
    losses: list[tuple[float, float]] = []
    drawn = float("nan")
    for epoch in range(epochs[-1] + 1):
        if epoch > 0:
            drawn = _one_epoch(model, optimizer, x, y, torch.randperm(size, generator=order).split(batch_size))
        if epoch in epochs:
            found.append(noise(model, x[:inputs], masks=masks, neurons=neurons, law=law, seed=seed))
            losses.append((_loss(model, x, y), drawn))
    stacked = Noise(*(torch.stack(each) for each in zip(*found, strict=True)))
    return Course(
        epochs, tuple(range(1, blocks + 1)), *stacked, *torch.tensor(losses, dtype=torch.float64).unbind(dim=1)
    )


def _checked(epochs: Sequence[int], inputs: int, size: int, batch_size: int) -> tuple[int, ...]:
    epochs = tuple(check_whole("epochs", epoch, least=0) for epoch in epochs)
    if not epochs or any(a >= b for a, b in pairwise(epochs)):
        raise ConfigError(f"epochs is {epochs}; give rising numbers, such as (0, 1, 5)")
    check_whole("size", size, least=1)
    check_whole("batch_size", batch_size, least=1)
    if not 1 <= check_whole("inputs", inputs) <= size:
        raise ConfigError(f"inputs is {inputs}; they are among the {size} of training: give 1 to {size}")
    return epochs


def _one_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, order: Sequence[Tensor]
) -> float:
    """Mean loss of the updates; once it is not finite, no update is made any more."""
    total = 0.0
    model.train()
    for rows in order:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[rows]).squeeze(1), y[rows])
        total += float(loss.detach())
        if not torch.isfinite(loss):
            return float("nan")
        loss.backward()
        optimizer.step()
    return total / len(order)


@torch.no_grad()
def _loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    value = float(F.mse_loss(model.eval()(x).squeeze(1), y))
    return value if value < float("inf") else float("nan")
