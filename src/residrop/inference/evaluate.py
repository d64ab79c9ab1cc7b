"""How good a network's predictions are, both ways, over a labelled set."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError
from residrop.inference.sampled.outputs import Kinds, Outputs
from residrop.inference.sampled.predict import predicted
from residrop.inference.sampled.predictions import DetectionPrediction, NumberPrediction, Prediction
from residrop.inference.scores import (
    Counts,
    NumberCounts,
    NumberScores,
    Scores,
    check_labels,
    counted,
    counted_numbers,
    number_scores_of,
    scores_of,
    sum_of,
)

__all__ = ["ClassScores", "Evaluation", "NumberEvaluation", "evaluate"]


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
    """Deterministic and sampled quality on the same images; of dense outputs over all their places.

    Attributes:
        deterministic: scores of the expectation.
        sampled: scores of the average over `samples` passes; None if samples is 0.
        samples: number of sampled passes.
        single_pass_error: mean error of the single passes in percent; None if samples is 0.
        single_pass_error_se: standard error of that mean over the passes, in percent; None below 2 samples.
        probability_se: mean over decisions of the standard error of the winning class's probability; None below 2
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


@dataclass(frozen=True)
class NumberEvaluation:
    """Deterministic and sampled quality of a regression on the same inputs.

    Attributes:
        deterministic: scores of the expectation.
        sampled: scores of the average over `samples` passes; None if samples is 0.
        samples: number of sampled passes.
        inputs: number of inputs.
    """

    deterministic: NumberScores
    sampled: NumberScores | None
    samples: int
    inputs: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    samples: int = 30,
    *,
    outputs: Outputs = None,
    kind: Kinds = None,
    dropout: bool = False,
    flips: bool = False,
    ignore: int = -100,
    on_batch: Callable[[int], None] | None = None,
    on_predictions: Callable[[Tensor, Prediction, Prediction | None], None] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Any:
    """Evaluate deterministic and sampled inference on labelled batches.

    Args:
        model: an attached network, in any mode; its flags are left as they were.
        batches: pairs (x, labels), at least one image in all. x is what `predict` takes. Labels are int64 Tensor[n] of
            classes, with the places of dense outputs behind (pixels [n, H, W], tokens [n, T]); of numbers a tensor like
            the model's; of several heads a mapping by their names.
        samples: sampled passes per batch; 0 skips sampled inference.
        outputs: as in `predict`.
        kind: as in `predict`; not "detections", which `torchmetrics.detection.MeanAveragePrecision` scores.
        dropout: as in `predict`.
        flips: as in `predict`.
        ignore: label of places (or images) that do not count.
        on_batch: called with the number of images done after every batch (for progress bars).
        on_predictions: called after every batch of this rank with its labels and predictions, in one pass and sampled
            (None where samples is 0), such as `residrop.inference.uncertainty.Collector.add`.
        share: (r, k) if k ranks (of the default process group) call this together and the batches of rank r are numbers
            r, r + k, ... of all; every rank returns the evaluation of all.

    Returns:
        An `Evaluation`, of numbers a `NumberEvaluation`, of several heads a dict of these.

    Raises:
        ConfigError: labels that do not fit the predictions, or detections; and what `predict` raises.
    """
    check_whole("samples", samples, least=0)
    rank, ranks = share
    options: dict[str, Any] = {"outputs": outputs, "kind": kind, "dropout": dropout, "flips": flips}
    found: list[_Batch] = []
    done = 0
    for number, (x, y) in enumerate(batches):
        expected, sampled = predicted(model, x, 0, **options), None
        heads = _heads(expected, y, ignore)  # labels that do not fit are refused before passes are made
        passes: list[tuple[Any, ...]] = []
        if samples:
            first = (rank + number * ranks) * samples
            sampled = predicted(
                model, x, samples, first=first, on_pass=_wrong_of(expected, y, ignore, passes), **options
            )
        found.append(_Batch(heads, _heads(sampled, y, ignore), passes))
        if on_predictions:
            on_predictions(y, expected, sampled)
        done += len(next(iter(y.values())) if isinstance(y, Mapping) else y)
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


class _Spread(NamedTuple):
    """Of one head of a batch: sums, and the sum of the standard errors of the winning classes' probabilities."""

    counts: Counts | NumberCounts
    standard_error: Tensor


class _Batch(NamedTuple):
    """What is found about a batch, on the CPU: of every head in expectation and sampled; wrong decisions by pass."""

    expected: dict[str | None, _Spread]
    sampled: dict[str | None, _Spread]
    wrong: list[tuple[Any, ...]]


