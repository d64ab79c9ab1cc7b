"""A whole training: from a recipe to an evaluated run directory."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from residrop.blocks.attach import expected_depth_of, rules_of, set_survival
from residrop.common.errors import Interrupted, RankError, RunError
from residrop.common.lock import held
from residrop.common.orphans import leaving
from residrop.data import Loader
from residrop.engines.compiling import compile, replays
from residrop.engines.distributed import data_parallel
from residrop.engines.distributed.ranks import broadcast
from residrop.engines.graphs import record_blocks, record_pass
from residrop.inference import Evaluation, evaluate, recalibrate
from residrop.training.callbacks import Callback, listening
from residrop.training.checked import unwritable, write_record
from residrop.training.checkpoint import Run
from residrop.training.distributed import ALONE, Ranks, process_group
from residrop.training.listing import data_of, save_listing
from residrop.training.logbook import Logbook, Meter, draw_curves
from residrop.training.loggers import make_loggers, remember
from residrop.training.loop import run_epochs, stop_signals
from residrop.training.measuring import first_weights
from residrop.training.memory import keep_memory
from residrop.training.networks import build_network, report_of, survival_of
from residrop.training.optimizers import freeze, make_optimizer
from residrop.training.recipe import Recipe
from residrop.training.setup import Prepared, precision_context, prepare, resolve
from residrop.training.state import State
from residrop.training.update import RecordedUpdate
from residrop.training.weights import start_weights

__all__ = ["Outcome", "check_same", "start", "train"]

_RECALIBRATED = 4096  # training images, for batch norm under an average of weights


@dataclass(frozen=True)
class Outcome:
    """A finished training: its run directory, final evaluation, and what `residrop compare` tabulates."""

    run: Run
    evaluation: Evaluation
    parameters: int
    train_seconds: float
    expected_depth: float
    history: list[dict[str, Any]]
    rates: list[float] | None = None  # of the weights reported on, where a budget found them

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
                "survival": recipe.survival if recipe.budget is None else self.rates,
                "budget": recipe.budget,
                "data": Path(recipe.data).name,  # where it lies on this machine is nobody's business
                "epochs": recipe.epochs,
                "seed": recipe.seed,
                "recipe": recipe.fingerprint(),
                "versions": self.run.versions(),
            },
        }


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    quiet: bool = False,
    log: Sequence[str] = ("tensorboard",),
    callbacks: Sequence[Callback] = (),
) -> Outcome:
    """Train a recipe into a run directory and evaluate it both ways.

    Under torchrun, or in a process group that exists, all ranks call this. Each trains on its share of every batch;
    rank 0 alone writes and prints, and all return the same evaluation.

    Args:
        recipe: what to do.
        out: new run directory, or with `resume` an existing one of the same recipe.
        resume: continue where the run was stopped; a finished run is only evaluated again, unless the recipe has more
            epochs than before and a learning rate that does not depend on their number.
        console: where progress is written (default: standard error).
        quiet: write nothing.
        log: where metrics go besides metrics.jsonl: tensorboard, csv, wandb, mlflow (`training.loggers`).
        callbacks: more that listens, on rank 0: see `Callback`.

    Raises:
        UsageError: bad data, recipe or run directory; raised before any training.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    console = console or Console(stderr=True, markup=False)
    listeners = [*make_loggers(log), *callbacks]
    with process_group(recipe.device) as ranks, ExitStack() as stack:
        recipe = ranks.from_main(lambda: resolve(recipe))
        ranks.from_main(lambda: stack.enter_context(held(out)))
        tell = stack.enter_context(listening(listeners if ranks.main else ()))  # closed before the lock is given back
        ranks.from_main(lambda: check_same(recipe, out, resume))  # said before minutes of decoding, not after
        going_on = resume and (out / "recipe.json").exists()
        before = ranks.from_main(lambda: data_of(Run(out)) if going_on else None)
        ready = _same_data(ranks, ranks.in_turn(lambda: prepare(recipe, ranks, before)))
        run = ranks.from_main(lambda: _directory(out, recipe, ready, resume))
        state = _state(recipe, ready, ranks, run, resume)
        ranks.from_main(lambda: _lengthen(run, recipe.epochs, ready.dataset["steps"]))
        quiet = quiet or not ranks.main
        try:
            ranks.from_main(lambda: remember(run, log))
            ranks.from_main(lambda: tell("on_start", run, state.history))
            _train(recipe, run, state, ready, console, quiet, tell)
        except Interrupted:
            leaving()
            with suppress(RuntimeError):  # one has left already
                ranks.wait_for_all()  # torchrun ends the others as soon as one has left
            raise
        outcome = _finish(recipe, run, state, ready.loaders, console, quiet)
        ranks.from_main(lambda: tell("on_finish", outcome))
        ranks.wait_for_all()
    return outcome


