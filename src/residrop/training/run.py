"""A whole training: from a recipe to an evaluated run directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from residrop.attach import expected_depth_of
from residrop.data import fit, load
from residrop.errors import ConfigError, RunError
from residrop.inference import Evaluation, evaluate
from residrop.training.checkpoint import Run, build_network, write_json
from residrop.training.logbook import Logbook, Meter, draw_curves
from residrop.training.loop import State, run_epochs, stop_signals
from residrop.training.recipe import Recipe
from residrop.training.setup import choose_device, data_digest, loader_for, make_optimizer, precision_context

__all__ = ["Outcome", "train"]


@dataclass(frozen=True)
class Outcome:
    """A finished training: its run directory, final evaluation, and what `residrop compare` tabulates."""

    run: Run
    evaluation: Evaluation
    parameters: int
    train_seconds: float
    expected_depth: float
    history: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The keys of `residrop evaluate --json`, and the details of both kinds of inference."""
        found = self.evaluation
        return {
            "rule": self.run.recipe().rule,
            "parameters": self.parameters,
            "deterministic_error": found.deterministic.error,
            "sampled_error": found.sampled.error if found.sampled else None,
            "samples": found.samples,
            "train_seconds": self.train_seconds,
            "relative_time": None,
            "expected_depth": self.expected_depth,
            "details": found.to_dict(),
        }


def train(
    recipe: Recipe, out: Path, *, resume: bool = False, console: Console | None = None, quiet: bool = False
) -> Outcome:
    """Train a recipe into a run directory and evaluate it both ways.

    Args:
        recipe: what to do.
        out: new run directory, or with `resume` an existing one of the same recipe.
        resume: continue where the run was stopped; a finished run is only evaluated again.
        console: where progress is written (default: standard error).
        quiet: write nothing.

    Raises:
        UsageError: bad data, recipe or run directory; raised before any training.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    console = console or Console(stderr=True)
    device = choose_device(recipe.device)
    if (out / "recipe.json").exists():  # said before minutes of decoding, not after
        _check_same(Run.open(out).recipe(), recipe, out, resume)
    splits = load(recipe.data, validation=recipe.validation, seed=recipe.seed + 1, limit=recipe.limit)
    normalization = fit(splits.train, recipe.normalization)
    parts = [name for name in ("train", "validation", "test") if getattr(splits, name) is not None]
    loaders = {name: loader_for(recipe, splits, name, normalization, device) for name in parts}
    loader = loaders.pop("train")
    if loader.steps_per_epoch == 0:
        raise ConfigError(f"{loader.num_images} training image(s) make no batch of at least two; give more images")
    total = recipe.epochs * loader.steps_per_epoch
    model = build_network(recipe, classes=len(splits.classes), channels=splits.channels, steps=total)
    dataset = {
        "classes": splits.classes,
        "channels": splits.channels,
        "size": splits.size,
        "steps": total,
        "digest": data_digest(splits, normalization),
    }
    run = _directory(out, recipe, dataset, normalization, resume)
    if recipe.channels_last and any(parameter.ndim == 4 for parameter in model.parameters()):
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model = model.to(device)
    state = State(model, make_optimizer(recipe, model))
    state.sums = state.sums.to(device)
    if resume and (saved := run.load_state()) is not None:
        state.restore(saved, run.path / "last.pt")
    book = Logbook(out, state.history)
    with Meter(total, state.update, recipe.rule, console=console, quiet=quiet) as meter, stop_signals() as stopped:
        run_epochs(recipe, run, state, loader, loaders, book, meter, stopped)
    book.close()
    return _finish(recipe, run, state.model, state.history, state.seconds, loaders["test"], console, quiet)


def _check_same(before: Recipe, now: Recipe, out: Path, resume: bool) -> None:
    if not resume:
        raise RunError(f"{out} already holds a run; continue it with --resume, or choose another --out")
    if before.fingerprint() != now.fingerprint():
        old, new = before.to_dict(), now.to_dict()
        changed = ", ".join(f"{key} (was {old[key]!r}, is {new[key]!r})" for key in old if old[key] != new[key])
        raise RunError(
            f"{out} was started with another recipe: {changed}; resume it unchanged, or choose another --out"
        )


def _directory(out: Path, recipe: Recipe, dataset: dict[str, Any], normalization: Any, resume: bool) -> Run:
    if not (resume and (out / "recipe.json").exists()):
        return Run.create(out, recipe, dataset, normalization)
    run = Run.open(out)
    if run.dataset().get("digest") != dataset["digest"]:
        raise RunError(f"{out} was started on other training images than those of data {recipe.data!r}; give those")
    return run


def _finish(
    recipe: Recipe,
    run: Run,
    model: nn.Module,
    history: list[dict[str, Any]],
    seconds: float,
    test: Any,
    console: Console,
    quiet: bool,
) -> Outcome:
    if recipe.select == "best" and (run.path / "best.safetensors").exists():
        run.load_weights("best", model)
    run.save_weights("model", model)
    draw_curves(run.path / "curves.png", {recipe.rule: history}, f"{recipe.network}, {recipe.rule}")
    autocast = precision_context(recipe, next(model.parameters()).device)
    with autocast(), Meter(test.num_images, 0, "evaluating", console=console, quiet=quiet) as meter:
        evaluation = evaluate(
            model, test.eval_batches(), recipe.samples, on_batch=lambda done: meter.step(done, "", 0.0)
        )
    outcome = Outcome(
        run=run,
        evaluation=evaluation,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_seconds=seconds,
        expected_depth=expected_depth_of(model),
        history=history,
    )
    write_json(run.path / "evaluation.json", outcome.to_dict())
    return outcome
