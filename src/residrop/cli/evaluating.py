"""What `residrop evaluate` does: both kinds of inference, adaptive sampling, error against the number of samples."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from residrop.blocks.attach import expected_depth_of
from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError, RunError
from residrop.common.files import replacing
from residrop.common.output import check_target, console_for, write
from residrop.data import Loader
from residrop.inference import AdaptiveEvaluation, ErrorCurve, Evaluation, error_curve, evaluate, evaluate_adaptive
from residrop.inference.sampled.adaptive import check_confidence
from residrop.training import Outcome, load_run
from residrop.training.logbook import Meter
from residrop.training.setup import choose_device, loader_of_run, precision_context

__all__ = ["Wanted", "draw_error_curve", "evaluate_command", "show"]


@dataclass(frozen=True)
class Wanted:
    """What to measure of a run beside both kinds of inference.

    Attributes:
        samples: sampled passes; with `adaptive` their largest number, with `curve` the curve's length.
        adaptive: compare adaptive sampling with the full number of passes.
        confidence: of adaptive decisions.
        curve: measure and draw the error against the number of samples.
        repetitions: of the curve.
    """

    samples: int = 30
    adaptive: bool = False
    confidence: float = 0.95
    curve: bool = False
    repetitions: int = 5

    def __post_init__(self) -> None:
        check_whole("samples", self.samples, least=0)
        check_whole("repetitions", self.repetitions, least=1)
        check_confidence(self.confidence)
        if self.samples == 0 and (self.adaptive or self.curve):
            what = "--adaptive" if self.adaptive else "--curve"
            raise ConfigError(f"samples is 0, but {what} needs sampled passes; give at least 1")


def show(console: Console, title: str, found: Evaluation, facts: dict[str, str]) -> None:
    """Both kinds of inference as a table, then facts line by line."""
    table = Table(title=title, title_justify="left")
    for name in ("inference", "error", "± se", "NLL", "ECE"):
        table.add_column(name, justify="left" if name == "inference" else "right")
    rows = [("deterministic (expectation)", found.deterministic)]
    if found.sampled:
        rows.append((f"sampled ({found.samples} passes)", found.sampled))
    for name, scores in rows:
        table.add_row(name, f"{scores.error:.2f}%", f"{scores.error_se:.2f}", f"{scores.nll:.4f}", f"{scores.ece:.2f}%")
    console.print(table)
    if found.single_pass_error_se is not None:
        facts = {
            "single sampled pass": f"{found.single_pass_error:.2f} ± {found.single_pass_error_se:.2f}% error "
            "(mean ± standard error over passes)",
            "standard error of a probability": f"{found.probability_se:.4f} (mean over {found.images} images)",
            **facts,
        }
    for name, value in facts.items():
        console.print(f"{name}: {value}")


def evaluate_command(
    path: Path, wanted: Wanted, data: str | None, device: str, target: str | None, weights: str = "model"
) -> int:
    """Evaluate a run, both ways, and what else is wanted."""
    check_target(target)
    run, model = load_run(path, weights)
    if wanted.curve and not os.access(path, os.W_OK):
        raise RunError(f"{path} cannot be written, where --curve draws samples.png; make the run directory writable")
    recipe, place = run.recipe(), choose_device(device)
    model = model.to(place)
    loader = loader_of_run(run, data, place)
    values: dict[str, Any] = {}
    adaptive = curve = None
    with precision_context(recipe, place)():
        with _meter(loader, "evaluating") as meter:
            found = evaluate(
                model, loader.eval_batches(), wanted.samples, on_batch=lambda done: meter.step(done, "", 0.0)
            )
        if wanted.adaptive:
            adaptive = _adaptive(model, loader, wanted)
            values["adaptive"] = adaptive.to_dict()
        if wanted.curve:
            curve = _curve(model, loader, wanted)
            values["curve"] = curve.to_dict()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    outcome = Outcome(run, found, parameters, run.train_seconds(), expected_depth_of(model), [])
    facts = {"parameters": f"{parameters:,}", "expected depth": f"{outcome.expected_depth:.2f} blocks"}
    title = f"{path}: {recipe.network}, {recipe.rule}"
    if adaptive is not None:
        facts |= _facts(adaptive)
    if curve is not None:
        picture = path / "samples.png"
        draw_error_curve(picture, curve, f"{recipe.network}, {recipe.rule}, {Path(recipe.data).name}")
        facts["curve"] = str(picture)
    console = console_for(target)
    show(console, title, found, facts)
    if curve is not None:
        _show_curve(console, curve)
    write(target, outcome.to_dict() | values)
    return 0


def _meter(loader: Loader, what: str) -> Meter:
    return Meter(loader.num_images, 0, what, console=Console(stderr=True, markup=False))


def _adaptive(model: nn.Module, loader: Loader, wanted: Wanted) -> AdaptiveEvaluation:
    with _meter(loader, "adaptive sampling") as meter:
        return evaluate_adaptive(
            model,
            loader.eval_batches(),
            confidence=wanted.confidence,
            max_samples=wanted.samples,
            on_batch=lambda done: meter.step(done, "", 0.0),
        )


def _facts(found: AdaptiveEvaluation) -> dict[str, str]:
    most = found.max_samples
    spread = "" if found.samples_se is None else f" ± {found.samples_se:.2f}"
    return {
        "adaptive sampling": f"{found.mean_samples:.2f}{spread} of {most} passes an image "
        f"(mean ± standard error over images), {found.error:.2f}% error, {found.full_error:.2f}% with all {most}",
        f"agreement with all {most} passes": f"{found.agreement:.2f}% of {found.images} images "
        f"(asked for: {100 * found.confidence:g}% of draws, for every image)",
    }


def _curve(model: nn.Module, loader: Loader, wanted: Wanted) -> ErrorCurve:
    with _meter(loader, "error against samples") as meter:
        return error_curve(
            model,
            loader.eval_batches(),
            wanted.samples,
            wanted.repetitions,
            on_batch=lambda done: meter.step(done, "", 0.0),
        )


def _show_curve(console: Console, curve: ErrorCurve) -> None:
    times = f"{curve.repetitions} repetition{'s' if curve.repetitions > 1 else ''}"
    table = Table(title=f"error of averaged passes, {times}", title_justify="left")
    for name in ("samples", "error", "± se"):
        table.add_column(name, justify="right")
    spread = curve.error_se or (None,) * len(curve.error)
    for count, error, se in zip(curve.samples, curve.error, spread, strict=True):
        if count in (1, 2, 3, 5, 10, 15, 20, 30) or count == curve.samples[-1] or count % 50 == 0:
            table.add_row(str(count), f"{error:.2f}%", "-" if se is None else f"{se:.2f}")
    table.add_row("expectation", f"{curve.deterministic:.2f}%", "")
    console.print(table)


def draw_error_curve(path: Path, curve: ErrorCurve, title: str) -> None:
    """Draw Figure 2 of Swapout as a PNG: error against the number of samples, and the expectation's as a line.

    Raises:
        RunError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display; slow to import

    figure = Figure(figsize=(6.4, 4.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    label = f"sampled, mean ± standard error of {curve.repetitions}"
    axes.errorbar(curve.samples, curve.error, yerr=curve.error_se, color="C0", capsize=2, linewidth=1.6, label=label)
    axes.axhline(curve.deterministic, color="C3", linestyle="--", linewidth=1.6, label="deterministic (expectation)")
    axes.set(xlabel="number of samples", ylabel="error rate (%)", title=title)
    axes.set_xlim(0, curve.samples[-1] + 1)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}); make the run directory writable") from None
