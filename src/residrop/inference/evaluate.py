"""How good a network's predictions are, both ways, over a labelled set."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residrop.inference.predict import predict
from residrop.survival import check_whole

__all__ = ["Evaluation", "Scores", "evaluate", "score"]


@dataclass(frozen=True)
class Scores:
    """Quality of one kind of inference.

    Attributes:
        error: share of wrong decisions in percent.
        error_se: its standard error over the images (binomial), in percent.
        nll: mean negative log likelihood in nats.
        ece: expected calibration error in percent, 15 bins (Guo et al. 2017).
    """

    error: float
    error_se: float
    nll: float
    ece: float


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
    """

    deterministic: Scores
    sampled: Scores | None
    samples: int
    single_pass_error: float | None
    single_pass_error_se: float | None
    probability_se: float | None
    images: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def score(probabilities: Tensor, labels: Tensor) -> Scores:
    """Scores of predicted probabilities Tensor[n, classes] against labels Tensor[n] int64, n >= 1."""
    # torchmetrics takes seconds to import, which no other part of residrop should pay
    from torchmetrics.functional.classification import multiclass_calibration_error

    n = len(labels)
    wrong = float((probabilities.argmax(dim=1) != labels).double().mean())
    chosen = probabilities.gather(1, labels[:, None]).squeeze(1).double()
    ece = multiclass_calibration_error(probabilities, labels, num_classes=probabilities.shape[1], n_bins=15)
    return Scores(
        error=100.0 * wrong,
        error_se=100.0 * math.sqrt(wrong * (1.0 - wrong) / n),
        nll=float(-chosen.clamp_min(1e-12).log().mean()),
        ece=100.0 * float(ece),
    )


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    samples: int = 30,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate deterministic and sampled inference on labelled batches.

    Args:
        model: an attached network, in any mode; its flags are left as they were.
        batches: pairs (x Tensor[n, ...], labels Tensor[n] int64), at least one image in all.
        samples: sampled passes per batch; 0 skips sampled inference.
        on_batch: called with the number of images done after every batch (for progress bars).
    """
    check_whole("samples", samples, least=0)
    expected: list[Tensor] = []
    averaged: list[Tensor] = []
    labels: list[Tensor] = []
    spread: list[Tensor] = []
    wrong = torch.zeros(samples, dtype=torch.float64)
    done = 0
    for number, (x, y) in enumerate(batches):
        expected.append(predict(model, x, samples=0).probabilities.cpu())
        labels.append(y.cpu())
        if samples:
            result = predict(model, x, samples, first=number * samples)
            averaged.append(result.probabilities.cpu())
            spread.append(result.standard_error.gather(1, result.classes[:, None]).squeeze(1).cpu())
            wrong += (result.sample_classes != y.to(result.sample_classes.device)).sum(dim=1).cpu()
        done += len(y)
        if on_batch:
            on_batch(done)
    truth = torch.cat(labels)
    deterministic = score(torch.cat(expected), truth)
    if not samples:
        return Evaluation(deterministic, None, 0, None, None, None, done)
    single = 100.0 * wrong / done
    return Evaluation(
        deterministic=deterministic,
        sampled=score(torch.cat(averaged), truth),
        samples=samples,
        single_pass_error=float(single.mean()),
        single_pass_error_se=float(single.std() / math.sqrt(samples)) if samples > 1 else None,
        probability_se=float(torch.cat(spread).mean()) if samples > 1 else None,
        images=done,
    )
