"""One training loop for every rule: it gives the model a plan per update and knows nothing of what rules do with it.

Order of images, augmentation and draws are pure functions of (seed, epoch, batch) and (seed, update), so a resumed run
needs no state but weights, optimizer and counters, and on the CPU repeats the uninterrupted run bit for bit.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from residrop.attach import depth_of, expected_depth_of, sampler_of, using
from residrop.data import Loader, Splits, augmentation, fit, load
from residrop.errors import ConfigError, RunError
from residrop.inference import Evaluation, evaluate
from residrop.training.checkpoint import Run, build_network, write_json
from residrop.training.logbook import Logbook, Meter, draw_curves
from residrop.training.recipe import Recipe

__all__ = ["Interrupted", "Outcome", "choose_device", "loader_of_run", "precision_context", "train"]


class Interrupted(Exception):
    """The run was stopped by Ctrl-C or SIGTERM after saving its state."""


@dataclass
class _State:
    """Everything that changes along a training. `sums` collects loss and errors of the epoch on the device."""

    model: nn.Module
    optimizer: torch.optim.SGD
    update: int = 0
    seconds: float = 0.0  # training time of all epochs, evaluation excluded
    epoch_seconds: float = 0.0
    depth: float = 0.0  # summed over the updates of this epoch
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    best: float = math.inf
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, run: Run) -> None:
        run.save_state(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "sampler": sampler_of(self.model).state_dict(),
                **{name: getattr(self, name) for name in _COUNTERS},
                "sums": self.sums.cpu(),
            }
        )

    def restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        sampler_of(self.model).load_state_dict(saved["sampler"])
        for name in _COUNTERS:
            setattr(self, name, saved[name])
        self.sums = saved["sums"].to(self.sums.device)


_COUNTERS = ("update", "seconds", "epoch_seconds", "depth", "best", "history")


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


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; anything else is a torch device name. ConfigError if it is not usable."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here ({reason}); try --device cpu") from None
    return device


def precision_context(recipe: Recipe, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A function that makes the autocast context of a recipe on a device."""
    bf16 = recipe.precision == "bf16"
    if recipe.precision == "auto":
        hardware = torch.ops.mkldnn._is_mkldnn_bf16_supported if device.type == "cpu" else torch.cuda.is_bf16_supported
        bf16 = bool(hardware())
    if not bf16:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


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
    splits = load(recipe.data, validation=recipe.validation, seed=recipe.seed + 1, limit=recipe.limit)
    normalization = fit(splits.train, recipe.normalization)
    loader = _loader(recipe, splits, "train", normalization, device)
    total = recipe.epochs * loader.steps_per_epoch
    model = build_network(recipe, classes=len(splits.classes), channels=splits.channels, steps=total)
    dataset = {"classes": splits.classes, "channels": splits.channels, "size": splits.size, "steps": total}
    if resume and (out / "recipe.json").exists():
        run = Run.open(out)
        _check_same(run.recipe(), recipe, out)
    else:
        run = Run.create(out, recipe, dataset, normalization)
    memory = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=memory) if _has_images(model) else model.to(device)  # pyright: ignore
    state = _State(model, _optimizer(recipe, model))
    state.sums = state.sums.to(device)
    if resume and (saved := run.load_state()) is not None:
        state.restore(saved)
    others = {
        name: _loader(recipe, splits, name, normalization, device)
        for name in ("validation", "test")
        if getattr(splits, name) is not None
    }
    book = Logbook(out, state.history)
    with Meter(total, state.update, recipe.rule, console=console, quiet=quiet) as meter, _stop_signals() as stopped:
        _epochs(recipe, run, state, loader, others, book, meter, stopped)
    book.close()
    return _finish(recipe, run, state, others["test"], console, quiet)


def _has_images(model: nn.Module) -> bool:
    return any(parameter.ndim == 4 for parameter in model.parameters())