def _same_data(ranks: Ranks, ready: Prepared) -> Prepared:
    first = ranks.from_main(lambda: ready.dataset["digest"])

    def check() -> None:
        if ready.dataset["digest"] != first:
            raise RankError(f"rank {ranks.rank} has other training images than rank 0; give all the same --data")

    ranks.agree(check)
    return ready


def start(recipe: Recipe, ready: Prepared, ranks: Ranks = ALONE, weights: bool = True) -> State:
    """The network of a recipe as it is trained, and its optimizer, at the beginning.

    Without `weights` the network has random ones, whatever the recipe names.
    """
    keep_memory(ready.device)
    model = build_network(recipe, ready.dataset)
    report = report_of(model)
    notes = [] if report is None else [report.short()]
    notes += start_weights(recipe, model) if weights else []
    freeze(model, recipe.freeze)
    if recipe.channels_last and any(parameter.ndim == 4 for parameter in model.parameters()):
        model = model.to(memory_format=_format(recipe))  # pyright: ignore[reportCallIssue]
    model = model.to(ready.device)
    whole = _hasten(recipe, model, ready, ranks)
    state = State(model, make_optimizer(recipe, model), ranks, notes=notes)
    if recipe.ema is not None:
        state.average = [one.detach().clone() for one in model.parameters()]
    state.sums, state.gradient = state.sums.to(ready.device), state.gradient.to(ready.device)
    if whole:
        assert isinstance(state.optimizer, torch.optim.SGD)
        state.recorded = RecordedUpdate(
            model,
            state.optimizer,
            _batch(recipe, ready),
            compiled=recipe.compile,
            sums=state.sums,
            gradient=state.gradient,
            first=first_weights(model),
            autocast=precision_context(recipe, ready.device, cached=False),
        )
    return state


def _hasten(recipe: Recipe, model: nn.Module, ready: Prepared, ranks: Ranks) -> bool:
    """Compile and record a network in the way that suits its rules and device; True if updates are to be recorded."""
    if ready.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # batches have one size
    measured = recipe.budget is not None or bool(recipe.watch)  # which needs the parts of blocks as they are
    alone = ranks.size == 1 and recipe.micro_batches == 1  # nothing else adds to gradients
    usual = recipe.optimizer == "sgd" and recipe.clip_grad is None and recipe.label_smoothing == 0.0
    usual = usual and recipe.layer_decay == 1.0 and not recipe.freeze and not (recipe.mixup or recipe.cutmix)
    graphs = recipe.graphs != "none" and ready.device.type == "cuda" and alone and not measured
    whole = graphs and replays(model) and (recipe.compile or not any(rule.rates for rule in rules_of(model)))
    if whole and usual and recipe.graphs == "updates":
        return True
    if recipe.compile and not whole:
        compile(model)
    if graphs and model._compiled_call_impl is None:
        with precision_context(recipe, ready.device)():
            if whole:
                record_pass(model, _batch(recipe, ready), compiled=recipe.compile)
            else:
                record_blocks(model, _batch(recipe, ready))
    return False


def _batch(recipe: Recipe, ready: Prepared) -> Tensor:
    """Of the form of all full batches."""
    size, images = ready.dataset["size"], min(recipe.batch_size, ready.loaders["train"].num_images)
    batch = torch.zeros(images, ready.dataset["channels"], size, size, device=ready.device)
    return batch.contiguous(memory_format=_format(recipe))


def _format(recipe: Recipe) -> torch.memory_format:
    return torch.channels_last if recipe.channels_last else torch.contiguous_format


def _state(recipe: Recipe, ready: Prepared, ranks: Ranks, run: Run, resume: bool) -> State:
    """As `start`, with what was saved under `resume`; the same on all ranks."""
    saved = ranks.from_main(run.load_state) if resume else None
    state = start(recipe, ready, ranks, weights=saved is None)
    if saved is not None:
        ranks.agree(lambda: state.restore(saved, run.path / "last.pt"))
        ranks.from_main(lambda: _check_restored(recipe, run, state, ready.dataset["steps"]))
    state.sync = data_parallel(state.model)
    return state


def _check_restored(recipe: Recipe, run: Run, state: State, steps: int) -> None:
    """RunError unless the counters agree and the best weights, which the run reports on, are there."""
    path = run.path / "last.pt"
    if not 0 < state.update <= steps or state.update * recipe.epochs // steps != len(state.history):
        raise RunError(
            f"{path} is not the state of this run (update {state.update} of {steps}, after {len(state.history)} "
            "epochs); delete it to start this run anew"
        )
    if recipe.select == "best" and state.best < math.inf:
        run.load_weights("best", build_network(recipe, run.dataset()))  # into another network, to try


