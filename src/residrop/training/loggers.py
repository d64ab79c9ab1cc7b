"""Loggers of a training beside metrics.jsonl, each a callback: TensorBoard, CSV, Weights & Biases, MLflow."""

import contextlib
import csv
import io
import logging
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from residrop.common.errors import ConfigError
from residrop.training.callbacks import Callback, Line
from residrop.training.checked import read_record, unwritable, write_record, writing
from residrop.training.checkpoint import Run

if TYPE_CHECKING:
    from residrop.training.run import Outcome

__all__ = [
    "Csv",
    "LoggerName",
    "Mlflow",
    "TensorBoard",
    "WeightsAndBiases",
    "loggers_of",
    "make_loggers",
    "remember",
]

LoggerName = Literal["tensorboard", "csv", "wandb", "mlflow"]

_SCALARS = (
    *("train_loss", "train_error", "validation_error", "test_error"),
    *("lr", "realised_depth", "first_gradient", "images_per_second"),
)
_RESULTS = ("deterministic_error", "sampled_error", "train_seconds", "expected_depth", "parameters")


def make_loggers(names: Sequence[str]) -> list[Callback]:
    """The loggers of these names.

    Raises:
        ConfigError: for another name, or a package that is not installed.
    """
    made: dict[str, type[Callback]] = dict(
        zip(get_args(LoggerName), (TensorBoard, Csv, WeightsAndBiases, Mlflow), strict=True)
    )
    for name in names:
        if name not in made:
            raise ConfigError(f"log {name!r}: allowed are {', '.join(made)}")
        if name in ("wandb", "mlflow") and find_spec(name) is None:
            raise ConfigError(f"log {name!r} needs a package that is not installed; run: python -m pip install {name}")
    return [made[name]() for name in dict.fromkeys(names)]


def _numbers(line: Line) -> dict[str, float]:
    return {name: float(value) for name, value in line.items() if isinstance(value, (int, float)) and name != "epoch"}


def _results(outcome: "Outcome") -> dict[str, float]:
    found = outcome.to_dict()
    return _numbers({f"final_{name}": found[name] for name in _RESULTS})


def _settings(run: Run) -> dict[str, Any]:
    """The recipe, without where files lie on this machine."""
    recipe = run.recipe()
    library, separator, name = recipe.network.partition(":")
    return {
        **recipe.to_dict(),
        "data": Path(recipe.data).name,
        "weights": None if recipe.weights is None else Path(recipe.weights).name,
        "network": f"{library}{separator}{Path(name).name}" if separator else recipe.network,
    }


def _known(path: Path) -> dict[str, Any]:
    """What is written down of the loggers of a run directory: their names, and what services call the run."""
    file = path / "logs.json"
    return read_record(file, advice="delete it to log under a new name") if file.exists() else {}


def remember(run: Run, names: Sequence[str]) -> None:
    """Write down which loggers a run has, and forget what services called one that begins anew."""
    before = _known(run.path)
    known = before if (run.path / "last.pt").exists() else {}
    if tuple(names) != ("tensorboard",) or before:
        write_record(run.path / "logs.json", {**known, "loggers": list(names)})


def loggers_of(path: Path) -> tuple[LoggerName, ...]:
    """The names of the loggers that a run directory had last."""
    return tuple(name for name in _known(path).get("loggers", ["tensorboard"]) if name in get_args(LoggerName))


def _called(run: Run, service: str, new: Callable[[], str]) -> tuple[str, bool]:
    """What a service calls this run, and whether it is new there."""
    known = _known(run.path)
    if service in known:
        return known[service], False
    name = new()
    write_record(run.path / "logs.json", {**known, service: name})
    return name, True


