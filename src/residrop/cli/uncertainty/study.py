"""The measurements of `residrop evaluate --uncertainty`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from residrop.cli.uncertainty.sources import Foreign, HeldOut
from residrop.common.errors import ConfigError
from residrop.data import Loader
from residrop.data.corruptions import CORRUPTIONS, STRENGTHS, Corruption, corrupt
from residrop.inference.uncertainty import (
    Estimate,
    Kind,
    Measured,
    Predictions,
    Reliability,
    RiskCoverage,
    collect,
    fit_conformal,
    fit_temperature,
    measure,
    measure_detection,
    measure_sets,
    recommend,
    reliability,
    risk_coverage,
    with_temperature,
)
from residrop.inference.uncertainty.calibration import TEMPERATURES
from residrop.inference.uncertainty.conformal import METHODS, Method
from residrop.inference.uncertainty.measures import MEASURES
from residrop.inference.uncertainty.scores import ScoreName
from residrop.training.calibration import Fitted

__all__ = ["COVERAGES", "SHOWN", "Study", "study"]

COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # that conformal sets are fitted for
SHOWN = 0.9  # the one in tables
DRAWS = 200  # sets of images drawn for standard errors
FEW_DRAWS = 50  # the same for detection, and for each of 25 corrupted test sets

Meters = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]
Scored = tuple[int, ScoreName]  # sampled passes (0: one pass), score


@dataclass(eq=False)
class Study:
    """All that was measured on the test images of a run.

    Attributes:
        images: how many test images.
        fitted: temperatures and conformal predictors, by number of sampled passes.
        notes: what could not be fitted, and what was done to images.
        measured: every kind of inference.
        diagrams: their reliability diagrams, of bins of equal width and of equally many images.
        selective: every score of uncertainty for withholding predictions.
        curves: their risk-coverage curves.
        detection: of every foreign source every score.
        sets: conformal sets, by passes, method and promised coverage.
        corrupted: error and calibration under every corruption and strength, by passes.
    """

    images: int
    fitted: dict[int, Fitted]
    notes: list[str]
    measured: dict[Kind, Measured] = field(default_factory=dict[Kind, Measured])
    diagrams: dict[Kind, tuple[Reliability, Reliability]] = field(
        default_factory=dict[Kind, tuple[Reliability, Reliability]]
    )
    selective: dict[Scored, Measured] = field(default_factory=dict[Scored, Measured])
    curves: dict[Scored, RiskCoverage] = field(default_factory=dict[Scored, RiskCoverage])
    detection: dict[str, dict[Scored, dict[str, Estimate]]] = field(
        default_factory=dict[str, dict[Scored, dict[str, Estimate]]]
    )
    sets: dict[tuple[int, Method, float], dict[str, Estimate]] = field(
        default_factory=dict[tuple[int, Method, float], dict[str, Estimate]]
    )
    corrupted: dict[tuple[Corruption, int], dict[int, Measured]] = field(
        default_factory=dict[tuple[Corruption, int], dict[int, Measured]]
    )

    @property
    def recommendation(self) -> str:
        """One sentence; see `residrop.inference.uncertainty.recommend`."""
        return recommend(self.measured)

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON values."""
        return {
            "images": self.images,
            "fitted": {str(samples): one.to_dict() for samples, one in self.fitted.items()},
            "notes": self.notes,
            "measures": [{**_kind(kind), **_numbers(one)} for kind, one in self.measured.items()],
            "reliability": [
                {**_kind(kind), "bins": binning, **{name: part.tolist() for name, part in one._asdict().items()}}
                for kind, both in self.diagrams.items()
                for binning, one in zip(("width", "mass"), both, strict=True)
            ],
            "selective": [
                {"samples": samples, "score": score, **_numbers(one, ("aurc", "coverage_at_1", "coverage_at_5"))}
                for (samples, score), one in self.selective.items()
            ],
            "ood": [
                {"source": source, "samples": samples, "score": score, **_estimates(one)}
                for source, scores in self.detection.items()
                for (samples, score), one in scores.items()
            ],
            "conformal": [
                {"samples": samples, "method": method, "coverage": coverage, **_estimates(one)}
                for (samples, method, coverage), one in self.sets.items()
            ],
            "corruptions": [
                {"corruption": kind, "strength": strength, "samples": samples, **_numbers(one)}
                for (kind, strength), both in self.corrupted.items()
                for samples, one in both.items()
            ],
            "recommendation": self.recommendation,
        }


