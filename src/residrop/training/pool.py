"""Several trainings at once, each in a process of its own; what was finished before is not trained again."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from residrop.common.errors import Interrupted, RunError, UsageError
from residrop.common.orphans import leave_with_parent
from residrop.training.checkpoint import Run
from residrop.training.recipe import Recipe
from residrop.training.run import check_same, train

__all__ = ["train_all"]

_stopping: Event | None = None  # of a worker: set when no further training may begin
_orphan = False  # of a worker: whether the process that started it is gone


def _start(threads: int, stopping: Event) -> None:
    """In a new worker. Ctrl-C reaches it from the parent, once, and not from the terminal, too: two end a training
    without saving it. So it leaves the terminal's process group, and has to see for itself that the parent is gone.
    """
    global _stopping
    _stopping = stopping
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    leave_with_parent(_note_orphan)


def _note_orphan() -> None:
    global _orphan
    _orphan = True


def _train(recipe: Recipe, path: Path) -> dict[str, Any] | str | None:
    """What evaluation.json holds in the end, the error as a text, or None if it was stopped."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if _stopping is not None and _stopping.is_set():
            return None
        return train(recipe, path, resume=True, quiet=True).to_dict()
    except (Interrupted, KeyboardInterrupt):
        return None
    except UsageError as error:
        return str(error)
    finally:
        if _orphan:
            os._exit(1)  # nobody asks for the result, and there may be more to train in the queue
        signal.signal(signal.SIGINT, before)


def train_all(
    recipes: Mapping[str, Recipe],
    out: Path,
    *,
    workers: int = 2,
    console: Console | None = None,
    on_finished: Callable[[str, dict[str, Any]], object] = lambda name, found: None,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Train every recipe into `out`/name, `workers` at a time, the threads of this process shared among them.

    Runs that are complete are read, those that were stopped are continued. Ctrl-C stops all of them after saving.

    Args:
        recipes: what to train, by name.
        out: folder of the run directories.
        workers: processes, at least 1.
        console: where progress is written (default: standard error); `quiet` writes nothing.
        on_finished: called with the name of a run and what its `evaluation.json` holds as soon as it is finished;
            first for those that were complete before.

    Returns:
        What `evaluation.json` holds, by name.

    Raises:
        UsageError: a run cannot be trained; others that were going on are finished first.
        Interrupted: Ctrl-C; the same call continues.
    """
    console = console or Console(stderr=True, markup=False)
    found: dict[str, dict[str, Any]] = {}
    for name, recipe in recipes.items():
        check_same(recipe, out / name, resume=True)
        finished_before = Run(out / name).evaluation()
        # there may have been fewer epochs, of a run that can be made longer
        if finished_before is not None and finished_before["run"].get("epochs", recipe.epochs) == recipe.epochs:
            found[name] = finished_before
            on_finished(name, finished_before)
    todo = {name: recipe for name, recipe in recipes.items() if name not in found}
    if not todo:
        return {name: found[name] for name in recipes}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("runs", total=len(recipes), completed=len(found))

        def finished(name: str, result: dict[str, Any]) -> None:
            found[name] = result
            progress.advance(task)
            if not quiet:
                error, seconds = result["deterministic_error"], result["train_seconds"]
                console.print(f"{name}: error {error:.2f}% in expectation, {seconds:.0f} s of training")
            on_finished(name, result)

        failed = _train_rest(todo, out, workers, finished)
    if failed:
        name, text = next(iter(failed.items()))
        raise UsageError(f"{len(failed)} of {len(recipes)} runs failed; {name}: {text}")
    return {name: found[name] for name in recipes}


def _train_rest(
    todo: Mapping[str, Recipe], out: Path, workers: int, finished: Callable[[str, dict[str, Any]], object]
) -> dict[str, str]:
    """Train what is left; returns the errors by name."""
    context = multiprocessing.get_context("spawn")
    stopping, failed = context.Event(), dict[str, str]()
    workers = min(workers, len(todo))
    share = max(1, torch.get_num_threads() // workers)
    others = {child.pid for child in multiprocessing.active_children()}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(share, stopping)) as pool:
        futures: dict[Future[dict[str, Any] | str | None], str] = {
            pool.submit(_train, recipe, out / name): name for name, recipe in todo.items()
        }
        try:
            for future in as_completed(futures):
                name, result = futures[future], future.result()
                if result is None:
                    raise KeyboardInterrupt
                if isinstance(result, str):
                    failed[name] = result
                else:
                    finished(name, result)
        except BaseException as error:
            _stop(stopping, others)
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"stopped; the same command continues the runs in {out}") from None
            if isinstance(error, BrokenProcessPool):
                raise RunError(
                    "a training was ended from outside (out of memory? try fewer workers); the same command continues "
                    f"the runs in {out}"
                ) from None
            raise
    return failed


def _stop(stopping: Event, others: Set[int | None]) -> None:
    """Let every worker save its training; none begins another. `others` are processes that are no workers."""
    stopping.set()
    for child in multiprocessing.active_children():
        if child.pid is not None and child.pid not in others:
            os.kill(child.pid, signal.SIGINT)
