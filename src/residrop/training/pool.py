"""Several trainings at once, each in a process of its own; what was finished before is not trained again."""

import json
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from residrop.errors import UsageError
from residrop.training.loop import Interrupted
from residrop.training.recipe import Recipe
from residrop.training.run import check_same, train

__all__ = ["train_all"]


def _threads(count: int) -> None:
    torch.set_num_threads(count)


def _train(recipe: Recipe, path: Path) -> dict[str, Any] | str:
    """What evaluation.json holds in the end, or the error or interruption as a text."""
    try:
        return train(recipe, path, resume=True, quiet=True).to_dict()
    except (UsageError, Interrupted) as error:
        return str(error)


def train_all(
    recipes: Mapping[str, Recipe], out: Path, *, workers: int = 2, console: Console | None = None
) -> dict[str, dict[str, Any]]:
    """Train every recipe into `out`/name, `workers` at a time, the threads of this process shared among them.

    Runs that are complete are read, those that were stopped are continued. Ctrl-C stops all of them after saving.

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
        if (out / name / "evaluation.json").exists():
            found[name] = json.loads((out / name / "evaluation.json").read_text())
    todo = {name: recipe for name, recipe in recipes.items() if name not in found}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    failed: dict[str, str] = {}
    with (
        Progress(*columns, console=console, transient=True) as progress,
        ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_threads,
            initargs=(max(1, torch.get_num_threads() // workers),),
        ) as pool,
    ):
        task = progress.add_task("runs", total=len(recipes), completed=len(found))
        futures: dict[Future[dict[str, Any] | str], str] = {
            pool.submit(_train, recipe, out / name): name for name, recipe in todo.items()
        }
        try:
            for future in as_completed(futures):
                name, result = futures[future], future.result()
                if isinstance(result, str):
                    failed[name] = result
                    continue
                found[name] = result
                progress.advance(task)
                error, seconds = result["deterministic_error"], result["train_seconds"]
                console.print(f"{name}: error {error:.2f}% in expectation, {seconds:.0f} s of training")
        except KeyboardInterrupt:  # the processes were told, too
            pool.shutdown(wait=True, cancel_futures=True)
            raise Interrupted(f"stopped; the same command continues the runs in {out}") from None
    if failed:
        name, text = next(iter(failed.items()))
        raise UsageError(f"{len(failed)} of {len(recipes)} runs failed; {name}: {text}")
    return {name: found[name] for name in recipes}
