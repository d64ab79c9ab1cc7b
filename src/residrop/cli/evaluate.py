"""`residrop evaluate`: both kinds of inference, adaptive sampling, error against the number of samples."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from residrop.blocks.attach import expected_depth_of
from residrop.cli.pictures import panels
from residrop.cli.shared import Device, Json, RunPath, Weights, open_run, parse, show, table_of
from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError
from residrop.common.output import check_target, console_for, write
from residrop.inference import (
    AdaptiveEvaluation,
    ClassScores,
    ErrorCurve,
    Evaluation,
    error_curve,
    evaluate,
    evaluate_adaptive,
)
from residrop.inference.sampled.adaptive import check_confidence
from residrop.training import Outcome
from residrop.training.logbook import Meter
from residrop.training.setup import choose_device, loader_of_run, precision_context

__all__ = ["run"]


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained run on its test images: in expectation (one pass) and averaged over sampled passes."""

    run: RunPath
    samples: int = 30
    """Sampled passes; 0 leaves sampled inference out."""
    adaptive: bool = False
    """Also sample every image only while its decision is open, and compare with all --samples passes."""
    confidence: float = 0.95
    """With --adaptive: probability, of every image, that its decision is that of all --samples passes."""
    curve: bool = False
    """Also draw the error against the number of samples into the run directory (samples.png)."""
    repetitions: int = 5
    """With --curve: sets of --samples passes, for standard errors."""
    classes: bool = False
    """Also print a table of the classes and draw the confusion matrix into the run directory (confusion.png)."""
    uncertainty: bool = False
    """Also measure how far the uncertainty can be relied on: calibration with and without a temperature, predictions
    withheld, conformal sets. Writes tables and pictures into the run directory (uncertainty.html) and what was fitted
    on the validation images (calibration.json), which residrop predict and export apply."""
    calibration: str | None = None
    """With --uncertainty: a source of labelled images to fit on, in place of the run's validation images: its test
    part, which must be neither trained nor tested on."""
    ood: tuple[str, ...] = ()
    """With --uncertainty: sources of foreign images, which should be told apart; "rotated" is the test images turned
    by 90 degrees."""
    corruptions: bool = False
    """With --uncertainty: also error and calibration under five corruptions at five strengths: 25 more evaluations."""
    weights: Weights = "model"
    data: str | None = None
    """Another source of test images with the same classes."""
    device: Device = "auto"
    json: Json = None


def run(arguments: Sequence[str], prog: str) -> int:
    """Evaluate a run in expectation and by sampling, and what else the options ask for."""
    args = parse(Evaluate, arguments, prog)
    check_whole("samples", args.samples, least=0)
    check_whole("repetitions", args.repetitions, least=1)
    check_confidence(args.confidence)
    if args.samples == 0 and (args.adaptive or args.curve):
        what = "--adaptive" if args.adaptive else "--curve"
        raise ConfigError(f"samples is 0, but {what} needs sampled passes; give at least 1")
    if not args.uncertainty and (given := [one for one in ("ood", "corruptions", "calibration") if getattr(args, one)]):
        raise ConfigError(f"--{given[0]} is part of --uncertainty; add it, or leave --{given[0]} out")
    check_target(args.json)
    run, model = open_run(args.run, args.weights)
    if args.curve:
        check_target(args.run / "samples.png", "--curve:")
    if args.classes:
        check_target(args.run / "confusion.png", "--classes:")
    recipe, device = run.recipe(), choose_device(args.device)
    model.to(device)
    loader = loader_of_run(run, args.data, device)
    work = None
    if args.uncertainty:
        from residrop.cli.uncertainty.work import Work

        work = Work(run, args.weights, loader, args.calibration, args.ood, args.corruptions, device)
    values: dict[str, Any] = {}
    adaptive = curve = study = None
    with precision_context(recipe, device)():
        with _meter(loader.num_images, "evaluating") as tell:
            found = evaluate(
                model, loader.eval_batches(), args.samples, on_batch=tell, on_predictions=work and work.collector.add
            )
        if args.adaptive:
            with _meter(loader.num_images, "adaptive sampling") as tell:
                adaptive = evaluate_adaptive(
                    model,
                    loader.eval_batches(),
                    confidence=args.confidence,
                    max_samples=args.samples,
                    on_batch=tell,
                )
            values["adaptive"] = adaptive.to_dict()
        if args.curve:
            with _meter(loader.num_images, "error against samples") as tell:
                curve = error_curve(model, loader.eval_batches(), args.samples, args.repetitions, on_batch=tell)
            values["curve"] = curve.to_dict()
        if work is not None:
            study = work.carry_out(model, args.samples, _meter)
            values["uncertainty"] = study.to_dict()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    outcome = Outcome(run, found, parameters, run.train_seconds(), expected_depth_of(model), [])
    facts = {"parameters": f"{parameters:,}", "expected depth": f"{outcome.expected_depth:.2f} blocks"}
    if adaptive is not None:
        facts |= _facts(adaptive)
    if curve is not None:
        facts["curve"] = str(args.run / "samples.png")
    console = console_for(args.json)
    show(console, f"{args.run}: {recipe.network}, {recipe.rule}", found, facts)
    if curve is not None:
        console.print(_table(curve))
    if args.classes:
        names, rows = run.dataset()["classes"], found.by_class()
        console.print(_classes(names, rows))
        console.print(f"confusion matrix: {args.run / 'confusion.png'}")
        listed = [{"class": name, **asdict(row)} for name, row in zip(names, rows, strict=True)]
        values |= {"classes": listed, "confusion": found.confusion.tolist()}
    if work is not None and study is not None:
        work.leave(study, console)
    write(args.json, outcome.to_dict() | values)
    if args.classes:
        _draw_confusion(args.run / "confusion.png", found, run.dataset()["classes"])
    if curve is not None:
        _draw(args.run / "samples.png", curve, f"{recipe.network}, {recipe.rule}, {Path(recipe.data).name}")
    return 0


