"""Loggers of a training beside metrics.jsonl, each a callback: TensorBoard, CSV, Weights & Biases, MLflow."""

import contextlib
import csv
import io
import logging
import os
from collections.abc import Sequence
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

__all__ = ["Csv", "LoggerName", "Mlflow", "TensorBoard", "WeightsAndBiases", "make_loggers"]

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
    """The recipe, without where its data lie on this machine."""
    recipe = run.recipe()
    return {**recipe.to_dict(), "data": Path(recipe.data).name}


def _kept(run: Run, name: str, new: str) -> str:
    """What a service calls this run: as it was written down when the run began, else `new`."""
    path = run.path / "logs.json"
    known = read_record(path, advice="delete it to log under a new name") if path.exists() else {}
    if name not in known:
        write_record(path, {**known, name: new})
    return known.get(name, new)


class TensorBoard(Callback):
    """Events in the folder `tensorboard` of the run."""

    def __init__(self) -> None:
        self._path, self._events = Path(), None

    def on_start(self, run: Run, history: Sequence[Line]) -> None:
        # TensorBoard's writer takes seconds to import and is needed by runs only
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard import SummaryWriter

        self._path = run.path / "tensorboard"
        try:
            self._events = SummaryWriter(str(self._path), purge_step=history[-1]["epoch"] if history else 1)
        except OSError as error:
            raise unwritable(self._path, error) from None
        if history:
            self._write(history[-1])

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

    def on_start(self, run: Run, history: Sequence[Line]) -> None:
        import wandb

        name = _kept(run, "wandb", os.urandom(6).hex())
        project = os.environ.get("WANDB_PROJECT", "residrop")
        self._run = wandb.init(
            project=project, id=name, name=run.path.name, dir=run.path, resume="allow", config=_settings(run)
        )
        if history:
            self._write(history[-1])

    def on_epoch(self, line: Line, model: nn.Module) -> None:
        self._write(line)

    def _write(self, line: Line) -> None:
        self._run.log(_numbers(line), step=line["epoch"])

    def on_finish(self, outcome: "Outcome") -> None:
        self._run.summary.update(_results(outcome))

    def on_close(self) -> None:
        if self._run is not None:
            self._run.finish()


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
        path = run.path / "logs.json"
        if path.exists() and "mlflow" in read_record(path):
            self._name = _kept(run, "mlflow", "")
            self._client.update_run(self._name, status="RUNNING")
        else:
            made = self._client.create_run(number, run_name=run.path.name)
            self._name = _kept(run, "mlflow", made.info.run_id)
            for name, value in _settings(run).items():
                self._client.log_param(self._name, name, value)
        if history:
            self._write(history[-1])

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
