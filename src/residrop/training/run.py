"""A whole training: from a recipe to an evaluated run directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from residrop.attach import expected_depth_of
from residrop.data import Loader
from residrop.errors import RunError
from residrop.inference import Evaluation, evaluate
from residrop.training.checkpoint import Run, build_network, write_json
from residrop.training.logbook import Logbook, Meter, draw_curves
from residrop.training.loop import State, run_epochs, stop_signals
from residrop.training.recipe import Recipe
from residrop.training.setup import Prepared, make_optimizer, precision_context, prepare, resolve

__all__ = ["Outcome", "check_same", "train"]


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
        """The keys of `residrop evaluate --json`, the details of both kinds of inference, and what was run where."""
        found, recipe = self.evaluation, self.run.recipe()
        return {
            "rule": recipe.rule,
            "parameters": self.parameters,
            "deterministic_error": found.deterministic.error,
            "sampled_error": found.sampled.error if found.sampled else None,
            "samples": found.samples,
            "train_seconds": self.train_seconds,
            "relative_time": None,
            "expected_depth": self.expected_depth,
            "details": found.to_dict(),
            "run": {
                "network": recipe.network,
                "width": recipe.width,
                "survival": recipe.survival,
                "data": Path(recipe.data).name,  # where it lies on this machine is nobody's business
                "epochs": recipe.epochs,
                "seed": recipe.seed,
                "recipe": recipe.fingerprint(),
                "versions": self.run.versions(),
            },
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
    console = console or Console(stderr=True, markup=False)
    recipe = resolve(recipe)
    check_same(recipe, out, resume)  # said before minutes of decoding, not after
    ready = prepare(recipe)
    loaders = dict(ready.loaders)
    loader = loaders.pop("train")
    run = _directory(out, recipe, ready, resume)
    model = build_network(recipe, ready.dataset)
    if recipe.channels_last and any(parameter.ndim == 4 for parameter in model.parameters()):
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model = model.to(ready.device)
    state = State(model, make_optimizer(recipe, model))
    state.sums = state.sums.to(ready.device)
    if resume and (saved := run.load_state()) is not None:
        state.restore(saved, run.path / "last.pt")
    book = Logbook(out, state.history)
    total = ready.dataset["steps"]
    try:
        with Meter(total, state.update, recipe.rule, console=console, quiet=quiet) as meter, stop_signals() as stopped:
            run_epochs(recipe, run, state, loader, loaders, book, meter, stopped)
    finally:
        book.close()
        if state.history:
            draw_curves(run.path / "curves.png", {recipe.rule: state.history}, f"{recipe.network}, {recipe.rule}")
    return _finish(recipe, run, state, loaders["test"], console, quiet)


def check_same(recipe: Recipe, out: Path, resume: bool) -> None:
    """RunError if `out` holds a run that this recipe cannot continue; nothing if it holds none."""
    if not (out / "recipe.json").exists():
        return
    before, now = Run.open(out).recipe(), resolve(recipe)
    if not resume:
        raise RunError(f"{out} already holds a run; continue it with --resume, or choose another --out")
    if before.fingerprint() != now.fingerprint():
        old, new = before.decisive(), now.decisive()
        changed = ", ".join(f"{key} (was {old[key]!r}, is {new[key]!r})" for key in old if old[key] != new[key])
        raise RunError(
            f"{out} was started with another recipe: {changed}; resume it unchanged, or choose another --out"
        )


def _directory(out: Path, recipe: Recipe, ready: Prepared, resume: bool) -> Run:
    if not (resume and (out / "recipe.json").exists()):
        return Run.create(out, recipe, ready.dataset, ready.normalization)
    run = Run.open(out)
    if run.dataset().get("digest") != ready.dataset["digest"]:
        raise RunError(f"{out} was started on other training images than those of data {recipe.data!r}; give those")
    return run


def _finish(recipe: Recipe, run: Run, state: State, test: Loader, console: Console, quiet: bool) -> Outcome:
    model = state.model
    if recipe.select == "best" and (run.path / "best.safetensors").exists():
        run.load_weights("best", model)
    run.save_weights("model", model)
    autocast = precision_context(recipe, next(model.parameters()).device)
    with autocast(), Meter(test.num_images, 0, "evaluating", console=console, quiet=quiet) as meter:
        evaluation = evaluate(
            model, test.eval_batches(), recipe.samples, on_batch=lambda done: meter.step(done, "", 0.0)
        )
    outcome = Outcome(
        run=run,
        evaluation=evaluation,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_seconds=state.seconds,
        expected_depth=expected_depth_of(model),
        history=state.history,
    )
    write_json(run.path / "evaluation.json", outcome.to_dict())
    return outcome
