"""The pictures of `residrop evaluate --uncertainty`, one of each kind of measure."""

from pathlib import Path
from typing import Any

from residrop.cli.pictures import panels
from residrop.cli.uncertainty.study import COVERAGES, Study
from residrop.data.corruptions import STRENGTHS, Corruption
from residrop.inference.uncertainty import Kind
from residrop.inference.uncertainty.conformal import Method
from residrop.inference.uncertainty.measures import Measure
from residrop.inference.uncertainty.scores import SCORES

__all__ = ["PICTURES", "draw"]

PICTURES = ("reliability", "risk-coverage", "conformal", "ood", "corruptions")
_DRAWN: dict[Measure, str] = {"error": "error", "ece": "ECE"}
_OPTION = "--uncertainty:"
_DASHES: dict[Method, str] = {"thr": "-", "aps": "--", "raps": ":"}


def draw(folder: Path, found: Study, title: str) -> dict[str, Path]:
    """Draw what was measured into a folder; gives the files by the name of the picture."""
    made = {"reliability": _reliability, "risk-coverage": _risk_coverage, "conformal": _conformal}
    if found.detection:
        made["ood"] = _ood
    if found.corrupted:
        made["corruptions"] = _corruptions
    paths = {name: folder / f"{name}.png" for name in made}
    for name, path in paths.items():
        made[name](path, found, title)
    return paths


def _reliability(path: Path, found: Study, title: str) -> None:
    with panels(path, len(found.diagrams), f"reliability, {title}", _OPTION) as axes:
        for one, (kind, (width, mass)) in zip(axes, found.diagrams.items(), strict=True):
            one.plot([0, 1], [0, 1], color="grey", linewidth=1)
            share = width.images / width.images.sum()
            one.scatter(
                width.confidence, width.accuracy, s=20 + 400 * share, alpha=0.6, label="equal width (area: images)"
            )
            one.plot(mass.confidence, mass.accuracy, "C1.-", linewidth=1.2, label="equally many images")
            one.set(title=str(kind), xlabel="mean confidence", ylabel="share of right decisions")
            one.set(xlim=(-0.02, 1.05), ylim=(-0.02, 1.05))


def _risk_coverage(path: Path, found: Study, title: str) -> None:
    with panels(path, 1, f"error among the predictions kept, {title}", _OPTION) as (axes,):
        for (samples, score), curve in found.curves.items():
            dashes = "-" if samples else "--"
            axes.plot(
                100 * curve.coverage,
                100 * curve.risk,
                dashes,
                color=f"C{list(SCORES).index(score)}",
                linewidth=1.4,
                label=f"{Kind(samples)}: {SCORES[score]}",
            )
        axes.set(xlabel="coverage: predictions kept, the most certain first (%)", ylabel="error among them (%)")
        axes.set(ylim=(0, None))


def _conformal(path: Path, found: Study, title: str) -> None:
    with panels(path, 2, f"conformal sets, {title}", _OPTION) as (sizes, covered):
        covered.plot([50, 100], [50, 100], color="grey", linewidth=1)
        for number, samples in enumerate(found.fitted):
            for method, dashes in _DASHES.items():
                points: Any = [found.sets[samples, method, coverage] for coverage in COVERAGES]
                for axes, name in ((sizes, "size"), (covered, "covered")):
                    axes.errorbar(
                        [100 * one for one in COVERAGES],
                        [one[name].value for one in points],
                        yerr=[one[name].standard_error for one in points],
                        color=f"C{number}",
                        linestyle=dashes,
                        linewidth=1.4,
                        capsize=2,
                        label=f"{Kind(samples)}: {method.upper()}",
                    )
        sizes.set(xlabel="coverage promised (%)", ylabel="classes in a set (mean ± standard error)")
        covered.set(xlabel="coverage promised (%)", ylabel="sets with the label (%)")


def _ood(path: Path, found: Study, title: str) -> None:
    with panels(path, len(found.detection), f"foreign images, {title}", _OPTION) as axes:
        for one, (source, scores) in zip(axes, found.detection.items(), strict=True):
            names = [f"{Kind(samples)}:\n{SCORES[score]}" for samples, score in scores]
            values = [each["auroc"] for each in scores.values()]
            one.barh(
                range(len(names)),
                [each.value for each in values],
                xerr=[each.standard_error for each in values],
                color=[f"C{list(SCORES).index(score)}" for _, score in scores],
                capsize=2,
            )
            one.axvline(50, color="grey", linewidth=1)
            one.set_yticks(range(len(names)), names, fontsize=8)
            one.invert_yaxis()
            one.set(title=source, xlabel="AUROC (%)", xlim=(0, 100))


def _corruptions(path: Path, found: Study, title: str) -> None:
    names: list[Corruption] = list(dict.fromkeys(kind for kind, _ in found.corrupted))
    plain = [kind for kind in found.measured if kind.temperature == 1]
    with panels(path, 2 * len(names), f"corrupted test images, {title}", _OPTION) as axes:
        for row, name in enumerate(names):
            for one, (key, word) in zip(axes[2 * row : 2 * row + 2], _DRAWN.items(), strict=True):
                for number, kind in enumerate(plain):
                    parts = [found.measured[kind], *(found.corrupted[name, s][kind.samples] for s in STRENGTHS)]
                    points = [part.estimate(key) for part in parts]
                    one.errorbar(
                        (0, *STRENGTHS),
                        [point.value for point in points],
                        yerr=[point.standard_error for point in points],
                        color=f"C{number}",
                        capsize=2,
                        linewidth=1.4,
                        label=str(kind),
                    )
                one.set(title=name, xlabel="strength (0: as they are)", ylabel=f"{word} (%)", ylim=(0, None))