def _check_same(before: Recipe, now: Recipe, out: Path) -> None:
    if before.fingerprint() != now.fingerprint():
        old, new = before.to_dict(), now.to_dict()
        changed = ", ".join(f"{key} (was {old[key]!r}, is {new[key]!r})" for key in old if old[key] != new[key])
        raise RunError(
            f"{out} was started with another recipe: {changed}; resume it unchanged, or choose another --out"
        )


def _loader(recipe: Recipe, splits: Splits, part: str, normalization: Any, device: torch.device) -> Loader:
    return Loader(
        getattr(splits, part),
        batch_size=recipe.batch_size if part == "train" else max(recipe.batch_size, 250),
        normalization=normalization,
        augmentation=augmentation(recipe.augmentation) if part == "train" else None,
        seed=recipe.seed,
        device=device,
        channels_last=recipe.channels_last,
        workers=recipe.workers,
    )


def loader_of_run(run: Run, data: str | None = None, device: torch.device | None = None) -> Loader:
    """The test images of a run (of another `data` source if given), normalised as in its training."""
    recipe = run.recipe()
    splits = load(data or recipe.data, validation=0)
    names = tuple(run.dataset()["classes"])
    if splits.classes != names or splits.channels != run.dataset()["channels"]:
        raise RunError(
            f"{run.path} was trained on {len(names)} classes of {run.dataset()['channels']}-channel images, "
            f"{splits.name} has {len(splits.classes)} of {splits.channels}; give the matching --data"
        )
    return _loader(recipe, splits, "test", run.normalization(), device or choose_device(recipe.device))


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    if recipe.momentum > 0:
        # Fused SGD cannot start some buffers later than others, as blocks dropped in the first updates ask for. A
        # buffer of zeros is the same: without dampening the first step makes it the gradient either way.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into an event that the loop looks at between updates."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():  # a second Ctrl-C does not wait for the update to end
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _epochs(
    recipe: Recipe,
    run: Run,
    state: _State,
    loader: Loader,
    others: dict[str, Loader],
    book: Logbook,
    meter: Meter,
    stopped: threading.Event,
) -> None:
    steps = loader.steps_per_epoch
    expected = expected_depth_of(state.model)
    autocast = precision_context(recipe, next(state.model.parameters()).device)
    saved_at = shown_at = time.perf_counter()
    while state.update < recipe.epochs * steps:
        epoch = state.update // steps
        state.model.train()
        started = time.perf_counter()
        for x, y in loader.train_batches(epoch, start=state.update % steps):
            _update(recipe, state, x, y, recipe.lr_at(state.update / (recipe.epochs * steps)), autocast)
            now = time.perf_counter()
            state.epoch_seconds += now - started
            started = now
            if meter.live and now - shown_at > 0.25:
                shown_at = now
                meter.step(state.update, *_status(recipe, state, epoch, steps, expected))
            if stopped.is_set() or now - saved_at > 60.0 * recipe.checkpoint_minutes:
                state.save(run)
                saved_at = started = time.perf_counter()
                if stopped.is_set():
                    raise Interrupted(f"stopped after update {state.update}; continue with --resume --out {run.path}")
        _end_epoch(recipe, run, state, epoch, steps, others, book, meter, autocast)
        saved_at = time.perf_counter()


def _update(
    recipe: Recipe, state: _State, x: Tensor, y: Tensor, lr: float, autocast: Callable[[], AbstractContextManager[Any]]
) -> None:
    """One optimizer update: one plan, shared by its micro-batches."""
    sampler = sampler_of(state.model)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=not recipe.decay_dropped)
    if recipe.decay_dropped:  # dropped blocks must see zeros, not None
        for parameter in state.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    parts = zip(x.chunk(recipe.micro_batches), y.chunk(recipe.micro_batches), strict=True)
    for part, (images, labels) in enumerate(parts):
        with using(state.model, sampler.plan(state.update, part=part)), autocast():
            logits = state.model(images)
            loss = F.cross_entropy(logits.float(), labels)
        (loss * (len(images) / len(x))).backward()
        with torch.no_grad():
            wrong = (logits.argmax(dim=1) != labels).sum()
            state.sums += torch.stack(
                (loss.double() * len(images), wrong.double(), torch.ones_like(wrong) * len(images))
            )
    state.optimizer.step()
    state.depth += depth_of(state.model, sampler.plan(state.update))
    state.update += 1
    sampler.step = state.update


