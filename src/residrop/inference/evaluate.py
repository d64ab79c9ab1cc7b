"""How good a network's predictions are, both ways, over a labelled set."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from residrop.common.checks import check_whole
from residrop.common.extras import extra
from residrop.inference.sampled.predict import Prediction, predict

__all__ = ["ClassScores", "Evaluation", "Scores", "evaluate", "score"]


@dataclass(frozen=True)
class Scores:
    """Quality of one kind of inference.

    Attributes:
        error: share of wrong decisions in percent.
        error_se: its standard error over the images (binomial), in percent.
        nll: mean negative log likelihood in nats.
        ece: expected calibration error in percent, 15 bins (Guo et al. 2017).
        top5_error: share of images whose class is none of the five likeliest, in percent; None for five classes or
            fewer.
    """

    error: float
    error_se: float
    nll: float
    ece: float
    top5_error: float | None = None


@dataclass(frozen=True)
class ClassScores:
    """How the images of one class fare.

    Attributes:
        images: how many there are.
        error: share of wrong decisions in percent; None without images.
        taken_for: number of the other class that most of them were taken for; None if no decision was wrong.
        taken: how many were taken for that class.
    """

    images: int
    error: float | None
    taken_for: int | None
    taken: int


@dataclass(frozen=True)
class Evaluation:
    """Deterministic and sampled quality on the same images.

    Attributes:
        deterministic: scores of the expectation.
        sampled: scores of the average over `samples` passes; None if samples is 0.
        samples: number of sampled passes.
        single_pass_error: mean error of the single passes in percent; None if samples is 0.
        single_pass_error_se: standard error of that mean over the passes, in percent; None below 2 samples.
        probability_se: mean over images of the standard error of the winning class's probability; None below 2
            samples.
        images: number of images.
        confusion: int64 Tensor[classes, classes], how many images of a class (row) were taken for which (column), in
            expectation.
    """

    deterministic: Scores
    sampled: Scores | None
    samples: int
    single_pass_error: float | None
    single_pass_error_se: float | None
    probability_se: float | None
    images: int
    confusion: Tensor = field(compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All fields but `confusion` as JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "confusion"}

    def by_class(self) -> list[ClassScores]:
        """Errors in expectation, class by class."""
        counts = self.confusion.sum(1)
        wrong = self.confusion.clone().fill_diagonal_(0)
        return [
            ClassScores(
                images=images,
                error=100.0 * sum(row) / images if images else None,
                taken_for=max(range(len(row)), key=row.__getitem__) if any(row) else None,
                taken=max(row),
            )
            for images, row in zip(counts.tolist(), wrong.tolist(), strict=True)
        ]


def score(probabilities: Tensor, labels: Tensor) -> Scores:
    """Scores of predicted probabilities Tensor[n, classes] against labels Tensor[n] int64, n >= 1."""
    with extra("train"):  # torchmetrics takes seconds to import, which no other part of residrop should pay
        from torchmetrics.functional.classification import multiclass_calibration_error

    n = len(labels)
    wrong = float((probabilities.argmax(dim=1) != labels).double().mean())
    chosen = probabilities.gather(1, labels[:, None]).squeeze(1).double()
    classes = probabilities.shape[1]
    top5 = None
    if classes > 5:
        top5 = 100.0 * float((probabilities.topk(5).indices != labels[:, None]).all(1).double().mean())
    ece = multiclass_calibration_error(probabilities, labels, num_classes=classes, n_bins=15)
    return Scores(
        error=100.0 * wrong,
        error_se=100.0 * math.sqrt(wrong * (1.0 - wrong) / n),
        nll=float(-chosen.clamp_min(1e-12).log().mean()),
        ece=100.0 * float(ece),
        top5_error=top5,
    )


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    samples: int = 30,
    *,
    on_batch: Callable[[int], None] | None = None,
    on_predictions: Callable[[Tensor, Prediction, Prediction | None], None] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Evaluation:
    """Evaluate deterministic and sampled inference on labelled batches.

    Args:
        model: an attached network, in any mode; its flags are left as they were.
        batches: pairs (x Tensor[n, ...], labels Tensor[n] int64), at least one image in all.
        samples: sampled passes per batch; 0 skips sampled inference.
        on_batch: called with the number of images done after every batch (for progress bars).
        on_predictions: called after every batch of this rank with its labels and predictions, in one pass and sampled
            (None where samples is 0), such as `residrop.inference.uncertainty.Collector.add`.
        share: (r, k) if k ranks (of the default process group) call this together and the batches of rank r are numbers
            r, r + k, ... of all; every rank returns the evaluation of all.
    """
    check_whole("samples", samples, least=0)
    rank, ranks = share
    found: list[_Batch] = []
    done = 0
    for number, (x, y) in enumerate(batches):
        expected = predict(model, x, samples=0)
        sampled = predict(model, x, samples, first=(rank + number * ranks) * samples, keep=False) if samples else None
        found.append(_summary_of_batch(y, expected, sampled))
        if on_predictions:
            on_predictions(y, expected, sampled)
        done += len(y)
        if on_batch:
            on_batch(done)
    if ranks == 1:
        return _summary(found, samples)
    every: list[list[_Batch]] | None = [[]] * ranks if rank == 0 else None
    dist.gather_object(found, every, dst=0)
    result = [None if every is None else _summary(_interleaved(every), samples)]
    dist.broadcast_object_list(result, src=0)
    (summary,) = result
    assert summary is not None
    return summary


class _Batch(NamedTuple):
    """What is found about a batch of n images, on the CPU."""

    labels: Tensor  # [n]
    expected: Tensor  # probabilities [n, classes]
    averaged: Tensor | None  # the same over the samples
    spread: Tensor | None  # standard errors of the winning class's [n]
    wrong: Tensor | None  # wrong decisions of each sample [samples]


def _summary_of_batch(y: Tensor, expected: Prediction, result: Prediction | None) -> _Batch:
    once = expected.probabilities.cpu()
    if result is None:
        return _Batch(y.cpu(), once, None, None, None)
    spread = result.standard_error.gather(1, result.classes[:, None]).squeeze(1).cpu()
    wrong = (result.sample_classes != y.to(result.sample_classes.device)).sum(dim=1).cpu()
    return _Batch(y.cpu(), once, result.probabilities.cpu(), spread, wrong)


def _interleaved(every: list[list[_Batch]]) -> list[_Batch]:
    """The batches of all ranks in the order of one process."""
    return [batch for turn in zip_longest(*every) for batch in turn if batch is not None]


def _summary(found: list[_Batch], samples: int) -> Evaluation:
    truth = torch.cat([batch.labels for batch in found])
    expected = torch.cat([batch.expected for batch in found])
    deterministic, confusion = score(expected, truth), _confusion(expected, truth)
    if not samples:
        return Evaluation(deterministic, None, 0, None, None, None, len(truth), confusion)
    wrong = torch.stack([batch.wrong for batch in found if batch.wrong is not None]).double().sum(dim=0)
    single = 100.0 * wrong / len(truth)
    spread = torch.cat([batch.spread for batch in found if batch.spread is not None])
    return Evaluation(
        deterministic=deterministic,
        sampled=score(torch.cat([batch.averaged for batch in found if batch.averaged is not None]), truth),
        samples=samples,
        single_pass_error=float(single.mean()),
        single_pass_error_se=float(single.std() / math.sqrt(samples)) if samples > 1 else None,
        probability_se=float(spread.mean()) if samples > 1 else None,
        images=len(truth),
        confusion=confusion,
    )


def _confusion(probabilities: Tensor, labels: Tensor) -> Tensor:
    with extra("train"):
        from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(probabilities, labels, num_classes=probabilities.shape[1])
