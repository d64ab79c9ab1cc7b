"""What predictions of each kind hold."""

import math
import warnings
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from residrop.common.checks import check_rate, is_number
from residrop.common.errors import ConfigError, NotFiniteWarning

__all__ = [
    "DetectionPrediction",
    "Detections",
    "NumberPrediction",
    "Prediction",
    "entropy_of",
    "warn_if_not_finite",
]


def entropy_of(probabilities: Tensor, dim: int) -> Tensor:
    """Entropy in nats over the dimension of classes."""
    return -torch.xlogy(probabilities, probabilities).sum(dim=dim)


def warn_if_not_finite(mean: Tensor) -> None:
    """Warn of inputs whose predictions, Tensor[n, ...], hold NaN or infinity: of these the largest would be a class."""
    if not bool(mean.isfinite().all()):
        bad = (~mean.isfinite()).reshape(len(mean), -1).any(dim=1).nonzero().flatten().tolist()
        warnings.warn(
            f"the model's output is not finite for {len(bad)} of {len(mean)} inputs (the first is number {bad[0]}, "
            "counted from 0); what is predicted for them, classes included, means nothing",
            NotFiniteWarning,
            stacklevel=2,
        )


def _kept(values: Tensor | None, what: str) -> Tensor:
    if values is None:
        raise ConfigError(f"the samples were not kept, of which {what} are made; call predict(..., keep=True)")
    return values


class Prediction(NamedTuple):
    """Class probabilities of n inputs, and what sampling says of them.

    Shapes are those of one decision an input. Where a model decides at many places (pixels, tokens), every place is a
    decision: its dimensions follow, and tensors without classes have the shape of the others without `class_dim`.

    Attributes:
        probabilities: Tensor[n, classes] float32 (pixels: [n, classes, H, W]; tokens: [n, T, classes]), the mean over
            samples.
        standard_error: the same shape, float32: standard error of that mean over the samples; zeros for deterministic
            inference, NaN for one sample.
        sample_entropy: Tensor[n] float32, mean entropy (nats) of the single passes' predictions.
        samples: number of sampled passes; 0 for deterministic inference.
        votes: shape of `probabilities`, int32: how many single passes decide for each class; zeros for deterministic
            inference.
        sample_probabilities: Tensor[samples, n, classes] float32, those of the single passes; None if they were not
            kept.
        class_dim: the dimension of classes in `probabilities`: 1, of tokens the last.
    """

    probabilities: Tensor
    standard_error: Tensor
    sample_entropy: Tensor
    samples: int
    votes: Tensor
    sample_probabilities: Tensor | None = None
    class_dim: int = 1

    @property
    def classes(self) -> Tensor:
        """Tensor[n] int64, the most probable class."""
        return self.probabilities.argmax(dim=self.class_dim)

    @property
    def entropy(self) -> Tensor:
        """Tensor[n], entropy of the prediction in nats: the whole uncertainty."""
        return entropy_of(self.probabilities, self.class_dim)

    @property
    def mutual_information(self) -> Tensor:
        """Tensor[n] in nats, the part of `entropy` that the randomness of the network explains (0 if not sampled)."""
        return (self.entropy - self.sample_entropy).clamp_min(0.0)

    @property
    def disagreement(self) -> Tensor:
        """Tensor[n] in [0, 1): share of the single passes that do not decide as most of them do (0 if not sampled)."""
        most = self.votes.amax(dim=self.class_dim)
        return 1.0 - most / self.samples if self.samples else torch.zeros(most.shape, device=most.device)

    @property
    def sample_classes(self) -> Tensor:
        """Tensor[samples, n] int64, the class each single pass decides for.

        Raises:
            ConfigError: samples that were not kept.
        """
        if self.samples == 0:
            return self.classes.new_empty(0, *self.sample_entropy.shape)
        return _kept(self.sample_probabilities, "their decisions").argmax(dim=self.class_dim + 1)

    def quantiles(self, levels: Sequence[float] = (0.05, 0.5, 0.95)) -> Tensor:
        """Tensor[levels, n, classes] float32: quantiles over the samples of every class's probability.

        They say how far single passes lie apart, not how far their mean is off. Between two samples they are
        interpolated linearly, as by `numpy.quantile`. Deterministic inference has one value for all levels.

        Args:
            levels: numbers in [0, 1].

        Raises:
            ConfigError: a level outside [0, 1], or samples that were not kept.
        """
        return _quantiles(levels, self.probabilities, self.samples, self.sample_probabilities)


