"""One training loop for every rule: it gives the model a plan per update and knows nothing of what rules do with it.

Order of images, augmentation and draws are pure functions of (seed, epoch, batch) and (seed, update), so a resumed run
needs no state but weights, optimizer and counters, and on the CPU repeats the uninterrupted run bit for bit. On several
ranks all of them hold the same state, and all save or stop after the same update.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from residrop.blocks.attach import depth_of, expected_depth_of, sampler_of, using
from residrop.common.errors import Interrupted, RunError
from residrop.data import Loader
from residrop.inference import evaluate
from residrop.training.checkpoint import Run
from residrop.training.distributed import Votes
from residrop.training.logbook import Logbook, Meter
from residrop.training.measuring import due, first_weights, rates_now, watched
from residrop.training.recipe import Recipe
from residrop.training.setup import precision_context
from residrop.training.state import State
from residrop.training.update import note_gradient, one_pass

__all__ = ["State", "run_epochs", "stop_signals", "updates"]


_SAVE, _STOP = 1, 2  # what a rank may ask for after an update


@contextmanager
def stop_signals(patient: bool = False) -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into an event that the loop looks at between updates.

    Unless `patient`, a second one ends the program at once. (torchrun sends one more to all others as soon as a first
    process has stopped.)
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set() and not patient:
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that Python did not install


def run_epochs(
    recipe: Recipe,
    run: Run,
    state: State,
    loader: Loader,
    others: dict[str, Loader],
    book: Logbook,
    meter: Meter,
    stopped: threading.Event,
    tell: Callable[..., None],
) -> None:
    """Train from where `state` stands to the last epoch; `others` are evaluated along the way, `tell` calls a method of
    callbacks.

    Raises:
        Interrupted: `stopped` was set; the state is saved.
        RunError: the loss or a weight is not finite, or a file cannot be written; the state saved before is kept.
    """
    steps = loader.steps_per_epoch
    autocast = precision_context(recipe, next(state.model.parameters()).device)
    votes = Votes(state.ranks)
    saved_at = shown_at = time.perf_counter()
    while state.update < recipe.epochs * steps:
        epoch = state.update // steps
        if state.update % steps == 0:
            _measure(recipe, state, loader, book, epoch, meter)
        expected = expected_depth_of(state.model)
        state.model.train()
        started = time.perf_counter()
        for _ in updates(recipe, state, loader, epoch, state.update % steps):
            now = time.perf_counter()
            state.epoch_seconds += now - started
            started = now
            if meter.live and now - shown_at > 0.25:
                shown_at = now
                meter.step(state.update, *_status(recipe, state, epoch, steps, expected))
            if state.update % steps == 0:
                break  # the epoch's own evaluation and save follow; a state between the two could not be resumed
            late = now - saved_at > 60.0 * recipe.checkpoint_minutes
            if request := votes.cast(_STOP if stopped.is_set() else _SAVE if late else 0):
                request = votes.settle(request)
                _check_finite(state, epoch)  # a good state is not overwritten by a lost one
                state.save(run)
                saved_at = started = time.perf_counter()
                _check_stopped(request, state, run)
        _end_epoch(recipe, run, state, epoch, steps, others, book, meter, autocast, loader)
        state.ranks.from_main(lambda: tell("on_epoch", state.history[-1], state.model))
        saved_at = time.perf_counter()
        _check_stopped(votes.settle(_STOP if stopped.is_set() else 0), state, run)


def updates(recipe: Recipe, state: State, loader: Loader, epoch: int, start: int = 0) -> Iterator[None]:
    """Make the updates of an epoch from number `start` on, one at every `next`.

    That is all of a step but the looks at clock and signals between two of them; `residrop bench throughput` times it.
    """
    steps = loader.steps_per_epoch
    autocast = precision_context(recipe, next(state.model.parameters()).device)
    first = first_weights(state.model)
    for number, (x, y) in enumerate(loader.train_batches(epoch, start), start):
        lr = recipe.lr_at(state.update / (recipe.epochs * steps))
        _update(recipe, state, x, y, lr, autocast, loader.images_in(number), first)
        yield


def _check_finite(state: State, epoch: int) -> None:
    loss = float(state.ranks.total(state.sums)[0])
    weights = [parameter.detach() for parameter in state.model.parameters()]  # the last update shows in no loss
    finite = bool(torch.stack([tensor.isfinite().all() for tensor in weights]).all())

    def check() -> None:
        if not math.isfinite(loss) or not finite:
            what = "weights are not finite" if math.isfinite(loss) else f"loss is {loss}"
            raise RunError(f"the {what} in epoch {epoch + 1}; try a smaller lr, a warmup, or --precision fp32")

    state.ranks.agree(check)


def _check_stopped(request: int, state: State, run: Run) -> None:
    if request == _STOP:
        raise Interrupted(f"stopped after update {state.update}; continue with --resume --out {run.path}")


def _update(
    recipe: Recipe,
    state: State,
    x: Tensor,
    y: Tensor,
    lr: float,
    autocast: Callable[[], AbstractContextManager[Any]],
    total: int,
    first: nn.Parameter,
) -> None:
    """One optimizer update: one plan, shared by its micro-batches. `total` counts the images of all ranks."""
    sampler = sampler_of(state.model)
    plan = sampler.plan(state.update)
    if state.recorded is not None and state.recorded.fits(x):
        state.recorded.run(plan, x, y, lr)
    else:
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        state.optimizer.zero_grad(set_to_none=not recipe.decay_dropped)
        if recipe.decay_dropped:  # dropped blocks must see zeros, not None
            for parameter in state.model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        parts = list(zip(x.chunk(recipe.micro_batches), y.chunk(recipe.micro_batches), strict=True)) if len(x) else []
        for part, (images, labels) in enumerate(parts):
            with (
                using(state.model, sampler.plan(state.update, part=part) if part else plan),
                state.sync.no_sync() if state.sync and part + 1 < len(parts) else nullcontext(),
            ):
                # the mean over ranks is the gradient of the mean over all images
                share = state.ranks.size / total
                one_pass(state.model, images, labels, share, state.sums, autocast, recipe.label_smoothing)
        if state.sync and not parts:  # fewer images than ranks were left
            with using(state.model, plan):
                state.sync.join()
        if first.grad is not None and plan.draws[0].alive is not False:
            note_gradient(first, state.gradient)
        if recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip_grad)
        state.optimizer.step()
    if state.average is not None and recipe.ema is not None:
        # the first weights are random, and count the less the fewer updates there were
        decay = min(recipe.ema, (1.0 + state.update) / (10.0 + state.update))
        get_ema_multi_avg_fn(decay)(state.average, [one.detach() for one in state.model.parameters()], state.update)
    state.depth += depth_of(state.model, plan)
    state.update += 1
    sampler.step = state.update


def _measure(recipe: Recipe, state: State, loader: Loader, book: Logbook, epoch: int, meter: Meter) -> None:
    """What is measured between two epochs: survival rates if they are due, and what the recipe watches."""
    if due(recipe, epoch):
        timed = "time" in str(recipe.budget)
        if timed:
            meter.line("timing blocks for the budget; this takes some twenty steps for every kind of block")
        autocast = precision_context(recipe, next(state.model.parameters()).device) if timed else nullcontext

        def told(share: float) -> None:
            meter.step(state.update, f"timing blocks, {share:.0%}", 0.0)

        with autocast():  # time is that of the steps to come
            state.survival.append(rates_now(recipe, state.model, loader, epoch, state.ranks, told))
        state.seconds += state.survival[-1]["seconds"]
        state.ranks.agree(lambda: book.append("survival", state.survival[-1]))
        rates = state.survival[-1]["rates"]
        meter.line(f"survival rates from budget {recipe.budget}: {', '.join(f'{rate:.2f}' for rate in rates)}")
    if epoch == 0:
        _watch(recipe, state, loader, book, epoch)


def _watch(recipe: Recipe, state: State, loader: Loader, book: Logbook, epoch: int) -> None:
    def look() -> None:
        state.instruments.append(watched(recipe, state.model, loader, epoch))
        book.append("instruments", state.instruments[-1])

    if recipe.watch:
        state.ranks.from_main(look)


def _status(recipe: Recipe, state: State, epoch: int, steps: int, expected: float) -> tuple[str, float]:
    loss, wrong, seen = state.sums.tolist()  # of this rank
    in_epoch = state.update - epoch * steps
    text = (
        f"epoch {epoch + 1}/{recipe.epochs}  loss {loss / seen:.3f}  error {100 * wrong / seen:.2f}%  "
        f"depth {state.depth / in_epoch:.2f} of {expected:.2f} expected"
    )
    return text, seen * state.ranks.size / max(state.epoch_seconds, 1e-9)


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _end_epoch(
    recipe: Recipe,
    run: Run,
    state: State,
    epoch: int,
    steps: int,
    others: dict[str, Loader],
    book: Logbook,
    meter: Meter,
    autocast: Callable[[], AbstractContextManager[Any]],
    loader: Loader,
) -> None:
    _check_finite(state, epoch)
    loss, wrong, seen = state.ranks.total(state.sums).tolist()
    if state.sync:
        state.sync.sync_buffers()
    sampler = sampler_of(state.model)
    line: dict[str, Any] = {
        "epoch": epoch + 1,
        "lr": recipe.lr_at((state.update - 1) / (recipe.epochs * steps)),
        "train_loss": loss / seen,
        "train_error": 100.0 * wrong / seen,
        "expected_depth": depth_of(state.model, sampler.expectation(state.update - 1)),
        "realised_depth": state.depth / steps,
        "first_gradient": _mean(*state.gradient.tolist()),
    }
    if (epoch + 1) % recipe.eval_every == 0 or epoch + 1 == recipe.epochs:
        # rates still on their way from 1 to their value count as they stand
        with using(state.model, sampler.expectation(state.update)), autocast():
            for name, other in others.items():
                result = evaluate(
                    state.model, other.eval_batches(), samples=0, share=(state.ranks.rank, state.ranks.size)
                )
                line[f"{name}_error"] = result.deterministic.error
                line[f"{name}_nll"] = result.deterministic.nll
        _watch(recipe, state, loader, book, epoch + 1)
    line["seconds"] = state.epoch_seconds
    line["images_per_second"] = seen / max(state.epoch_seconds, 1e-9)
    state.seconds += state.epoch_seconds
    state.epoch_seconds = state.depth = 0.0
    state.sums.zero_()
    state.gradient.zero_()
    state.ranks.agree(lambda: book.write(line))
    state.history = book.history
    if line.get("validation_error", math.inf) < state.best:
        state.best = line["validation_error"]
        state.ranks.from_main(lambda: run.save_weights("best", state.model))
    state.save(run)
    errors = "  ".join(
        f"{name} error {line[f'{name}_error']:5.2f}%" for name in ("train", *others) if f"{name}_error" in line
    )
    meter.line(
        f"epoch {epoch + 1:>3}/{recipe.epochs}  loss {line['train_loss']:.4f}  {errors}  "
        f"depth {line['realised_depth']:.2f}/{line['expected_depth']:.2f}  {line['images_per_second']:.0f} img/s"
    )
