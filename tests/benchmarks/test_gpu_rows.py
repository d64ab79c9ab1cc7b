"""benchmarks/gpu_rows.py: what it plans, that it stops in time, and that what it packs resumes elsewhere."""

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from residrop.cli.bench.skip import BenchSkip
from residrop.cli.shared import parse
from residrop.common.errors import Interrupted, UsageError
from residrop.research.bench.networks import network
from residrop.research.papers import find_row
from residrop.training import Callback, Recipe, train

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("gpu_rows", ROOT / "benchmarks" / "gpu_rows.py")
gpu_rows = importlib.util.module_from_spec(_spec)
sys.modules["gpu_rows"] = gpu_rows
_spec.loader.exec_module(gpu_rows)

QUIET = Console(quiet=True)


def asked(*options):
    return gpu_rows.parser.parse_args(["--device", "cpu", *map(str, options)])


def ledger_with_speeds(folder):
    folder.mkdir()
    for path in (ROOT / "results").glob("throughput_*_h200_*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_every_row_is_a_training_on_cifar10():
    recipes = [find_row(f"{table}/{row}")[1].recipe for table, rows in gpu_rows.ORDER for row in rows]
    assert {recipe.data for recipe in recipes} == {"cifar10"}


def test_plan_has_every_missing_training_once_and_none_that_is_measured(tmp_path):
    groups = gpu_rows.missing(asked("--ledger", ledger_with_speeds(tmp_path / "results")), QUIET)
    assert [(one.table, one.rows) for one in groups] == list(gpu_rows.ORDER)
    names = [name for group in groups for name in group.seconds]
    assert len(names) == len(set(names))
    measured = gpu_rows.missing(asked("--ledger", ROOT / "results"), QUIET)
    assert ("swapout/table-2", ("linear-1-0.5-deterministic", "linear-1-0.5-stochastic")) not in [
        (one.table, one.rows) for one in measured
    ]
    twice = gpu_rows.missing(asked("--ledger", ROOT / "results", "--seeds", 2), QUIET)
    assert sum(len(one.seconds) for one in twice) > sum(len(one.seconds) for one in measured)


def test_without_a_measured_speed_it_says_what_to_run(tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(UsageError, match="has no speed of a GPU; run residrop bench throughput"):
        gpu_rows.missing(asked("--ledger", tmp_path / "results"), QUIET)


def test_the_speed_is_that_of_the_likest_network_and_done_epochs_count(tmp_path):
    speeds = [
        gpu_rows.Speed(20, 2, False, 60e12),
        gpu_rows.Speed(20, 2, True, 50e12),
        gpu_rows.Speed(110, 1, False, 20e12),
    ]
    known = gpu_rows.Known(speeds)
    wide = Recipe(network="resnet-ours-20", width=2, rule="swapout", survival="0.5")
    assert known.rate(wide) == 50e12
    assert known.rate(wide.replace(rule="constant", survival="1")) == 60e12
    assert known.rate(Recipe(network="stable-resnet-110", rule="constant")) == 20e12
    recipe = Recipe(network="resnet-110", rule="constant", data="cifar10", epochs=100, samples=0, eval_every=100)
    forwards = 3 * 50_000 * 100 + 2 * 10_000
    assert known.seconds(recipe) == pytest.approx(forwards * 0.509e9 / 20e12, rel=0.02)  # 0.2545 G multiply-adds


PATIENT = (
    "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('on', flush=True)\ntime.sleep(60)"
)
SAVES = (
    "import pathlib, sys, time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
    "    pathlib.Path(sys.argv[1]).write_text('saved')\n    sys.exit(130)"
)


@pytest.mark.parametrize("ignored", [False, True], ids=["in the foreground", "in a shell's background"])
def test_a_command_is_stopped_in_time_and_may_save(tmp_path, ignored):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        stopped_in_time(tmp_path)
        assert signal.getsignal(signal.SIGINT) == (signal.SIG_IGN if ignored else signal.default_int_handler)
    finally:
        signal.signal(signal.SIGINT, before)


def stopped_in_time(tmp_path):
    started = time.monotonic()
    assert gpu_rows.run_for([sys.executable, "-c", "import sys; sys.exit(3)"], 30) == 3
    assert gpu_rows.run_for([sys.executable, "-c", SAVES, str(tmp_path / "file")], 2) == 130
    assert (tmp_path / "file").read_text() == "saved"
    assert time.monotonic() - started < 25


def test_a_command_that_does_not_stop_is_killed(monkeypatch):
    monkeypatch.setattr(gpu_rows, "SAVING", 0.5)
    assert gpu_rows.run_for([sys.executable, "-c", PATIENT], 2) < 0


def test_ctrl_c_ends_the_command_and_begins_no_other(monkeypatch):
    monkeypatch.setattr(gpu_rows, "SAVING", 0.5)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu_rows.run_for([sys.executable, "-c", PATIENT], 30)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def test_a_comparison_that_was_stopped_is_made_again(tmp_path, monkeypatch):
    one = gpu_rows.benches(tmp_path, "GPU")[0]

    def stopped(command, seconds):
        one.file.write_text("{}")
        return 130

    monkeypatch.setattr(gpu_rows, "run_for", stopped)
    assert gpu_rows.measure([one], asked(), time.monotonic() + 500.0, QUIET) == 1
    assert gpu_rows.benches(tmp_path, "GPU")[0] == one
    assert one.file.with_suffix(".partial").exists()


class StopAfterOne(Callback):
    def on_epoch(self, line, model):
        signal.raise_signal(signal.SIGINT)


def test_what_is_packed_of_a_stopped_run_resumes_elsewhere(tmp_path):
    recipe = Recipe(
        network="resnet-8", rule="stochastic-depth", epochs=3, limit=128, batch_size=64, samples=0, precision="fp32"
    )
    train(recipe, tmp_path / "whole", quiet=True)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "here" / "stopped", quiet=True, callbacks=[StopAfterOne()])
    train(recipe.replace(epochs=1), tmp_path / "here" / "finished", quiet=True)
    results = tmp_path / "results"
    results.mkdir()
    (results / "old.json").write_text("{}")
    since = time.time() + 10
    (results / "new.json").write_text(json.dumps({"new": 1}))
    os.utime(results / "new.json", (since + 1, since + 1))
    gpu_rows.pack(tmp_path / "out", tmp_path / "here", results, since, QUIET)
    files = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in files] == ["ledger.tar", "stopped.tar"]
    gpu_rows.unpack(files, tmp_path / "there", tmp_path / "ledger")
    assert [path.name for path in (tmp_path / "ledger").iterdir()] == ["new.json"]
    train(recipe, tmp_path / "there" / "stopped", resume=True, quiet=True)
    ours, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("there/stopped", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_groups_are_measured_until_the_time_is_over(tmp_path, monkeypatch, capfd):
    """On other images than the papers', so that nothing is recorded, one epoch; the second group no longer fits."""
    for number in range(64):
        path = tmp_path / "images" / ("train", "test")[number % 2] / "ab"[number // 2 % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (4 * number, 0, 0)).save(path)
    monkeypatch.setattr(
        gpu_rows, "ORDER", (("swapout/table-1", ("resnet-v2-ours-w1",)), ("depth-dropout/table-1", ("0.5",)))
    )
    monkeypatch.setattr(gpu_rows, "STARTING", 0.0)
    options = ("--data", f"folder:{tmp_path / 'images'}", "--scale", 1e-4, "--workers", 1, "--runs", tmp_path / "runs")
    arguments = asked(*options, "--ledger", ledger_with_speeds(tmp_path / "results"))
    groups = gpu_rows.missing(arguments, QUIET)
    assert len(groups) == 2
    calls, run_for = [], gpu_rows.run_for

    def run_once(command, seconds):
        calls.append(command)
        status = run_for(command, seconds)
        monkeypatch.setattr(gpu_rows, "STARTING", 1e9)
        return status

    monkeypatch.setattr(gpu_rows, "run_for", run_once)
    assert gpu_rows.measure(groups, arguments, time.monotonic() + 300, Console()) == 0
    assert len(calls) == 1
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "evaluation.json").exists()
    assert "left out: depth-dropout/table-1" in capfd.readouterr().out


def test_comparisons_are_made_once_for_a_device(tmp_path, monkeypatch):
    found = gpu_rows.benches(tmp_path, "NVIDIA H200")
    assert len(found) == 2 * len(gpu_rows.SKIPPING)
    assert found[0].file.name == "skip_vit_base_patch16_224_224px_nvidia-h200.json"
    for one in found:  # every command is one that bench skip takes
        arguments = parse(BenchSkip, one.arguments, "residrop bench skip")
        assert (arguments.precision, arguments.survival) == ("bf16", gpu_rows.SURVIVAL)
        network(arguments.models[0], arguments.pixels)
    found[0].file.write_text("{}")
    assert gpu_rows.benches(tmp_path, "NVIDIA H200") == found[1:]
    assert len(gpu_rows.benches(tmp_path, "NVIDIA H100")) == len(found)
    commands = []
    monkeypatch.setattr(gpu_rows, "run_for", lambda command, seconds: commands.append(command) or 0)
    assert gpu_rows.measure(found[1:2], asked(), time.monotonic() + 100.0, QUIET) == 0
    assert commands == []  # does not fit
    assert gpu_rows.measure(found[1:2], asked(), time.monotonic() + 500.0, QUIET) == 0
    assert commands[0][1:5] == ["-m", "residrop", "bench", "skip"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--minutes", "5"), "give --data"),
        (("--minutes", "5", "--data", "digits", "--device", "auto"), "there is no GPU here"),
    ],
)
def test_bad_input(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_rows.py", *options])
    monkeypatch.setattr(gpu_rows, "choose_device", lambda name: torch.device("cpu"))
    with pytest.raises(SystemExit):
        gpu_rows.main()
    assert message in capsys.readouterr().err