def _quantiles(levels: Sequence[float], mean: Tensor, samples: int, values: Tensor | None) -> Tensor:
    wanted = [check_rate("level", level) for level in levels]
    if samples == 0:
        return mean.expand(len(wanted), *mean.shape)
    rising = _kept(values, "quantiles").sort(dim=0).values  # torch.quantile refuses large tensors
    places = [level * (samples - 1) for level in wanted]
    return torch.stack([rising[int(at)].lerp(rising[math.ceil(at)], at - int(at)) for at in places])


class NumberPrediction(NamedTuple):
    """Numbers (a regression) predicted for n inputs, and what sampling says of them.

    Attributes:
        mean: Tensor[n, ...] float32 (float64 if the model's output is), the mean over samples.
        variance: the same shape, variance between single passes (divided by samples - 1); zeros for deterministic
            inference, NaN for one sample.
        noise: the same shape, the variance that the model predicts, its mean over samples; None if it predicts none.
        samples: number of sampled passes; 0 for deterministic inference.
        sample_values: Tensor[samples, n, ...], the numbers of the single passes; None if they were not kept.
    """

    mean: Tensor
    variance: Tensor
    noise: Tensor | None
    samples: int
    sample_values: Tensor | None = None

    @property
    def standard_error(self) -> Tensor:
        """Tensor[n, ...], standard error of the mean over the samples."""
        return (self.variance / max(1, self.samples)).sqrt()

    @property
    def total_variance(self) -> Tensor:
        """Tensor[n, ...], `variance` plus `noise`: the law of total variance, over what the model is not sure of and
        what it holds for noise of the data."""
        return self.variance if self.noise is None else self.variance + self.noise

    def interval(self, coverage: float = 0.9) -> tuple[Tensor, Tensor]:
        """Lower and upper ends, each Tensor[n, ...], of the normal interval of `total_variance` around the mean.

        It covers as promised only if the model's idea of its own variance is right: measure it.

        Args:
            coverage: in (0, 1).

        Raises:
            ConfigError: a coverage outside (0, 1), one sampled pass, or one in expectation that predicts no variance.
        """
        if not is_number(coverage) or not 0.0 < coverage < 1.0:
            raise ConfigError(f"coverage is {coverage!r}; give a number between 0 and 1")
        if self.samples == 1 or (self.noise is None and self.samples < 2):
            raise ConfigError(
                "one pass without a predicted variance tells no interval, nor does one sample; use samples >= 2"
            )
        half = NormalDist().inv_cdf(0.5 + coverage / 2) * self.total_variance.sqrt()
        return self.mean - half, self.mean + half

    def quantiles(self, levels: Sequence[float] = (0.05, 0.5, 0.95)) -> Tensor:
        """Tensor[levels, n, ...]: quantiles over the single passes; as `Prediction.quantiles`."""
        return _quantiles(levels, self.mean, self.samples, self.sample_values)


class Detections(NamedTuple):
    """Objects found in one image, those of the highest score first. k is their number.

    Attributes:
        boxes: Tensor[k, 4] float32, corners as the model gives them: mean over the passes that found the object.
        deviation: Tensor[k, 4], standard deviation of the corners over these passes; NaN if it was one.
        scores: Tensor[k] in [0, 1]: mean over all passes, of which those that did not find it count 0.
        labels: Tensor[k] int64.
        presence: Tensor[k] in (0, 1]: share of the passes that found it.
    """

    boxes: Tensor
    deviation: Tensor
    scores: Tensor
    labels: Tensor
    presence: Tensor


class DetectionPrediction(NamedTuple):
    """Objects found in n images.

    Attributes:
        images: one `Detections` an image.
        samples: number of sampled passes; 0 for deterministic inference (`deviation` is 0 then, `presence` 1).
        sample_images: of every pass the model's own list (dicts with boxes, scores and labels); None if they were not
            kept.
    """

    images: list[Detections]
    samples: int
    sample_images: list[list[dict[str, Tensor]]] | None = None