def _train(
    recipe: Recipe,
    run: Run,
    state: State,
    ready: Prepared,
    console: Console,
    quiet: bool,
    tell: Callable[..., None],
) -> None:
    others = dict(ready.loaders)
    loader = others.pop("train")
    ranks, total = state.ranks, ready.dataset["steps"]
    lines = {"survival": state.survival, "instruments": state.instruments}
    book = ranks.agree(lambda: Logbook(run.path if ranks.main else None, state.history, lines))
    if state.update == 0 and not quiet:
        for line in state.notes:
            console.print(line, highlight=False, soft_wrap=True)
    try:
        with (
            Meter(total, state.update, recipe.rule, console=console, quiet=quiet) as meter,
            stop_signals(patient=ranks.size > 1) as stopped,
        ):
            run_epochs(recipe, run, state, loader, others, book, meter, stopped, tell)
    finally:
        if state.history and ranks.main:
            curves = run.path / "curves.png"
            try:
                draw_curves(curves, {recipe.rule: state.history}, f"{recipe.network}, {recipe.rule}")
            except OSError as error:  # no reason to lose the training, or to hide another error
                if not quiet:
                    console.print(f"without curves: {unwritable(curves, error)}", highlight=False, soft_wrap=True)


def check_same(recipe: Recipe, out: Path, resume: bool) -> None:
    """RunError if `out` holds a run that this recipe cannot continue; nothing if it holds none."""
    if not (out / "recipe.json").exists():
        return
    before, now = Run.open(out).recipe(), resolve(recipe)
    if not resume:
        raise RunError(f"{out} already holds a run; continue it with --resume, or choose another --out")
    if before.replace(epochs=now.epochs).fingerprint() == now.fingerprint() and now.epochs > before.epochs:
        if shares := before.depends_on_length():
            raise RunError(
                f"{out} is a training of {before.epochs} epochs, which decide its {shares}: in one "
                f"of {now.epochs} these epochs would have been others; start anew from its weights (--weights {out}), "
                "or train it at a constant rate (--lr-schedule steps --lr-drops, without values, and no warm-up)"
            )
    elif before.fingerprint() != now.fingerprint():
        old, new = before.decisive(), now.decisive()  # which lack some fields with their defaults
        pairs = [(key, old.get(key, getattr(before, key)), new.get(key, getattr(now, key))) for key in old | new]
        changed = ", ".join(f"{key} (was {a!r}, is {b!r})" for key, a, b in pairs if a != b)
        raise RunError(
            f"{out} was started with another recipe: {changed}; resume it unchanged, or choose another --out"
        )


def _lengthen(run: Run, epochs: int, steps: int) -> None:
    """Write down that a run has more epochs now, which `check_same` has allowed."""
    if epochs > run.recipe().epochs or steps > run.dataset()["steps"]:
        run.extend(epochs, steps)


def _directory(out: Path, recipe: Recipe, ready: Prepared, resume: bool) -> Run:
    if not (resume and (out / "recipe.json").exists()):
        run = Run.create(out, recipe, ready.dataset, ready.normalization)
        if ready.listed is not None:
            save_listing(run, ready.listed)
        return run
    run = Run.open(out)
    if not (out / "versions.json").exists():
        run.write_versions()
    run.versions()  # which the evaluation names in the end
    if run.dataset().get("digest") != ready.dataset["digest"]:
        raise RunError(f"{out} was started on other training images than those of data {recipe.data!r}; give those")
    return run


def _finish(
    recipe: Recipe, run: Run, state: State, loaders: dict[str, Loader], console: Console, quiet: bool
) -> Outcome:
    model, ranks, test = state.model, state.ranks, loaders["test"]

    def weights() -> list[float]:
        if recipe.select == "best" and state.best < math.inf:
            run.load_weights("best", model)
        if state.average is not None:
            with torch.no_grad():
                for one, value in zip(model.parameters(), state.average, strict=True):
                    one.copy_(value)
            if any(isinstance(one, _BatchNorm) and one.running_mean is not None for one in model.modules()):
                with precision_context(recipe, next(model.parameters()).device)():
                    images = loaders["train"].fixed_batches(_RECALIBRATED // recipe.batch_size + 1, recipe.batch_size)
                    recalibrate(model, images, shared=True)  # which the broadcast below makes true
        run.save_weights("model", model)
        return survival_of(model)

    rates = ranks.from_main(weights)
    if ranks.size > 1:
        broadcast((*model.parameters(), *model.buffers()))
        if recipe.budget is not None:
            set_survival(model, rates)
    autocast = precision_context(recipe, next(model.parameters()).device)
    with autocast(), Meter(test.num_images, 0, "evaluating", console=console, quiet=quiet) as meter:
        evaluation = evaluate(
            model,
            test.eval_batches(),
            recipe.samples,
            on_batch=lambda done: meter.step(done * ranks.size, "", 0.0),
            share=(ranks.rank, ranks.size),
        )
    outcome = Outcome(
        run=run,
        evaluation=evaluation,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_seconds=state.seconds,
        expected_depth=expected_depth_of(model),
        history=state.history,
        rates=None if recipe.budget is None else rates,
    )
    ranks.from_main(lambda: write_record(run.path / "evaluation.json", outcome.to_dict()))
    return outcome
