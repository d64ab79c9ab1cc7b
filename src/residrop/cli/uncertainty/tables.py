"""The tables of `residrop evaluate --uncertainty`, for the terminal and for the page."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from residrop.cli.uncertainty.study import SHOWN, Study
from residrop.inference.uncertainty import Estimate, Kind
from residrop.inference.uncertainty.measures import Measure
from residrop.inference.uncertainty.scores import SCORES

__all__ = ["NAMES", "Table", "conformal", "corruptions", "measures", "ood", "selective"]

# name, decimals, unit
NAMES: dict[Measure, tuple[str, int, str]] = {
    "error": ("error", 2, "%"),
    "nll": ("NLL", 4, ""),
    "brier": ("Brier score", 4, ""),
    "ece": ("ECE, bins of equal width", 2, "%"),
    "ece_mass": ("ECE, bins of equally many images", 2, "%"),
    "aurc": ("AURC", 3, "%"),
    "coverage_at_1": ("coverage at 1% risk", 1, "%"),
    "coverage_at_5": ("coverage at 5% risk", 1, "%"),
}


class Table(NamedTuple):
    """Words for `residrop.cli.shared.table_of`; the first `words` columns are no numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int


def _cell(one: Estimate, decimals: int = 2, unit: str = "") -> str:
    return f"{one.value:.{decimals}f} ± {one.standard_error:.{decimals}f}{unit}"


def measures(found: Study) -> Table:
    """Every measure of every kind of inference."""
    rows = [
        (name, *(_cell(one.estimate(key), decimals, unit) for one in found.measured.values()))
        for key, (name, decimals, unit) in NAMES.items()
    ]
    return Table("measures, ± standard error over images", ("measure", *map(str, found.measured)), rows, 1)


def selective(found: Study) -> Table:
    """Every score of uncertainty for withholding predictions."""
    keys: tuple[Measure, ...] = ("aurc", "coverage_at_1", "coverage_at_5")
    rows = [
        (str(Kind(samples)), SCORES[score], *(_cell(one.estimate(key), *NAMES[key][1:]) for key in keys))
        for (samples, score), one in found.selective.items()
    ]
    headings = ("inference", "withheld by", *(NAMES[key][0] for key in keys))
    return Table("predictions withheld where uncertain", headings, rows, 2)


def ood(found: Study) -> Iterator[Table]:
    """For every foreign source every score."""
    for source, scores in found.detection.items():
        rows = [
            (
                str(Kind(samples)),
                SCORES[score],
                *(_cell(one[name], 1, "%") for name in ("auroc", "aupr", "fpr95")),
            )
            for (samples, score), one in scores.items()
        ]
        yield Table(f"told apart from {source}", ("inference", "score", "AUROC", "AUPR", "FPR95"), rows, 2)


def conformal(found: Study) -> Table:
    """Sets at the coverage that is shown."""
    rows = [
        (str(Kind(samples)), method.upper(), _cell(one["size"]), *(_cell(one[n], 1, "%") for n in ("covered", "empty")))
        for (samples, method, coverage), one in found.sets.items()
        if coverage == SHOWN
    ]
    headings = ("inference", "method", "classes in a set", "sets with the label", "empty sets")
    return Table(f"conformal sets that promise {SHOWN:.0%}", headings, rows, 2)


def corruptions(found: Study) -> Table:
    """Error and calibration against the strength."""
    kinds = [kind for kind in found.measured if kind.temperature == 1]
    keys: tuple[Measure, ...] = ("error", "ece")
    rows = [
        (
            kind,
            str(strength),
            *(_cell(both[one.samples].estimate(key), *NAMES[key][1:]) for key in keys for one in kinds),
        )
        for (kind, strength), both in found.corrupted.items()
    ]
    headings = ("corruption", "strength", *(f"{word}, {one}" for word in ("error", "ECE") for one in kinds))
    return Table("corrupted test images", headings, rows, 2)
