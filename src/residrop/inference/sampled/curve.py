"""Over a labelled set: the error against the number of samples, and what adaptive sampling saves."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError
from residrop.inference.sampled.adaptive import predict_adaptive
from residrop.inference.sampled.batch import Batch
from residrop.inference.sampled.outputs import Reader
from residrop.inference.sampled.predict import predict
from residrop.inference.sampled.shared import passes
from residrop.inference.scores import check_labels

__all__ = ["AdaptiveEvaluation", "ErrorCurve", "error_curve", "evaluate_adaptive"]

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ErrorCurve:
    """Error against the number of samples (Figure 2 of Singh et al. 2016).

    Attributes:
        samples: 1, 2, ..., N.
        error: mean over repetitions of the error of the average of so many passes, in percent.
        error_se: standard error of that mean over the repetitions, in percent; None for one repetition.
        deterministic: error of the expectation, in percent.
        repetitions: number of disjoint sets of N passes.
        images: number of images.
    """

    samples: tuple[int, ...]
    error: tuple[float, ...]
    error_se: tuple[float, ...] | None
    deterministic: float
    repetitions: int
    images: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def error_curve(
    model: nn.Module,
    batches: Batches,
    samples: int = 30,
    repetitions: int = 5,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> ErrorCurve:
    """Measure the error of averages over 1, 2, ..., `samples` passes, over repetitions that share no pass.

    Args:
        model: an attached network, in any mode; its flags are left as they were.
        batches: pairs (x Tensor[n, ...], labels Tensor[n] int64), at least one image in all.
        samples: largest number of passes, at least 1.
        repetitions: number of repetitions, at least 1; every image takes samples * repetitions passes.
        on_batch: called with the number of images done after every batch.

    Raises:
        ConfigError: a bad number, or a model that is not attached.
    """
    check_whole("samples", samples, least=1)
    check_whole("repetitions", repetitions, least=1)
    wrong = torch.zeros(repetitions, samples, dtype=torch.int64)
    missed, done = 0, 0
    for number, (x, y) in enumerate(batches):
        once = predict(model, x, 0, kind="classes")
        check_labels(y, once.classes.shape, once.probabilities.shape[1])
        missed += int((once.classes != y).sum())
        for repetition in range(repetitions):
            first = (number * repetitions + repetition) * samples
            with passes(model, Batch(x), Reader(kind="classes"), first=first) as sampled:
                (found,) = sampled.draw(range(first, first + samples))
            sums = found.cumsum(dim=0)
            wrong[repetition] += (sums.argmax(dim=2) != y).sum(dim=1).cpu()
        done += len(y)
        if on_batch:
            on_batch(done)
    errors = 100.0 * wrong.double() / _some(done)
    spread = errors.std(dim=0) / math.sqrt(repetitions) if repetitions > 1 else None
    return ErrorCurve(
        samples=tuple(range(1, samples + 1)),
        error=tuple(errors.mean(dim=0).tolist()),
        error_se=None if spread is None else tuple(spread.tolist()),
        deterministic=100.0 * missed / done,
        repetitions=repetitions,
        images=done,
    )


@dataclass(frozen=True)
class AdaptiveEvaluation:
    """Adaptive sampling against the full number of samples, on the same images and draws.

    Attributes:
        confidence: what it was asked for.
        max_samples: the full number.
        mean_samples: passes that an image was given, on average.
        samples_se: standard error of that mean over the images; None for one image.
        settled: share of images that stopped before the full number or were settled there, in percent.
        error: error of the adaptive decisions, in percent.
        full_error: error of the full number's decisions, in percent.
        agreement: share of images on which both decide alike, in percent.
        images: number of images.
    """

    confidence: float
    max_samples: int
    mean_samples: float
    samples_se: float | None
    settled: float
    error: float
    full_error: float
    agreement: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def evaluate_adaptive(
    model: nn.Module,
    batches: Batches,
    *,
    confidence: float = 0.95,
    max_samples: int = 30,
    on_batch: Callable[[int], None] | None = None,
) -> AdaptiveEvaluation:
    """Compare `predict_adaptive` with `predict` on labelled batches; arguments as there and in `evaluate`."""
    used: list[Tensor] = []
    settled = right = full = alike = done = 0
    for number, (x, y) in enumerate(batches):
        first = number * check_whole("max_samples", max_samples, least=1)
        found = predict_adaptive(model, x, confidence=confidence, max_samples=max_samples, first=first, kind="classes")
        check_labels(y, found.used.shape, found.probabilities.shape[1])
        every = predict(model, x, max_samples, first=first, kind="classes").classes
        used.append(found.used.double().cpu())
        settled += int(found.settled.sum())
        right += int((found.classes == y).sum())
        full += int((every == y).sum())
        alike += int((found.classes == every).sum())
        done += len(y)
        if on_batch:
            on_batch(done)
    images = _some(done)
    counts = torch.cat(used)
    return AdaptiveEvaluation(
        confidence=confidence,
        max_samples=max_samples,
        mean_samples=float(counts.mean()),
        samples_se=float(counts.std() / math.sqrt(images)) if images > 1 else None,
        settled=100.0 * settled / images,
        error=100.0 * (1.0 - right / images),
        full_error=100.0 * (1.0 - full / images),
        agreement=100.0 * alike / images,
        images=images,
    )


def _some(images: int) -> int:
    if images == 0:
        raise ConfigError("there are no images to evaluate; give at least one batch")
    return images
