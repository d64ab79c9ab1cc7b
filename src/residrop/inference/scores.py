"""How good predictions are against what was known: sums over decisions, which add over batches and processes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from residrop.common.errors import ConfigError
from residrop.inference.sampled.predictions import NumberPrediction

__all__ = [
    "Counts",
    "NumberCounts",
    "NumberScores",
    "Scores",
    "check_labels",
    "counted",
    "counted_numbers",
    "number_scores_of",
    "score",
    "scores_of",
    "sum_of",
]

_BINS = 15
_LEVEL = 0.9  # of the intervals of numbers


@dataclass(frozen=True)
class Scores:
    """Quality of one kind of inference. A decision is one an image or, of dense outputs, one for each place in it.

    Attributes:
        error: share of wrong decisions in percent.
        error_se: its standard error over the images, in percent (binomial where an image is one decision; the places of
            one image count as one draw).
        nll: mean negative log likelihood of a decision in nats.
        ece: expected calibration error in percent, 15 bins of equal width (Guo et al. 2017).
        top5_error: share of decisions whose class is none of the five likeliest, in percent; None for five classes or
            fewer.
    """

    error: float
    error_se: float
    nll: float
    ece: float
    top5_error: float | None = None


class Counts(NamedTuple):
    """Sums over the decisions of n images, on the CPU.

    Attributes:
        wrong: float64 Tensor[n], wrong decisions of each image.
        decisions: float64 Tensor[n], all of them.
        nll: float64 Tensor[], sum of negative log likelihoods.
        bins: float64 Tensor[16, 3] by confidence: decisions, sum of confidences, right decisions (1.0 has a bin of its
            own, as in torchmetrics).
        outside: int64 Tensor[], decisions whose class is none of the five likeliest.
        confusion: int64 Tensor[classes, classes], how many of a class (row) were taken for which (column).
    """

    wrong: Tensor
    decisions: Tensor
    nll: Tensor
    bins: Tensor
    outside: Tensor
    confusion: Tensor


def counted(probabilities: Tensor, labels: Tensor, ignore: int = -100) -> Counts:
    """The sums of one batch.

    Args:
        probabilities: Tensor[n, ..., classes], the dimension of classes last.
        labels: int64 Tensor[n, ...].
        ignore: label of places that do not count.
    """
    n, classes = len(labels), probabilities.shape[-1]
    p, known = probabilities.reshape(-1, classes), labels.reshape(-1).to(probabilities.device)
    image = torch.arange(n, device=p.device).repeat_interleave(known.numel() // n if n else 0)
    counts = known != ignore
    if not bool(counts.all()):
        p, known, image = p[counts], known[counts], image[counts]
    confidence, decided = p.max(dim=1)
    right = decided == known
    chosen = p.gather(1, known[:, None]).squeeze(1).double()
    edges = torch.linspace(0, 1, _BINS + 1, device=p.device)
    bins = torch.bucketize(confidence, edges, right=True) - 1
    facts = torch.stack([torch.ones_like(chosen), confidence.double(), right.double()], dim=1)
    missed = (p.topk(min(5, classes)).indices != known[:, None]).all(dim=1)
    zeros = torch.zeros(n, dtype=torch.float64, device=p.device)
    return Counts(
        wrong=zeros.index_add(0, image, (~right).double()).cpu(),
        decisions=zeros.index_add(0, image, torch.ones_like(chosen)).cpu(),
        nll=-chosen.clamp_min(1e-12).log().sum().cpu(),
        bins=torch.zeros(_BINS + 1, 3, dtype=torch.float64, device=p.device).index_add(0, bins, facts).cpu(),
        outside=missed.sum().cpu(),
        confusion=torch.bincount(known * classes + decided, minlength=classes**2).view(classes, classes).cpu(),
    )


def check_labels(labels: object, places: torch.Size, classes: int, ignore: int = -100) -> None:
    """ConfigError unless these are classes, one for each decision."""
    if not isinstance(labels, Tensor) or labels.shape != places:
        given = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ConfigError(f"the labels have shape {given}, the predictions {list(places)}; they must agree")
    if labels.dtype != torch.int64:
        raise ConfigError(f"the labels are {labels.dtype}; give the numbers of classes as torch.int64 (labels.long())")
    wrong = (labels != ignore) & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        raise ConfigError(
            f"there is a label {int(labels[wrong][0])}, and the predictions have {classes} classes; give 0 to "
            f"{classes - 1}, or say with ignore= which label does not count"
        )


def scores_of(batches: Sequence[Counts]) -> Scores:
    """Of all batches together; at least one decision."""
    wrong, decisions = torch.cat([one.wrong for one in batches]), torch.cat([one.decisions for one in batches])
    total = decisions.sum()
    error = wrong.sum() / total
    bins = sum_of([one.bins for one in batches])
    return Scores(
        error=100.0 * float(error),
        error_se=100.0 * float((wrong - error * decisions).square().sum().sqrt() / total),
        nll=float(sum_of([one.nll for one in batches]) / total),
        ece=100.0 * float((bins[:, 1] - bins[:, 2]).abs().sum() / total),
        top5_error=100.0 * float(sum_of([one.outside for one in batches]) / total)
        if batches[0].confusion.shape[0] > 5
        else None,
    )


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """Their sum, in this order."""
    return torch.stack(list(parts)).sum(dim=0)


def score(probabilities: Tensor, labels: Tensor) -> Scores:
    """Scores of predicted probabilities Tensor[n, classes] against labels Tensor[n] int64, n >= 1."""
    return scores_of([counted(probabilities, labels)])


@dataclass(frozen=True)
class NumberScores:
    """Quality of one kind of inference of a regression.

    Attributes:
        rmse: root of the mean squared error, in units of the targets.
        rmse_se: its standard error over the inputs (of the mean square, by the delta method).
        mae: mean absolute error.
        nll: mean negative log likelihood of normal laws with `NumberPrediction.total_variance`, in nats; None where
            nothing tells a variance.
        coverage: share of the targets that lie in their 90% intervals, in percent; None likewise.
        coverage_se: its standard error over the inputs, in percent.
        width: mean width of these intervals.
    """

    rmse: float
    rmse_se: float
    mae: float
    nll: float | None
    coverage: float | None
    coverage_se: float | None
    width: float | None


class NumberCounts(NamedTuple):
    """Means of each of n inputs, float64 Tensor[n] on the CPU; of intervals None where nothing tells a variance."""

    square: Tensor
    absolute: Tensor
    nll: Tensor | None
    inside: Tensor | None
    width: Tensor | None


def counted_numbers(found: NumberPrediction, targets: Tensor) -> NumberCounts:
    """What is known of one batch; targets have the shape of `found.mean`."""
    targets = targets.to(found.mean.device, found.mean.dtype)

    def means(values: Tensor) -> Tensor:
        return values.double().flatten(1).mean(dim=1).cpu() if values.ndim > 1 else values.double().cpu()

    error = found.mean - targets
    if found.samples == 1 or (found.noise is None and found.samples < 2):
        return NumberCounts(means(error.square()), means(error.abs()), None, None, None)
    variance = found.total_variance.clamp_min(1e-12)
    low, high = found.interval(_LEVEL)
    return NumberCounts(
        square=means(error.square()),
        absolute=means(error.abs()),
        nll=means(0.5 * (error.square() / variance + variance.log() + math.log(2 * math.pi))),
        inside=means((low <= targets) & (targets <= high)),
        width=means(high - low),
    )


def number_scores_of(batches: Sequence[NumberCounts]) -> NumberScores:
    """Of all batches together; at least one input."""

    def joined(name: str) -> Tensor | None:
        parts = [getattr(one, name) for one in batches]
        return None if parts[0] is None else torch.cat(parts)

    def mean(name: str) -> float | None:
        values = joined(name)
        return None if values is None else float(values.mean())

    square, inside = torch.cat([one.square for one in batches]), joined("inside")
    n, rmse = len(square), math.sqrt(float(square.mean()))
    spread = float(square.std(correction=0)) / math.sqrt(n)
    return NumberScores(
        rmse=rmse,
        rmse_se=spread / (2 * rmse) if rmse else 0.0,
        mae=float(torch.cat([one.absolute for one in batches]).mean()),
        nll=mean("nll"),
        coverage=None if inside is None else 100.0 * float(inside.mean()),
        coverage_se=None if inside is None else 100.0 * float(inside.std(correction=0)) / math.sqrt(n),
        width=mean("width"),
    )