def _status(recipe: Recipe, state: _State, epoch: int, steps: int, expected: float) -> tuple[str, float]:
    loss, wrong, seen = state.sums.tolist()
    in_epoch = state.update - epoch * steps
    text = (
        f"epoch {epoch + 1}/{recipe.epochs}  loss {loss / seen:.3f}  error {100 * wrong / seen:.2f}%  "
        f"depth {state.depth / in_epoch:.2f} of {expected:.2f} expected"
    )
    return text, seen / max(state.epoch_seconds, 1e-9)


def _end_epoch(
    recipe: Recipe,
    run: Run,
    state: _State,
    epoch: int,
    steps: int,
    others: dict[str, Loader],
    book: Logbook,
    meter: Meter,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    loss, wrong, seen = state.sums.tolist()
    if not math.isfinite(loss):
        raise RunError(f"the loss is {loss} in epoch {epoch + 1}; try a smaller lr, a warmup, or --precision fp32")
    sampler = sampler_of(state.model)
    line: dict[str, Any] = {
        "epoch": epoch + 1,
        "lr": state.optimizer.param_groups[0]["lr"],
        "train_loss": loss / seen,
        "train_error": 100.0 * wrong / seen,
        "expected_depth": depth_of(state.model, sampler.expectation(state.update - 1)),
        "realised_depth": state.depth / steps,
    }
    if (epoch + 1) % recipe.eval_every == 0 or epoch + 1 == recipe.epochs:
        # rates still on their way from 1 to their value count as they stand
        with using(state.model, sampler.expectation(state.update)), autocast():
            for name, loader in others.items():
                result = evaluate(state.model, loader.eval_batches(), samples=0)
                line[f"{name}_error"] = result.deterministic.error
                line[f"{name}_nll"] = result.deterministic.nll
    line["seconds"] = state.epoch_seconds
    line["images_per_second"] = seen / max(state.epoch_seconds, 1e-9)
    state.seconds += state.epoch_seconds
    state.epoch_seconds = state.depth = 0.0
    state.sums.zero_()
    book.write(line)
    state.history = book.history
    if line.get("validation_error", math.inf) < state.best:
        state.best = line["validation_error"]
        run.save_weights("best", state.model)
    state.save(run)
    errors = "  ".join(
        f"{name} error {line[f'{name}_error']:5.2f}%" for name in ("train", *others) if f"{name}_error" in line
    )
    meter.line(
        f"epoch {epoch + 1:>3}/{recipe.epochs}  loss {line['train_loss']:.4f}  {errors}  "
        f"depth {line['realised_depth']:.2f}/{line['expected_depth']:.2f}  {line['images_per_second']:.0f} img/s"
    )


def _finish(recipe: Recipe, run: Run, state: _State, test: Loader, console: Console, quiet: bool) -> Outcome:
    if recipe.select == "best" and (run.path / "best.safetensors").exists():
        run.load_weights("best", state.model)
    run.save_weights("model", state.model)
    draw_curves(run.path / "curves.png", {recipe.rule: state.history}, f"{recipe.network}, {recipe.rule}")
    autocast = precision_context(recipe, next(state.model.parameters()).device)
    with autocast(), Meter(test.num_images, 0, "evaluating", console=console, quiet=quiet) as meter:
        evaluation = evaluate(
            state.model, test.eval_batches(), recipe.samples, on_batch=lambda done: meter.step(done, "", 0.0)
        )
    outcome = Outcome(
        run=run,
        evaluation=evaluation,
        parameters=sum(parameter.numel() for parameter in state.model.parameters()),
        train_seconds=state.seconds,
        expected_depth=expected_depth_of(state.model),
        history=state.history,
    )
    write_json(run.path / "evaluation.json", outcome.to_dict())
    return outcome
