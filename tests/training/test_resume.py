"""A run that was stopped, killed or cut off from power continues as if nothing had happened, on the CPU to the bit."""

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from residrop.common.errors import Interrupted, RunError
from residrop.training import Recipe, Run, loop, preset, run, setup, train
from residrop.training.pool import train_all

BF16 = pytest.param("bf16", marks=pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16"))  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", BF16])
@pytest.mark.parametrize(
    "changes",
    [
        {"survival": "0.5"},
        {"survival": "0.5", "granularity": "row", "micro_batches": 2},
        {"rule": "swapout"},
    ],
    ids=["block", "row", "swapout"],
)
def test_stopped_and_cut_off_run_equals_the_uninterrupted(
    tiny, tmp_path, interrupt, cut_power, assert_same_run, changes, precision
):
    recipe = tiny(epochs=3, validation=30, select="best", augmentation="shift", precision=precision, **changes)
    train(recipe, tmp_path / "whole", quiet=True)
    broken = tmp_path / "broken"
    message = interrupt(recipe, broken, 2)  # of 4 updates an epoch
    assert message == f"stopped after update 2; continue with --resume --out {broken}"
    cut_power(recipe, broken, 5, resume=True)  # back to the end of epoch 1
    assert Run.open(broken).load_state()["update"] == 4
    interrupt(recipe, broken, 10, resume=True)
    assert len((broken / "metrics.jsonl").read_text().splitlines()) == 2
    train(recipe, broken, resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", broken)


def test_run_resumed_with_dropped_decay_and_warm_up_equals_the_uninterrupted(
    tiny, tmp_path, interrupt, assert_same_run
):
    recipe = tiny(decay_dropped=True, survival="0.3", survival_timing="warmup(0.8)", lr_schedule="cosine", warmup=0.2)
    recipe = recipe.replace(coupling="systematic")
    train(recipe, tmp_path / "whole", quiet=True)
    interrupt(recipe, tmp_path / "broken", 3)
    interrupt(recipe, tmp_path / "broken", 6, resume=True)
    train(recipe, tmp_path / "broken", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("update", [4, 8], ids=["first-epoch", "last-epoch"])
def test_run_stopped_at_the_last_update_of_an_epoch_keeps_its_line(tiny, tmp_path, interrupt, assert_same_run, update):
    # the state is saved before _end_epoch: resuming skips the epoch's evaluation, and its sums leak into the next one
    recipe = tiny()
    train(recipe, tmp_path / "whole", quiet=True)
    interrupt(recipe, tmp_path / "broken", update)
    train(recipe, tmp_path / "broken", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_power_cut_after_a_timed_save_at_the_last_update_keeps_the_line(
    tiny, tmp_path, monkeypatch, assert_same_run, power_cut
):
    # the same hole without Ctrl-C: checkpoint_minutes saves between the last update and the evaluation
    recipe = tiny(checkpoint_minutes=0.0)
    train(recipe, tmp_path / "whole", quiet=True)

    def fail(*args):
        raise power_cut

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_end_epoch", fail)
        with pytest.raises(power_cut):
            train(recipe, tmp_path / "broken", quiet=True)
    train(recipe, tmp_path / "broken", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_lines_written_after_the_saved_state_are_removed(tiny, tmp_path, monkeypatch, power_cut, assert_same_run):
    recipe = tiny()
    train(recipe, tmp_path / "whole", quiet=True)
    broken, original = tmp_path / "broken", loop.State.save

    def save(state, run):
        if state.update == 8:
            raise power_cut
        original(state, run)

    with monkeypatch.context() as patch:
        patch.setattr(loop.State, "save", save)
        with pytest.raises(power_cut):
            train(recipe, broken, quiet=True)
    assert len((broken / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(Run.open(broken).load_state()["history"]) == 1
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "trai')  # and a line cut short
    train(recipe, broken, resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", broken)


def test_run_cut_off_before_its_first_state_starts_anew(tiny, tmp_path, cut_power, assert_same_run):
    recipe = tiny()
    train(recipe, tmp_path / "whole", quiet=True)
    cut_power(recipe, tmp_path / "broken", 1)
    assert not (tmp_path / "broken" / "last.pt").exists()
    train(recipe, tmp_path / "broken", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_finished_run_is_evaluated_again_but_not_trained(finished, tmp_path, monkeypatch):
    recipe, path, outcome = finished
    before = (path / "model.safetensors").read_bytes()
    monkeypatch.setattr(loop, "_update", lambda *args: pytest.fail("trained again"))
    again = train(recipe.replace(samples=0), path, resume=True, quiet=True)
    assert (path / "model.safetensors").read_bytes() == before
    assert again.evaluation.deterministic == outcome.evaluation.deterministic
    assert again.train_seconds == outcome.train_seconds
    assert again.history == outcome.history
    train(recipe, path, resume=True, quiet=True)  # as it was, for the other tests


def test_termination_saves_and_the_old_handlers_come_back(tiny, tmp_path, at_update):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    at_update(3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="stopped after update 3"):
        train(tiny(), tmp_path / "run", quiet=True)
    assert Run.open(tmp_path / "run").load_state()["update"] == 3
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_second_ctrl_c_does_not_wait(tiny, tmp_path, at_update):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_update(3, twice)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run", quiet=True)


def test_training_outside_the_main_thread_works(tiny, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(train, tiny(epochs=1), tmp_path / "run", quiet=True).result()
    assert len(outcome.history) == 1


def test_stopped_run_leaves_no_thread_behind(tiny, tmp_path, interrupt):
    # TensorBoard's writer is closed only when the training ends well
    before = threading.active_count()
    interrupt(tiny(), tmp_path / "run", 2)
    assert threading.active_count() == before


# Refusals


def test_another_recipe_is_refused_naming_the_field(finished):
    recipe, path, _ = finished
    with pytest.raises(RunError, match=r"another recipe: lr \(was 0\.05, is 0\.07\); resume it unchanged"):
        train(recipe.replace(lr=0.07), path, resume=True, quiet=True)


def test_second_run_into_a_directory_is_refused(finished):
    recipe, path, _ = finished
    with pytest.raises(RunError, match=r"already holds a run; continue it with --resume, or choose another --out"):
        train(recipe, path, quiet=True)


def test_directory_that_is_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="cannot be written"):
            train(tiny(), out, quiet=True)
    assert (tmp_path / "file").read_text() == "mine"


def write_two_sets(tmp_path):
    """Images of the same classes, labels and shapes with other pixels, in folders a and b."""
    rng = np.random.default_rng(0)
    for folder, brightness in (("a", 0), ("b", 100)):
        for part in ("train", "test"):
            for label in "xy":
                place = tmp_path / folder / part / label
                place.mkdir(parents=True)
                for i in range(8):
                    pixels = rng.integers(brightness, brightness + 100, (8, 8, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(place / f"{i}.png")


@pytest.mark.parametrize("normalization", ["channel", "unit"])
def test_other_images_are_refused_on_resume(tiny, tmp_path, interrupt, normalization):
    write_two_sets(tmp_path)  # which the statistics of `unit` do not tell apart
    recipe = tiny(data=f"folder:{tmp_path}/a?size=8", limit=None, batch_size=8, normalization=normalization)
    interrupt(recipe, tmp_path / "run", 1)
    with pytest.raises(RunError, match="other training images"):
        train(recipe.replace(data=f"folder:{tmp_path}/b?size=8"), tmp_path / "run", resume=True, quiet=True)


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_damaged_state_is_one_clear_error(tiny, tmp_path, interrupt, keep):
    recipe = tiny()
    interrupt(recipe, tmp_path / "run", 2)
    state = tmp_path / "run" / "last.pt"
    state.write_bytes(state.read_bytes()[:keep])
    with pytest.raises(RunError, match=r"last\.pt is damaged .*delete it to start this run anew"):
        train(recipe, tmp_path / "run", resume=True, quiet=True)
    state.unlink()
    assert len(train(recipe, tmp_path / "run", resume=True, quiet=True).history) == 2


@pytest.mark.parametrize("state", [{}, [1, 2], {"model": {}}], ids=str)
def test_state_of_something_else_is_one_clear_error(tiny, tmp_path, interrupt, state):
    recipe = tiny()
    interrupt(recipe, tmp_path / "run", 2)
    torch.save(state, tmp_path / "run" / "last.pt")
    with pytest.raises(RunError, match=r"last\.pt"):
        train(recipe, tmp_path / "run", resume=True, quiet=True)


# The real thing, in another process


CHANGES = {"network": "resnet-8", "limit": 200, "precision": "fp32", "samples": 0, "device": "cpu"}


def start(out, *options):
    command = [sys.executable, "-m", "residrop", "train", "--out", str(out)]
    for name, value in CHANGES.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_lines(process, path, lines):
    give_up = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= lines):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < give_up
        time.sleep(0.01)


EPOCHS = 12


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    recipe = Recipe(**{**preset("digits").recipe.to_dict(), **CHANGES, "epochs": EPOCHS})
    train(recipe, path, quiet=True)
    return path


def stop(out, number):
    """Start a run, send it a signal after its second epoch; exit code and standard error."""
    with start(out, "--epochs", str(EPOCHS)) as process:
        wait_for_lines(process, out / "metrics.jsonl", 2)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    state = Run.open(out).load_state()
    assert 0 < state["update"] < EPOCHS * 4
    assert not (out / "model.safetensors").exists()
    return process.returncode, err.decode()


@pytest.mark.slow  # tests/faults/test_kills.py has the like
def test_killed_process_resumed_equals_the_uninterrupted(tmp_path, whole, assert_same_run):
    out = tmp_path / "broken"
    code, _ = stop(out, signal.SIGKILL)
    assert code == -signal.SIGKILL
    train(Run.open(out).recipe(), out, resume=True, quiet=True)
    assert_same_run(whole, out)


def test_interrupted_process_resumed_equals_the_uninterrupted(tmp_path, whole, assert_same_run):
    out = tmp_path / "broken"
    code, err = stop(out, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err
    assert f"continue with --resume --out {out}" in err.replace("\n", " ").replace("  ", " ")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    train(Run.open(out).recipe(), out, resume=True, quiet=True)
    assert_same_run(whole, out)


def test_refused_resume_leaves_the_comparison_as_it_was(tmp_path, monkeypatch, capsys):
    from residrop.cli import main

    monkeypatch.chdir(tmp_path)
    small = [
        "--network",
        "resnet-8",
        "--limit",
        "100",
        "--epochs",
        "1",
        "--samples",
        "0",
        "--precision",
        "fp32",
        "--quiet",
    ]
    assert main(["compare", "--rules", "constant", *small, "--out", "both"]) == 0
    before = (tmp_path / "both/settings.json").read_text()
    assert main(["compare", "--resume", "--out", "both", "--width", "2"]) == 2
    assert "width (was None, is 2)" in capsys.readouterr().err
    assert (tmp_path / "both/settings.json").read_text() == before
    assert main(["compare", "--resume", "--out", "both", "--quiet"]) == 0


def test_restored_momentum_stays_where_it_was(tiny):
    """A CUDA graph reads and writes it there."""
    recipe = tiny()
    ready = setup.prepare(recipe)
    trained, fresh = (run.start(recipe, ready) for _ in range(2))
    next(iter(loop.updates(recipe, trained, ready.loaders["train"], 0)))
    saved = {}
    trained.save(SimpleNamespace(save_state=saved.update))
    tensors = [fresh.sums, fresh.gradient, *(one["momentum_buffer"] for one in fresh.optimizer.state.values())]
    places = [one.data_ptr() for one in tensors]
    fresh.restore(copy.deepcopy(saved), Path("last.pt"))
    now = [fresh.sums, fresh.gradient, *(one["momentum_buffer"] for one in fresh.optimizer.state.values())]
    then = [trained.sums, trained.gradient, *(one["momentum_buffer"] for one in trained.optimizer.state.values())]
    assert [one.data_ptr() for one in now] == places
    torch.testing.assert_close(now, then, rtol=0, atol=0)
    assert float(then[2].abs().max()) > 0


# More epochs


def test_more_epochs_at_a_constant_rate_equal_the_longer_training(tiny, tmp_path, assert_same_run, interrupt):
    recipe = tiny(lr_drops=(), survival="0.5", ema=0.9)
    train(recipe, tmp_path / "short", quiet=True)
    longer = recipe.replace(epochs=4)
    train(longer, tmp_path / "whole", quiet=True)
    interrupt(longer, tmp_path / "short", 11, resume=True)
    outcome = train(longer, tmp_path / "short", resume=True, quiet=True)
    assert [line["epoch"] for line in outcome.history] == [1, 2, 3, 4]
    assert_same_run(tmp_path / "whole", tmp_path / "short")
    assert Run(tmp_path / "short").dataset()["steps"] == 16


def test_a_longer_training_that_cannot_be_leaves_the_run_as_it_was(tiny, tmp_path):
    write_two_sets(tmp_path)
    recipe = tiny(lr_drops=(), data=f"folder:{tmp_path}/a?size=8", limit=None, batch_size=8)
    train(recipe, tmp_path / "run", quiet=True, log=())
    files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    longer = recipe.replace(epochs=4, data=f"folder:{tmp_path}/b?size=8")
    with pytest.raises(RunError, match="other training images"):
        train(longer, tmp_path / "run", resume=True, quiet=True, log=())
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == files
    (tmp_path / "run/last.pt").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"last\.pt"):
        train(recipe.replace(epochs=4), tmp_path / "run", resume=True, quiet=True, log=())
    assert Run(tmp_path / "run").recipe().epochs == 2
    assert Run(tmp_path / "run").evaluation()


def test_weights_of_a_shorter_training_are_not_those_of_the_longer(tiny, tmp_path, interrupt):
    recipe = tiny(lr_drops=())
    train(recipe, tmp_path / "run", quiet=True)
    (tmp_path / "run/recalibrated.safetensors").write_bytes(b"of before")
    interrupt(recipe.replace(epochs=4), tmp_path / "run", 10, resume=True)
    for name in ("model.safetensors", "recalibrated.safetensors", "evaluation.json"):
        assert not (tmp_path / "run" / name).exists()


@pytest.mark.slow
def test_many_trainings_are_made_longer_too(tiny, tmp_path):
    recipe = tiny(lr_drops=())
    train(recipe, tmp_path / "one", quiet=True)
    longer = train_all({"one": recipe.replace(epochs=3)}, tmp_path, workers=1, quiet=True)
    assert longer["one"]["run"]["epochs"] == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "learning rates"),
        ({"lr_schedule": "cosine"}, "learning rates"),
        ({"lr_drops": (), "warmup": 0.1}, "learning rates"),
        ({"lr_drops": (), "survival_timing": "warmup(0.1)"}, r"survival rates \(survival_timing\)"),
        ({"lr_drops": (), "select": "best", "validation": 40, "eval_every": 2}, "epochs to select from"),
    ],
)
def test_more_epochs_of_a_schedule_in_shares_are_refused(tiny, tmp_path, changes, words):
    recipe = tiny(epochs=1, **changes)
    train(recipe, tmp_path / "run", quiet=True)
    with pytest.raises(RunError, match=rf"a training of 1 epochs, which decide its {words}: .*--weights"):
        train(recipe.replace(epochs=2), tmp_path / "run", resume=True, quiet=True)
    assert Run(tmp_path / "run").recipe().epochs == 1
    assert train(recipe, tmp_path / "run", resume=True, quiet=True).history


def test_fewer_epochs_are_another_recipe(tiny, tmp_path):
    recipe = tiny(lr_drops=())
    train(recipe, tmp_path / "run", quiet=True)
    with pytest.raises(RunError, match=r"another recipe: epochs \(was 2, is 1\)"):
        train(recipe.replace(epochs=1), tmp_path / "run", resume=True, quiet=True)