@contextmanager
def _meter(images: int, what: str) -> Iterator[Callable[[int], None]]:
    """A live bar; gives the function that is told the number of images done."""
    with Meter(images, 0, what, console=Console(stderr=True, markup=False)) as meter:
        yield lambda done: meter.step(done, "", 0.0)


def _facts(found: AdaptiveEvaluation) -> dict[str, str]:
    most = found.max_samples
    spread = "" if found.samples_se is None else f" ± {found.samples_se:.2f}"
    return {
        "adaptive sampling": f"{found.mean_samples:.2f}{spread} of {most} passes an image "
        f"(mean ± standard error over images), {found.error:.2f}% error, {found.full_error:.2f}% with all {most}",
        f"agreement with all {most} passes": f"{found.agreement:.2f}% of {found.images} images "
        f"(asked for: {100 * found.confidence:g}% of draws, for every image)",
    }


def _table(curve: ErrorCurve) -> Table:
    spread = curve.error_se or (None,) * len(curve.error)
    rows = [
        (str(count), f"{error:.2f}%", "-" if se is None else f"{se:.2f}")
        for count, error, se in zip(curve.samples, curve.error, spread, strict=True)
        if count in (1, 2, 3, 5, 10, 15, 20, 30) or count == curve.samples[-1] or count % 50 == 0
    ]
    times = f"{curve.repetitions} repetition{'s' if curve.repetitions > 1 else ''}"
    expectation = ("expectation", f"{curve.deterministic:.2f}%", "")
    return table_of(f"error of averaged passes, {times}", ("samples", "error", "± se"), [*rows, expectation])


def _classes(names: Sequence[str], rows: Sequence[ClassScores]) -> Table:
    """The classes, those with the largest error first."""
    order = sorted(zip(names, rows, strict=True), key=lambda pair: -(pair[1].error or 0.0))
    cells = [
        (
            name,
            str(one.images),
            "-" if one.error is None else f"{one.error:.2f}%",
            "" if one.taken_for is None else f"{names[one.taken_for]} ({one.taken})",
        )
        for name, one in order
    ]
    return table_of("classes, in expectation", ("class", "images", "error", "most often taken for"), cells, ("class",))


def _draw_confusion(path: Path, found: Evaluation, names: Sequence[str]) -> None:
    """How often each class (row) was taken for each (column), as shares of the row; numbers where they can be read."""
    counts = found.confusion
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    with panels(path, 1, f"{found.images} images, in expectation", "--classes:") as (axes,):
        axes.imshow(shares.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
        axes.set(xlabel="decision", ylabel="class")
        if len(names) <= 30:
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            axes.set_yticks(range(len(names)), names, fontsize=7)
        if len(names) <= 12:
            for row in range(len(names)):
                for column in range(len(names)):
                    if number := int(counts[row, column]):
                        colour = "white" if shares[row, column] > 0.5 else "black"
                        axes.text(column, row, str(number), ha="center", va="center", fontsize=7, color=colour)


def _draw(path: Path, curve: ErrorCurve, title: str) -> None:
    """Figure 2 of Swapout: error against the number of samples, and the expectation's as a line."""
    label = f"sampled, mean ± standard error of {curve.repetitions}"
    with panels(path, 1, title, "--curve:") as (axes,):
        axes.errorbar(curve.samples, curve.error, yerr=curve.error_se, capsize=2, linewidth=1.6, label=label)
        axes.axhline(
            curve.deterministic, color="C3", linestyle="--", linewidth=1.6, label="deterministic (expectation)"
        )
        axes.set(xlabel="number of samples", ylabel="error rate (%)", xlim=(0, curve.samples[-1] + 1))
