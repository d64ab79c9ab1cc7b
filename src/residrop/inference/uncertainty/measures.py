"""All measures of one kind of inference on labelled images, with standard errors over the images."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from residrop.inference.uncertainty.bootstrap import bootstrap, resamples
from residrop.inference.uncertainty.calibration import brier, calibration_error, negative_log_likelihood
from residrop.inference.uncertainty.conformal import Conformal
from residrop.inference.uncertainty.inputs import check_labelled
from residrop.inference.uncertainty.ood import Detection, detection
from residrop.inference.uncertainty.selective import risk_coverage
from residrop.schedule.sampler import derive_key

__all__ = ["MEASURES", "Estimate", "Measure", "Measured", "measure", "measure_detection", "measure_sets"]

Measure = Literal["error", "nll", "brier", "ece", "ece_mass", "aurc", "coverage_at_1", "coverage_at_5"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


class Estimate(NamedTuple):
    """A number and its standard error over the images."""

    value: float
    standard_error: float


class Measured(NamedTuple):
    """Measures of one kind of inference. All but NLL (nats) and Brier score are in percent.

    Attributes:
        values: by name: `error` (wrong decisions), `nll`, `brier`, `ece` and `ece_mass` (calibration errors with 15
            bins of equal width and of equally many images), `aurc` (area under the risk-coverage curve),
            `coverage_at_1` and `coverage_at_5` (largest share of images with at most 1 or 5% errors among them).
        draws: Tensor[repetitions, measures], the same of sets of images drawn with replacement.
    """

    values: dict[Measure, float]
    draws: Tensor

    def estimate(self, name: Measure) -> Estimate:
        """A measure with its standard error."""
        return Estimate(self.values[name], float(self.draws[:, MEASURES.index(name)].std()))

    def less(self, other: "Measured", name: Measure) -> Estimate:
        """A measure of this less that of another inference on the same images; both saw the same drawn sets."""
        column = MEASURES.index(name)
        spread = (self.draws[:, column] - other.draws[:, column]).std()
        return Estimate(self.values[name] - other.values[name], float(spread))


def measure(
    probabilities: Tensor,
    labels: Tensor,
    uncertainty: Tensor | None = None,
    *,
    repetitions: int = 200,
    seed: int = 0,
) -> Measured:
    """Measure predictions of labelled images.

    Args:
        probabilities: Tensor[n, classes].
        labels: int64 Tensor[n].
        uncertainty: Tensor[n], by which images are withheld for `aurc` and coverages; default: 1 - largest probability.
        repetitions: sets of images drawn for standard errors.
        seed: of these sets; measures under one seed can be compared pair by pair.

    Raises:
        ConfigError: bad arguments.
    """
    check_labelled(probabilities, labels)
    confidence, decision = (one.cpu() for one in probabilities.max(1))
    right = decision == labels.cpu()
    nll, squares = negative_log_likelihood(probabilities, labels).cpu(), brier(probabilities, labels).cpu()
    doubt = 1 - confidence if uncertainty is None else uncertainty.cpu()
    wrong = (~right).double()

    def values(index: Tensor) -> list[float]:
        sure, hits = confidence[index], right[index]
        curve = risk_coverage(doubt[index], wrong[index])
        return [
            100 * float(wrong[index].mean()),
            float(nll[index].mean()),
            float(squares[index].mean()),
            100 * calibration_error(sure, hits),
            100 * calibration_error(sure, hits, binning="mass"),
            100 * curve.area,
            100 * curve.coverage_at(0.01),
            100 * curve.coverage_at(0.05),
        ]

    images = len(labels)
    found = values(torch.arange(images))
    return Measured(
        dict(zip(MEASURES, found, strict=True)), bootstrap(values, images, repetitions=repetitions, seed=seed)
    )


def measure_detection(inside: Tensor, outside: Tensor, *, repetitions: int = 100, seed: int = 0) -> dict[str, Estimate]:
    """`detection` in percent, by name, with standard errors over the images: each kind is drawn again by itself.

    Arguments and errors are those of `detection` and `bootstrap`.
    """
    found = detection(inside, outside)
    inside, outside = inside.cpu(), outside.cpu()
    pairs = zip(
        resamples(len(inside), repetitions, derive_key(seed, 0)),
        resamples(len(outside), repetitions, derive_key(seed, 1)),
        strict=True,
    )
    draws = torch.tensor([detection(inside[one], outside[other]) for one, other in pairs], dtype=torch.float64)
    spread = (100 * draws.std(0)).tolist()
    return {name: Estimate(100 * one, se) for name, one, se in zip(Detection._fields, found, spread, strict=True)}


def measure_sets(predictor: Conformal, probabilities: Tensor, labels: Tensor) -> dict[str, Estimate]:
    """Mean size of conformal sets (`size`), how many hold the label and are empty (`covered`, `empty`, in percent).

    Standard errors are those of a mean over the images. Arguments and errors are those of `Conformal.sets`.
    """
    check_labelled(probabilities, labels)
    sets = predictor.sets(probabilities)
    sizes = sets.sum(1).double()
    columns: dict[str, Tensor] = {
        "size": sizes,
        "covered": 100 * sets.gather(1, labels[:, None]).squeeze(1).double(),
        "empty": 100 * (sizes == 0).double(),
    }
    return {
        name: Estimate(float(one.mean()), float(one.std(correction=0)) / len(one) ** 0.5)
        for name, one in columns.items()
    }