def _by_head(found: Any) -> dict[str | None, Any]:
    return found if isinstance(found, dict) else {None: found}


def _labels_of(name: str | None, y: Any) -> Tensor:
    found: Any = y if name is None else y.get(name) if isinstance(y, Mapping) else None
    if found is None:
        raise ConfigError(f"the labels have nothing for output {name!r}; give a mapping by the names of the outputs")
    return found


def _heads(found: Any, y: Any, ignore: int) -> dict[str | None, _Spread]:
    if found is None:
        return {}
    return {name: _spread(one, _labels_of(name, y), ignore) for name, one in _by_head(found).items()}


def _spread(found: Any, labels: Tensor, ignore: int) -> _Spread:
    if isinstance(found, DetectionPrediction):
        raise ConfigError(
            "detections are scored by torchmetrics.detection.MeanAveragePrecision, which takes "
            "[one._asdict() for one in residrop.predict(...).images]"
        )
    if isinstance(found, NumberPrediction):
        if not isinstance(labels, Tensor) or labels.shape != found.mean.shape:
            given = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ConfigError(f"the targets have shape {given}, the predictions {list(found.mean.shape)}")
        return _Spread(counted_numbers(found, labels), torch.zeros(()))
    check_labels(labels, found.classes.shape, found.probabilities.shape[found.class_dim], ignore)
    counts = counted(found.probabilities.movedim(found.class_dim, -1), labels, ignore)
    errors = found.standard_error.gather(found.class_dim, found.classes.unsqueeze(found.class_dim))
    used = (labels != ignore).to(errors.device)
    return _Spread(counts, errors.squeeze(found.class_dim)[used].double().sum().cpu())


def _wrong_of(expected: Any, y: Any, ignore: int, passes: list[tuple[Any, ...]]) -> Callable[[tuple[Any, ...]], None]:
    """What notes the number of wrong decisions of every pass, of all heads (None of those that decide nothing)."""
    heads = [
        (_labels_of(name, y), one.class_dim if isinstance(one, Prediction) else None)
        for name, one in _by_head(expected).items()
    ]

    def note(values: tuple[Any, ...]) -> None:
        wrong: list[Tensor | None] = []
        for value, (labels, dim) in zip(values, heads, strict=True):
            if dim is None:
                wrong.append(None)
                continue
            known = labels.to(value.device)
            wrong.append(((value.argmax(dim=dim) != known) & (known != ignore)).sum().cpu())
        passes.append(tuple(wrong))

    return note


def _interleaved(every: list[list[_Batch]]) -> list[_Batch]:
    """The batches of all ranks in the order of one process."""
    return [batch for turn in zip_longest(*every) for batch in turn if batch is not None]


def _summary(found: list[_Batch], samples: int) -> Any:
    if not found:
        raise ConfigError("there are no images to evaluate; give at least one batch")
    results = {name: _of_head(found, name, place, samples) for place, name in enumerate(found[0].expected)}
    return results.get(None, results)


def _of_head(found: list[_Batch], name: str | None, place: int, samples: int) -> Evaluation | NumberEvaluation:
    expected: list[Any] = [batch.expected[name].counts for batch in found]
    sampled: list[Any] = [batch.sampled[name].counts for batch in found if samples]
    if isinstance(expected[0], NumberCounts):
        inputs = sum(len(one.square) for one in expected)
        return NumberEvaluation(
            number_scores_of(expected), number_scores_of(sampled) if samples else None, samples, inputs
        )
    deterministic, confusion = scores_of(expected), sum_of([one.confusion for one in expected])
    images = sum(len(one.wrong) for one in expected)
    if not samples:
        return Evaluation(deterministic, None, 0, None, None, None, images, confusion)
    decisions = sum_of([one.decisions.sum() for one in sampled])
    wrong = torch.tensor([[one[place] for one in batch.wrong] for batch in found], dtype=torch.float64).sum(dim=0)
    single = 100.0 * wrong / decisions
    spread = sum_of([batch.sampled[name].standard_error for batch in found]) / decisions
    return Evaluation(
        deterministic=deterministic,
        sampled=scores_of(sampled),
        samples=samples,
        single_pass_error=float(single.mean()),
        single_pass_error_se=float(single.std() / math.sqrt(samples)) if samples > 1 else None,
        probability_se=float(spread) if samples > 1 else None,
        images=images,
        confusion=confusion,
    )
