"""Callbacks and the loggers that are written with them."""

import csv
import json
import time
from types import SimpleNamespace

import pytest

from residrop.common.errors import ConfigError, Interrupted, RunError
from residrop.training import Callback, Run, loggers, train
from residrop.training.loggers import LoggerName, make_loggers


class Listener(Callback):
    def __init__(self, fail=""):
        self.heard, self.fail = [], fail

    def on_start(self, run, history):
        self.heard.append(("start", [line["epoch"] for line in history]))

    def on_epoch(self, line, model):
        self.heard.append(("epoch", line["epoch"], line["train_loss"]))
        if self.fail:
            raise ValueError(self.fail)

    def on_finish(self, outcome):
        self.heard.append(("finish", outcome.evaluation.deterministic.error))

    def on_close(self):
        self.heard.append(("close",))


def test_callbacks_hear_everything_in_order(tiny, tmp_path):
    listener = Listener()
    outcome = train(tiny(), tmp_path / "run", quiet=True, callbacks=[Callback(), listener])
    losses = [line["train_loss"] for line in outcome.history]
    assert listener.heard == [
        ("start", []),
        *(("epoch", number, loss) for number, loss in enumerate(losses, 1)),
        ("finish", outcome.evaluation.deterministic.error),
        ("close",),
    ]
    again = Listener()
    train(tiny(), tmp_path / "run", resume=True, quiet=True, callbacks=[again])
    assert again.heard == [("start", [1, 2]), listener.heard[-2], ("close",)]


def test_resumed_training_tells_what_was_done(tiny, tmp_path, interrupt):
    interrupt(tiny(), tmp_path / "run", 5)
    listener = Listener()
    train(tiny(), tmp_path / "run", resume=True, quiet=True, callbacks=[listener])
    assert [one[:2] for one in listener.heard][:2] == [("start", [1]), ("epoch", 2)]


