"""Predictions of a randomly present network: in expectation (one pass), or averaged over sampled passes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from residrop.blocks.attach import sampler_of
from residrop.blocks.modes import evaluating
from residrop.common.checks import check_rate, check_whole
from residrop.common.errors import ConfigError
from residrop.inference.sampled.pieces import softmax
from residrop.inference.sampled.shared import passes

__all__ = ["Prediction", "Sampled", "predict"]


class Prediction(NamedTuple):
    """Class probabilities of n inputs, and what sampling says of them.

    Attributes:
        probabilities: Tensor[n, classes] float32, softmax probabilities; the mean over samples.
        standard_error: Tensor[n, classes] float32, standard error of that mean; zeros for deterministic
            inference, NaN for one sample.
        sample_entropy: Tensor[n] float32, mean entropy (nats) of the single passes' predictions.
        samples: number of sampled passes; 0 for deterministic inference.
        sample_classes: Tensor[samples, n] int64, the class each single pass decides for.
        sample_probabilities: Tensor[samples, n, classes] float32, those of the single passes; None if they were not
            kept.
    """

    probabilities: Tensor
    standard_error: Tensor
    sample_entropy: Tensor
    samples: int
    sample_classes: Tensor
    sample_probabilities: Tensor | None = None

    @property
    def classes(self) -> Tensor:
        """Tensor[n] int64, the most probable class."""
        return self.probabilities.argmax(dim=1)

    @property
    def entropy(self) -> Tensor:
        """Tensor[n], entropy of the prediction in nats: the whole uncertainty."""
        return _entropy(self.probabilities)

    @property
    def mutual_information(self) -> Tensor:
        """Tensor[n] in nats, the part of `entropy` that the randomness of the network explains (0 if not sampled)."""
        return (self.entropy - self.sample_entropy).clamp_min(0.0)

    def quantiles(self, levels: Sequence[float] = (0.05, 0.5, 0.95)) -> Tensor:
        """Tensor[levels, n, classes] float32: quantiles over the samples of every class's probability.

        They say how far single passes lie apart, not how far their mean is off. Between two samples they are
        interpolated linearly, as by `numpy.quantile`. Deterministic inference has one value for all levels.

        Args:
            levels: numbers in [0, 1].

        Raises:
            ConfigError: a level outside [0, 1], or samples that were not kept.
        """
        wanted = [check_rate("level", level) for level in levels]
        if self.samples == 0:
            return self.probabilities.expand(len(wanted), -1, -1)
        if self.sample_probabilities is None:
            raise ConfigError("the samples were not kept, of which quantiles are made; call predict(..., keep=True)")
        rising = self.sample_probabilities.sort(dim=0).values  # torch.quantile refuses large tensors
        places = [level * (self.samples - 1) for level in wanted]
        return torch.stack([rising[int(at)].lerp(rising[math.ceil(at)], at - int(at)) for at in places])


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1)


@torch.no_grad()
def predict(
    model: nn.Module,
    x: Tensor,
    samples: int = 30,
    *,
    first: int = 0,
    keep: bool = True,
    stack: int | None = None,
) -> Prediction:
    """Predict class probabilities for a batch.

    `samples=0` is deterministic inference: every coin is replaced by its mean (Swapout section 3, Huang eq. 5).
    `samples=N` averages the softmax probabilities of N passes with coins tossed and batch norm in eval mode; the paper
    takes 30. The model's training flags are left as they were.

    Samples share what is certain (`residrop.inference.sampled.shared`): in networks of `residrop.create`, and in an
    `nn.Sequential`, what comes before the first random block is computed once, and under block- and row-level rules
    also what comes before samples part; modules without rules must be functions of their input there, as they are in
    eval mode. Other models are called once a sample, their blocks as far as a sample differs from one before. The
    samples are those of single passes
    in `residrop.sampling`: equal draws; equal numbers up to rounding, which depends on how many rows go through the
    network at once. With `stack=1` no two samples do; under block- and unit-level rules they are then equal bit for
    bit.

    Args:
        model: an attached network, Tensor[n, ...] to logits Tensor[n, classes].
        x: Tensor[n, ...], the batch.
        samples: number of sampled passes, 0 for deterministic.
        first: number of the first sampled pass; the same number and seed give the same samples.
        keep: keep the probabilities of the single passes, of which `Prediction.quantiles` are made.
        stack: rows (inputs times samples) that go through the network together; None chooses for the device.

    Raises:
        ConfigError: a bad number, a model that is not attached, or one of a single output.
    """
    if check_whole("samples", samples, least=0) == 0:
        return _expected(model, x)
    stack = None if stack is None else check_whole("stack", stack, least=1)
    sampler_of(model)
    with passes(model, x, first=first, stack=stack) as sampled:
        return _summary(sampled.draw(range(first, first + samples)), keep)


def _expected(model: nn.Module, x: Tensor) -> Prediction:
    with evaluating(model):
        p = softmax(model(x))
    none = torch.empty(0, len(p), dtype=torch.long, device=p.device)
    return Prediction(p, torch.zeros_like(p), _entropy(p), 0, none)


def _summary(every: Tensor, keep: bool) -> Prediction:
    """What Tensor[samples, n, classes] of probabilities say, in the order of the samples."""
    mean = square = entropy = torch.zeros((), device=every.device)
    samples = len(every)
    for number, p in enumerate(every, start=1):
        step = p - mean  # Welford's update: stable when the passes hardly differ
        mean = mean + step / number
        square = square + step * (p - mean)
        entropy = entropy + _entropy(p)
    variance = square / (samples - 1) if samples > 1 else torch.full_like(square, torch.nan)
    return Prediction(
        probabilities=mean,
        standard_error=(variance / samples).sqrt(),
        sample_entropy=entropy / samples,
        samples=samples,
        sample_classes=every.argmax(dim=2),
        sample_probabilities=every if keep else None,
    )


class Sampled(nn.Module):
    """A network that predicts by sampling when it is called: Tensor[n, ...] to probabilities Tensor[n, classes].

    Not logits: the mean over samples is one of probabilities. The draws are the same in every call, so equal inputs
    give equal outputs; no gradient is recorded, and the network's own training flags do not matter.

    Args:
        model: an attached network; it is a child of this module under the name `model`.
        samples: number of sampled passes, 0 for deterministic.
        first: number of the first pass.
        details: give the whole `Prediction` instead of its probabilities.

    Raises:
        ConfigError: a bad number, or a model that is not attached.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: int = 30,
        *,
        first: int = 0,
        details: bool = False,
    ) -> None:
        super().__init__()
        self.samples = check_whole("samples", samples, least=0)
        self.first = check_whole("first", first, least=0)
        sampler_of(model)
        self.model = model
        self.details = details

    def forward(self, x: Tensor) -> Tensor | Prediction:
        found = predict(self.model, x, self.samples, first=self.first, keep=self.details)
        return found if self.details else found.probabilities

    def extra_repr(self) -> str:
        return f"samples={self.samples}, first={self.first}, details={self.details}"