def _kind(kind: Kind) -> dict[str, Any]:
    return {"inference": str(kind), **kind._asdict()}


def _estimates(found: dict[str, Estimate]) -> dict[str, Any]:
    return {name: one._asdict() for name, one in found.items()}


def _numbers(found: Measured, names: tuple[Any, ...] = MEASURES) -> dict[str, Any]:
    return _estimates({name: found.estimate(name) for name in names})


def study(
    model: nn.Module,
    found: Predictions,
    test: Loader,
    held: HeldOut,
    foreign: list[Foreign],
    corruptions: bool,
    samples: int,
    meter: Meters,
) -> Study:
    """Fit on held-out images, then measure; `found` are the predictions of the test images."""

    def predicted(loader: Loader, what: str, change: Any = None) -> Predictions:
        with meter(loader.num_images, what) as tell:
            return collect(model, loader.eval_batches(change), samples, on_batch=tell)

    notes = [one.note for one in foreign if one.note]
    result = Study(len(found.labels), _fit(predicted(held.loader, "held-out images"), held.name, notes), notes)
    with meter(len(found.probabilities) + sum(map(len, found.scores.values())), "measuring") as tell:
        for done in _measured(result, found):
            tell(done)
    for one in foreign:
        outside = predicted(one.loader, one.name, one.change).scores
        again = sum(name.partition(" #")[0] == one.name for name in result.detection)  # folders of one name
        result.detection[f"{one.name} #{again + 1}" if again else one.name] = {
            (kind, score): measure_detection(values, outside[kind][score], repetitions=FEW_DRAWS)
            for kind, scores in found.scores.items()
            for score, values in scores.items()
        }
    for kind in CORRUPTIONS if corruptions else ():
        for strength in STRENGTHS:

            def change(pixels: Tensor, first: int, kind: Corruption = kind, strength: int = strength) -> Tensor:
                return corrupt(pixels, kind, strength, first=first)

            worse = predicted(test, f"{kind} {strength} of {len(STRENGTHS)}", change)
            result.corrupted[kind, strength] = {
                number: measure(p, worse.labels, repetitions=FEW_DRAWS) for number, p in worse.probabilities.items()
            }
    return result


def _fit(found: Predictions, source: str, notes: list[str]) -> dict[int, Fitted]:
    result: dict[int, Fitted] = {}
    for samples, p in found.probabilities.items():
        temperature = None
        try:
            temperature = fit_temperature(p, found.labels)
        except ConfigError as error:
            notes.append(f"no temperature for {Kind(samples)}: {error}")
        else:
            if not 1.01 * TEMPERATURES[0] < temperature < 0.99 * TEMPERATURES[1]:
                notes.append(f"temperature {temperature:.2f} of {Kind(samples)} is the limit of what is tried")
        conformal = tuple(
            fit_conformal(p, found.labels, coverage, method) for method in METHODS for coverage in COVERAGES
        )
        result[samples] = Fitted(temperature, conformal, len(found.labels), source)
    if lacking := [f"{one:g}" for one in COVERAGES if one > len(found.labels) / (len(found.labels) + 1)]:
        notes.append(
            f"{len(found.labels)} images are too few to promise a coverage of {', '.join(lacking)}: such sets hold all "
            "classes"
        )
    return result


def _measured(result: Study, found: Predictions) -> Iterator[int]:
    """Fill in what the predictions of the test images alone decide; gives the number of parts done, for a bar."""
    labels, done = found.labels, 0
    for samples, plain in found.probabilities.items():
        fitted = result.fitted[samples]
        for temperature in dict.fromkeys((1.0, fitted.temperature or 1.0)):
            kind, p = Kind(samples, temperature), with_temperature(plain, temperature)
            right = p.argmax(1) == labels
            result.measured[kind] = measure(p, labels, repetitions=DRAWS)
            result.diagrams[kind] = (
                reliability(p.amax(1), right),
                reliability(p.amax(1), right, binning="mass"),
            )
        for predictor in fitted.conformal:
            key = samples, predictor.method, predictor.coverage
            result.sets[key] = measure_sets(predictor, plain, labels)
        yield (done := done + 1)
        wrong = (plain.argmax(1) != labels).double()
        for score, values in found.scores[samples].items():
            result.selective[samples, score] = measure(plain, labels, values, repetitions=DRAWS)
            result.curves[samples, score] = risk_coverage(values, wrong)
            yield (done := done + 1)