def test_a_failing_callback_ends_the_training_and_loses_nothing(tiny, tmp_path, assert_same_run):
    with pytest.raises(RunError, match=r"Listener\.on_epoch failed \(ValueError: disk on fire\).*--resume") as caught:
        train(tiny(), tmp_path / "broken", quiet=True, callbacks=[listener := Listener("disk on fire")])
    assert isinstance(caught.value.__cause__, ValueError)
    assert listener.heard[-1] == ("close",)
    assert Run(tmp_path / "broken").load_state()["update"] == 4  # of the epoch it was told of
    train(tiny(), tmp_path / "broken", resume=True, quiet=True)
    train(tiny(), tmp_path / "whole", quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_callbacks_that_were_not_started_are_not_closed(tiny, tmp_path):
    listener = Listener()
    with pytest.raises(ConfigError):
        train(tiny(network="resnet-7"), tmp_path / "run", quiet=True, callbacks=[listener])
    assert listener.heard == []


def test_an_error_at_the_end_is_a_warning(tiny, tmp_path):
    class Closing(Listener):
        def on_close(self):
            raise OSError("server gone")

    last = Listener()
    with pytest.warns(RuntimeWarning, match=r"Closing\.on_close failed \(OSError: server gone\)"):
        outcome = train(tiny(), tmp_path / "run", quiet=True, callbacks=[Closing(), last])
    assert outcome.history
    assert last.heard[-1] == ("close",)


def test_loggers_of_a_run_are_those_of_its_continuation(tmp_path, monkeypatch):
    from residrop.cli import main

    monkeypatch.chdir(tmp_path)
    small = ["--network", "resnet-8", "--limit", "100", "--epochs", "1", "--samples", "0", "--lr-drops", "--quiet"]
    assert main(["train", *small, "--log", "csv", "--out", "run"]) == 0
    assert main(["train", "--resume", "--out", "run", "--epochs", "2", "--quiet"]) == 0
    assert (tmp_path / "run/metrics.csv").read_text().count("\n") == 3
    assert not (tmp_path / "run/tensorboard").exists()


def test_a_logger_that_comes_later_gets_all_epochs(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny(lr_drops=())
    train(recipe, tmp_path / "run", quiet=True, log=())
    train(recipe.replace(epochs=3), tmp_path / "run", quiet=True, resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3]


def test_callbacks_are_closed_after_a_stop(tiny, tmp_path):
    class Stopping(Listener):
        def on_epoch(self, line, model):
            raise Interrupted("enough")

    stopping = Stopping()
    with pytest.raises(RunError, match="enough"):
        train(tiny(), tmp_path / "run", quiet=True, callbacks=[stopping])
    assert stopping.heard == [("start", []), ("close",)]


# Loggers


def test_csv_is_the_history_as_a_table(tiny, tmp_path):
    recipe = tiny(eval_every=2, epochs=3)
    with pytest.raises(RunError):
        train(recipe, tmp_path / "run", quiet=True, log=["csv"], callbacks=[Listener("stop")])
    outcome = train(recipe, tmp_path / "run", resume=True, quiet=True, log=["csv"])
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    for row, line in zip(rows, outcome.history, strict=True):
        assert {name: float(value) for name, value in row.items() if value} == pytest.approx(
            {name: value for name, value in line.items() if value is not None}
        )
    assert rows[0]["test_error"] == ""
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_offline(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it leaves a log of its own where it is started
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged, original = [], wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(
        wandb.sdk.wandb_run.Run,
        "log",
        lambda self, data, **rest: logged.append((self.id, rest["step"], data)) or original(self, data, **rest),
    )
    outcome = train(tiny(), tmp_path / "run", quiet=True, log=["wandb"])
    assert [(step, data["train_loss"]) for _, step, data in logged] == [
        (line["epoch"], line["train_loss"]) for line in outcome.history
    ]
    (name,) = {one for one, _, _ in logged}
    assert json.loads((tmp_path / "run" / "logs.json").read_text())["wandb"] == name
    (file,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")
    until = time.monotonic() + 60.0  # its own process writes the file
    while file.stat().st_size < 1000 and time.monotonic() < until:
        time.sleep(0.2)
    assert file.stat().st_size >= 1000
    train(tiny(), tmp_path / "run", resume=True, quiet=True, log=["wandb"])
    assert {one for one, _, _ in logged} == {name}


@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_files(tiny, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    recipe = tiny()
    with pytest.raises(RunError):
        train(recipe, tmp_path / "run", quiet=True, log=["mlflow"], callbacks=[Listener("stop")])
    client = mlflow.MlflowClient()
    (experiment,) = (one for one in client.search_experiments() if one.name == "residrop")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "KILLED"
    assert found.data.params["rule"] == recipe.rule
    outcome = train(recipe, tmp_path / "run", resume=True, quiet=True, log=["mlflow"])
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    train(recipe, tmp_path / "run", resume=True, quiet=True, log=["mlflow"])  # evaluated again
    told = [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, "train_loss")]
    assert told == [(line["epoch"], line["train_loss"]) for line in outcome.history]
    assert found.data.metrics["final_deterministic_error"] == outcome.evaluation.deterministic.error


def test_data_of_this_machine_are_not_told(tiny, tmp_path):
    run = train(tiny(), tmp_path / "run", quiet=True, log=()).run
    settings = {
        "data": "folder:/home/me/photos?size=32",
        "weights": "/home/me/start.safetensors",
        "network": "transformers:/home/me/vit",
    }
    found = loggers._settings(SimpleNamespace(recipe=lambda: run.recipe().replace(**settings)))
    assert [found[name] for name in settings] == ["photos?size=32", "start.safetensors", "transformers:vit"]
    assert not any("home" in str(value) for value in found.values())


def test_unknown_loggers_and_missing_packages_are_refused_before_anything(tiny, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="log 'comet': allowed are tensorboard, csv, wandb, mlflow"):
        train(tiny(), tmp_path / "run", log=["comet"])
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="run: python -m pip install wandb"):
        train(tiny(), tmp_path / "run", log=["tensorboard", "wandb"])
    assert not (tmp_path / "run").exists()


def test_every_name_has_a_logger():
    assert [type(one).__name__ for one in make_loggers(LoggerName.__args__[:2])] == ["TensorBoard", "Csv"]