class TensorBoard(Callback):
    """Events in the folder `tensorboard` of the run."""

    def __init__(self) -> None:
        self._path, self._events = Path(), None

    def on_start(self, run: Run, history: Sequence[Line]) -> None:
        # TensorBoard's writer takes seconds to import and is needed by runs only
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard import SummaryWriter

        self._path = run.path / "tensorboard"
        lines = history[-1:] if self._path.exists() else history
        try:
            self._events = SummaryWriter(str(self._path), purge_step=lines[0]["epoch"] if lines else 1)
        except OSError as error:
            raise unwritable(self._path, error) from None
        for line in lines:
            self._write(line)

    def on_epoch(self, line: Line, model: nn.Module) -> None:
        self._write(line)

    def _write(self, line: Line) -> None:
        assert self._events is not None
        try:
            for name in _SCALARS:
                if line.get(name) is not None:
                    self._events.add_scalar(name, line[name], line["epoch"])
            self._events.flush()
        except OSError as error:
            raise unwritable(self._path, error) from None

    def on_close(self) -> None:
        if self._events is not None:
            with contextlib.suppress(OSError):  # every line was flushed when it was written
                self._events.close()


class Csv(Callback):
    """The lines of the epochs as a table, metrics.csv of the run; empty where there is no value."""

    def __init__(self) -> None:
        self._path, self._lines = Path(), list[Line]()

    def on_start(self, run: Run, history: Sequence[Line]) -> None:
        self._path, self._lines = run.path / "metrics.csv", list(history)
        self._write()

    def on_epoch(self, line: Line, model: nn.Module) -> None:
        self._lines.append(dict(line))
        self._write()

    def _write(self) -> None:
        names = list(dict.fromkeys(name for line in self._lines for name in line))
        text = io.StringIO()
        table = csv.DictWriter(text, names, lineterminator="\n")
        table.writeheader()
        table.writerows(self._lines)
        with writing(self._path) as temporary:
            temporary.write_text(text.getvalue())


class WeightsAndBiases(Callback):
    """A run of Weights & Biases, which is continued if the training is. Its own variables hold, such as WANDB_PROJECT
    (default: residrop) and WANDB_MODE=offline."""

    def __init__(self) -> None:
        self._run: Any = None
        self._code = 1

    def on_start(self, run: Run, history: Sequence[Line]) -> None:
        import wandb

        name, new = _called(run, "wandb", lambda: os.urandom(6).hex())
        project = os.environ.get("WANDB_PROJECT", "residrop")
        self._run = wandb.init(
            project=project, id=name, name=run.path.name, dir=run.path, resume="allow", config=_settings(run)
        )
        for line in history if new else history[-1:]:  # steps that it has are not taken twice
            self._write(line)

    def on_epoch(self, line: Line, model: nn.Module) -> None:
        self._write(line)

    def _write(self, line: Line) -> None:
        self._run.log(_numbers(line), step=line["epoch"], commit=True)

    def on_finish(self, outcome: "Outcome") -> None:
        self._run.summary.update(_results(outcome))
        self._code = 0

    def on_close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=self._code)


class Mlflow(Callback):
    """A run of MLflow, which is continued if the training is. Its own variables hold, such as MLFLOW_TRACKING_URI and
    MLFLOW_EXPERIMENT_NAME (default: residrop)."""

    def __init__(self) -> None:
        self._client: Any = None
        self._name, self._status = "", "KILLED"

    def on_start(self, run: Run, history: Sequence[Line]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "residrop")
        experiment = self._client.get_experiment_by_name(title)
        number = self._client.create_experiment(title) if experiment is None else experiment.experiment_id
        made = lambda: self._client.create_run(number, run_name=run.path.name).info.run_id  # noqa: E731
        self._name, new = _called(run, "mlflow", made)
        if new:
            for name, value in _settings(run).items():
                self._client.log_param(self._name, name, value)
        else:
            self._client.update_run(self._name, status="RUNNING")
            self._client.set_tag(self._name, "epochs", run.recipe().epochs)  # parameters cannot change
        known = {one.step for one in self._client.get_metric_history(self._name, "train_loss")}
        for line in history:
            if line["epoch"] not in known:
                self._write(line)

    def on_epoch(self, line: Line, model: nn.Module) -> None:
        self._write(line)

    def _write(self, line: Line) -> None:
        for name, value in _numbers(line).items():
            self._client.log_metric(self._name, name, value, step=line["epoch"])

    def on_finish(self, outcome: "Outcome") -> None:
        for name, value in _results(outcome).items():
            self._client.log_metric(self._name, name, value)
        self._status = "FINISHED"

    def on_close(self) -> None:
        if self._name:
            self._client.set_terminated(self._name, self._status)
