"""What a run tells: metrics as JSON lines, curves as a picture, progress on the terminal."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from residrop.common.files import as_json, replacing
from residrop.common.pictures import save_png
from residrop.training.checked import unwritable, writing

__all__ = ["Logbook", "Meter", "draw_curves"]


class Logbook:
    """Appends one line of metrics per epoch to `metrics.jsonl`.

    Lines of other files of the run, such as `survival.jsonl`, come in between. Methods raise RunError if a file cannot
    be written. What is not finite is written as null.

    Args:
        path: the run directory; None keeps the lines in memory only (on ranks that do not write).
        history: lines already in force (of the state a run resumes from); lines written after that state are removed.
        others: the same for other files, by name.
    """

    def __init__(
        self,
        path: Path | None,
        history: Sequence[Mapping[str, Any]] = (),
        others: Mapping[str, Sequence[Mapping[str, Any]]] = MappingProxyType({}),
    ) -> None:
        self.history: list[dict[str, Any]] = [dict(line) for line in history]
        self._path = path
        if path is None:
            return
        for name, lines in {"metrics": self.history, **others}.items():
            file = path / f"{name}.jsonl"
            if lines or name == "metrics" or file.exists():  # also those written before there was a state
                with writing(file) as temporary:
                    temporary.write_text("".join(map(_line, lines)))

    def write(self, line: Mapping[str, Any]) -> None:
        """Record the metrics of an epoch (counted from 1)."""
        self.history.append(dict(line))
        self.append("metrics", line)

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Record a line of the file `name`.jsonl."""
        if self._path is not None:
            file = self._path / f"{name}.jsonl"
            try:
                with file.open("a") as lines:
                    lines.write(_line(line))
            except OSError as error:
                raise unwritable(file, error) from None


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(json.loads(as_json(values))) + "\n"  # without NaN


def draw_curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> None:
    """Draw error (train dashed, test solid) against the epoch, one colour per run, as a PNG.

    Args:
        path: file to write.
        runs: histories by label, as in `Logbook.history`.
        title: heading of the picture.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display; slow to import

    figure = Figure(figsize=(8.0, 4.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, (label, history) in enumerate(runs.items()):
        colour = f"C{number % 10}"
        for key, style, what in (("train_error", "--", "train"), ("test_error", "-", "test")):
            points = [(line["epoch"], line[key]) for line in history if line.get(key) is not None]
            if points:
                name = f"{label} ({what})" if len(runs) == 1 else (label if what == "test" else None)
                axes.plot(*zip(*points, strict=True), style, color=colour, label=name, linewidth=1.6, alpha=0.95)
        best = [(line["validation_error"], line) for line in history if line.get("validation_error") is not None]
        if best:
            chosen = min(best, key=lambda pair: pair[0])[1]
            axes.plot(chosen["epoch"], chosen["test_error"], "o", color=colour, fillstyle="none", markersize=8)
    highest = max((line.get("test_error") or 0.0 for history in runs.values() for line in history), default=100.0)
    lowest = min((line.get("test_error") or 1.0 for history in runs.values() for line in history), default=1.0)
    if highest > 12.0 * max(lowest, 0.1):
        axes.set_yscale("symlog", linthresh=1.0)
        ticks = [0, 0.5, 1, 2, 5, 10, 20, 50, 100]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_ylim(0.0, 100.0)
    else:
        axes.set_ylim(bottom=0.0)
    axes.set(xlabel="epoch", ylabel="error (%)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    axes.text(
        0.0, -0.14, "solid: test, dashed: train, circle: lowest validation error", transform=axes.transAxes, fontsize=8
    )
    with replacing(path) as temporary:
        save_png(figure, temporary)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.fields.get('speed', 0.0):7.0f} img/s")


class Meter(AbstractContextManager["Meter"]):
    """Progress of a training: a live bar on a terminal, and a line per epoch everywhere.

    Args:
        total: number of updates of the training; done: number already made.
        console: where to write; quiet writes nothing.
    """

    def __init__(self, total: int, done: int, label: str, *, console: Console, quiet: bool = False) -> None:
        self._console, self._quiet = console, quiet
        self.live = console.is_terminal and not quiet
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            _Speed(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not self.live,
            transient=True,
        )
        self._task = self._progress.add_task(label, total=total, completed=done, text="", speed=0.0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, done: int, text: str, speed: float) -> None:
        """Show the state after `done` updates."""
        self._progress.update(self._task, completed=done, text=text, speed=speed)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if not self._quiet:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)
