"""Running sums over passes, so that samples need not be kept: one class for each kind of prediction."""

from typing import Any, Protocol

import torch
from torch import Tensor

from residrop.common.errors import ConfigError
from residrop.inference.sampled.detections import merge_detections
from residrop.inference.sampled.outputs import Head
from residrop.inference.sampled.predictions import DetectionPrediction, NumberPrediction, Prediction, entropy_of

__all__ = ["Sums", "sums_of"]


class Sums(Protocol):
    """What is known of the passes so far."""

    def add(self, value: Any) -> None:
        """The next pass: what a `Reader` gives for one head."""

    def result(self, samples: int) -> Any:
        """The prediction of so many passes; 0 for passes in expectation (one, or two of mirror images)."""


def sums_of(head: Head, keep: bool) -> Sums:
    """The sums of one head; with `keep`, all passes are kept as well."""
    if head.kind == "detections":
        return _DetectionSums(keep)
    return _NumberSums(head, keep) if head.kind == "numbers" else _ClassSums(head, keep)


class _Moments:
    """Mean and sum of squared deviations, by Welford's update: stable when the passes hardly differ."""

    def __init__(self, keep: bool) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self.square: Tensor = torch.zeros(())
        self.every: list[Tensor] | None = [] if keep else None

    def add(self, value: Tensor) -> None:
        if self.count == 0:
            self.mean = self.square = torch.zeros_like(value)
        self.count += 1
        step = value - self.mean
        self.mean = self.mean + step / self.count
        self.square = self.square + step * (value - self.mean)
        if self.every is not None:
            self.every.append(value)

    def variance(self, samples: int) -> Tensor:
        """Unbiased; 0 in expectation, NaN for one sample."""
        if samples < 2:
            return torch.full_like(self.square, torch.nan if samples else 0.0)
        return self.square / (samples - 1)

    def kept(self, samples: int) -> Tensor | None:
        return None if self.every is None or not samples else torch.stack(self.every)


class _ClassSums:
    def __init__(self, head: Head, keep: bool) -> None:
        self.dim, self.moments = head.class_dim, _Moments(keep)
        self.entropy: Tensor = torch.zeros(())
        self.votes: Tensor = torch.zeros(())

    def add(self, value: Tensor) -> None:
        if self.moments.count == 0:
            self.votes = torch.zeros_like(value, dtype=torch.int32)
        self.moments.add(value)
        # as the mean is made: where all passes agree, its entropy and theirs are then equal to the last bit
        self.entropy = self.entropy + (entropy_of(value, self.dim) - self.entropy) / self.moments.count
        decided = value.argmax(dim=self.dim, keepdim=True)
        self.votes.scatter_add_(self.dim, decided, torch.ones_like(decided, dtype=torch.int32))

    def result(self, samples: int) -> Prediction:
        return Prediction(
            probabilities=self.moments.mean,
            standard_error=(self.moments.variance(samples) / max(1, samples)).sqrt(),
            sample_entropy=self.entropy,
            samples=samples,
            votes=self.votes if samples else torch.zeros_like(self.votes),
            sample_probabilities=self.moments.kept(samples),
            class_dim=self.dim,
        )


class _NumberSums:
    def __init__(self, head: Head, keep: bool) -> None:
        self.has_variance, self.moments = head.has_variance, _Moments(keep)
        self.noise: Tensor = torch.zeros(())
        self.least: Tensor | None = None  # the smallest variance that was predicted

    def add(self, value: Tensor) -> None:
        if self.has_variance:
            value, noise = value.unbind(dim=1)
            self.noise = self.noise + (noise - self.noise) / (self.moments.count + 1)
            if noise.numel():
                least = noise.amin()
                self.least = least if self.least is None else torch.minimum(self.least, least)
        self.moments.add(value)

    def result(self, samples: int) -> NumberPrediction:
        if self.least is not None and not self.least >= 0:
            raise ConfigError(
                f"the second of the pair is a variance, but holds {float(self.least):.3g}; give it as one (of a "
                "logarithm: outputs=lambda o: (o[:, 0], o[:, 1].exp()))"
            )
        noise = self.noise if self.has_variance else None
        return NumberPrediction(
            self.moments.mean, self.moments.variance(samples), noise, samples, self.moments.kept(samples)
        )


class _DetectionSums:
    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.passes: list[list[dict[str, Tensor]]] = []

    def add(self, value: list[dict[str, Tensor]]) -> None:
        self.passes.append(value)

    def result(self, samples: int) -> DetectionPrediction:
        images = [merge_detections(list(passes)) for passes in zip(*self.passes, strict=True)]
        if not samples:
            images = [one._replace(deviation=torch.zeros_like(one.deviation)) for one in images]
        return DetectionPrediction(images, samples, self.passes if self.keep and samples else None)
