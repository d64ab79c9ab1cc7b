"""`residrop train` on two processes: the training of one process, shared."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import residrop.cli.train
from residrop.cli import main
from residrop.common.errors import SaidElsewhere
from residrop.training import Recipe, train

RECIPE = {
    "network": "vanilla-6",
    "width": 32,
    "limit": 200,
    "epochs": 3,
    "batch_size": 63,  # 63, 63, 63, 11: shares of unequal size
    "lr": 0.01,
    "weight_decay": 1e-3,
    "rule": "stochastic-depth",
    "survival": "uniform(0.5)",
    "augmentation": "shift",
    "precision": "fp32",
    "device": "cpu",
    "samples": 3,
    "micro_batches": 3,
}
RECENT = {
    **{"clip_grad": 0.5, "layer_decay": 0.8, "label_smoothing": 0.1, "ema": 0.8, "decay_vectors": False},
    **{"policy": "rand-augment", "erasing": 0.25, "mixup": 0.2, "cutmix": 1.0},
}
CHECKS = [
    "recent",
    "uninterrupted",
    "stopped",
    "epoch",
    "checkpoints",
    "budget",
    "errors",
    "votes",
    "shares",
    "joined",
    "patience",
]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Return directory and outcome of the same training in one process."""
    path = tmp_path_factory.mktemp("one") / "run"
    return path, train(Recipe(**RECIPE), path, quiet=True)


@pytest.fixture(scope="module")
def run(checked, tmp_path_factory):
    place = tmp_path_factory.mktemp("training")
    (place / "recipe.json").write_text(json.dumps(RECIPE))
    (place / "recent.json").write_text(json.dumps(RECENT))
    return checked("training.py", 2, *CHECKS, place=place)


@pytest.fixture(scope="module")
def found(run):
    return run[0]


def lines_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def rates_of(path):
    return [json.loads(line)["rates"] for line in (path / "survival.jsonl").read_text().splitlines()]


def assert_same_training(one, other):
    """Fail unless losses agree to 1e-6 of their size, errors and realised depths exactly, weights to 1e-6."""
    lines = list(zip(lines_of(one), lines_of(other), strict=True))
    assert len(lines) == RECIPE["epochs"]
    for mine, theirs in lines:
        for key in ("train_loss", "test_nll"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-6)
        for key in ("train_error", "test_error", "realised_depth", "lr", "epoch"):
            assert mine[key] == theirs[key]
    weights = [load_file(path / "model.safetensors") for path in (one, other)]
    for name, values in weights[0].items():
        torch.testing.assert_close(values, weights[1][name], rtol=0.0, atol=1e-6)


def test_losses_and_weights_equal_one_process(one, run):
    assert_same_training(one[0], run[1] / "two")


def test_the_same_with_more_of_the_recipe(run, tmp_path):
    train(Recipe(**RECIPE, **RECENT), tmp_path / "alone", quiet=True)
    assert_same_training(tmp_path / "alone", run[1] / "recent")


def test_average_of_a_network_with_batch_norm_is_one_on_all_ranks(found):
    mine, theirs = found["recent"]["evaluations"]
    assert mine == theirs
    assert 0.0 < mine["deterministic"]["nll"] < 10.0


def test_every_rank_returns_the_evaluation_of_all_images(one, found):
    mine, theirs = found["uninterrupted"]["evaluations"]
    assert mine == theirs
    expected = one[1].evaluation.to_dict()
    for key in ("images", "samples", "single_pass_error"):
        assert mine[key] == expected[key]
    assert mine["deterministic"]["error"] == expected["deterministic"]["error"]
    assert mine["sampled"]["nll"] == pytest.approx(expected["sampled"]["nll"], rel=1e-6)
    assert found["uninterrupted"]["errors"][0] == found["uninterrupted"]["errors"][1]


def test_rates_from_a_budget_are_those_of_rank_0(run, tmp_path):
    found, place = run[0]["budget"], run[1]
    for values in found.values():
        assert values[0] == values[1]
    changes = {"survival": None, "budget": "0.5", "spend": "sensitivity", "refresh": 1, "validation": 40}
    train(Recipe(**{**RECIPE, **changes, "select": "best"}), tmp_path / "alone", quiet=True)
    for mine, theirs in zip(rates_of(tmp_path / "alone"), rates_of(place / "budget"), strict=True):
        assert theirs == pytest.approx(mine, abs=1e-5)


def test_rank_0_alone_writes(found):
    assert found["uninterrupted"]["written"] == [True, False]


def test_a_signal_on_any_rank_stops_all_after_the_same_update(found):
    """Rank 1 was told twice after update 5; one update later all know."""
    assert found["stopped"]["said"] == ["stopped after update 6; continue with --resume --out /stopped"] * 2
    assert found["stopped"]["update"] == 6
    assert found["stopped"]["seen"] == 2 * 63  # of epoch 2, on both ranks


def test_a_signal_at_the_end_of_an_epoch_and_resume_on_two(one, found, run):
    assert found["epoch"] == ["stopped after update 4; continue with --resume --out /epoch"] * 2
    assert_same_training(one[0], run[1] / "epoch")


def test_resume_on_one_process_what_two_saved(one, run):
    path = run[1] / "stopped"
    train(Recipe(**RECIPE), path, resume=True, quiet=True)
    assert_same_training(one[0], path)


def test_checkpoints_are_saved_after_the_same_updates(one, found, run):
    saved = found["checkpoints"]
    assert saved[0] == saved[1]
    assert len(saved[0]) == len(set(saved[0])) >= 6
    assert_same_training(one[0], run[1] / "often")


def test_an_error_on_one_rank_ends_all_and_is_said_once(found):
    said = found["errors"]
    assert said["agree"] == [["", 7], ["", 7]]
    assert said["agree_rank1"] == [["SaidElsewhere", "rank 1 cannot"], ["ConfigError", "rank 1 cannot"]]
    assert said["from_main"] == [["", 10], ["", 10]]
    assert said["from_main_fails"] == [["ConfigError", "rank 0 cannot"], ["SaidElsewhere", "rank 0 cannot"]]
    assert said["in_turn"] == [["", 10], ["", 11]]
    assert said["in_turn_fails_late"] == [["SaidElsewhere", "rank 1 cannot"], ["ConfigError", "rank 1 cannot"]]


@pytest.mark.parametrize(
    ("case", "who", "text"),
    [
        ("existing_run", 0, "already holds a run"),
        ("small_batch", 0, "batch_size is 1"),
        ("other_data", 1, "rank 1 has other training images than rank 0"),
        ("lost", 0, "the loss is "),
    ],
)
def test_trainings_that_cannot_be(found, case, who, text):
    said = found["errors"][case]
    assert text in said[who][1]
    assert said[1 - who] == ["SaidElsewhere", said[who][1]]


def test_votes_are_known_to_all_at_the_same_time(found):
    assert found["votes"][0] == found["votes"][1]
    assert found["votes"][0] == [0, 0, 1, 2, 0, 0, 0, 2, 0, 1]


def test_shares_of_all_ranks_are_the_batches_of_one_process(found):
    for same, _ in found["shares"].values():
        assert same


def test_an_existing_process_group_is_used_and_left(found):
    total, initialized, same, names = found["joined"]
    assert total == [2.0, 1.0]
    assert initialized
    assert same
    assert names == ["allreduce", "barrier"]


def test_ranks_wait_for_rank_0_longer_than_their_group_does(found):
    assert found["patience"] == [7, 7]


def arguments(out):
    """The recipe as options of `residrop train`."""
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in RECIPE.items()]
    return [
        "-m",
        "residrop",
        "train",
        "--recipe",
        "digits",
        *(word for pair in pairs for word in pair),
        "--out",
        str(out),
    ]


def test_command_line_under_torchrun(one, torchrun, tmp_path):
    """One table, one progress, one JSON file."""
    done = torchrun(2, *arguments(tmp_path / "run"), "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("deterministic") == 1
    assert done.stderr.count("epoch   3/3") == 1
    assert json.loads((tmp_path / "result.json").read_text())["parameters"] == one[1].parameters
    assert_same_training(one[0], tmp_path / "run")


def test_other_commands_are_for_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate", "nowhere"]) == 2
    assert "evaluate runs in one process, but torchrun started 2; leave torchrun out" in capsys.readouterr().err


def test_what_another_rank_says_is_not_said_twice(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise SaidElsewhere("rank 1 cannot")

    monkeypatch.setattr(residrop.cli.train, "train", fail)
    assert main(["train"]) == 0
    assert capsys.readouterr().err == ""


def test_an_error_of_one_rank_alone_is_said_with_its_number(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert main(["train", "--epochs", "0"]) == 2
    assert capsys.readouterr().err.startswith("residrop: rank 3: error: ")


@pytest.mark.slow
def test_ctrl_c_at_torchrun(tmp_path):
    """Ctrl-C reaches torchrun, which tells all workers; the run is resumable."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    running = subprocess.Popen(
        [*command, *arguments(out), "--epochs", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or not lines_of(out):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert said.count("stopped after update") == 1
    update = torch.load(out / "last.pt", weights_only=True)["update"]
    assert f"stopped after update {update};" in said


@pytest.mark.slow
def test_ranks_stop_when_torchrun_is_killed(one, tmp_path):
    """Killed, torchrun tells its ranks nothing; they save, and hold the run no longer."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with open(tmp_path / "said", "w") as said:  # noqa: PTH123 - a pipe would be held by the ranks
        running = subprocess.Popen([*command, *arguments(out), "--epochs", "100000"], stdout=said, stderr=said)
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or not lines_of(out):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        ranks = [int(path.name) for path in Path("/proc").glob("[0-9]*") if parent_of(path) == running.pid]
        assert len(ranks) == 2
        running.kill()
        running.wait()
    while any(parent_of(Path("/proc") / str(rank)) is not None for rank in ranks):
        assert time.monotonic() < deadline, (tmp_path / "said").read_text()[-2000:]
        time.sleep(0.2)
    text = (tmp_path / "said").read_text()
    assert "Traceback" not in text, text[-3000:]
    assert not (out / "run.lock").exists()
    update = torch.load(out / "last.pt", weights_only=True)["update"]
    assert f"stopped after update {update};" in text


def parent_of(path):
    """Number of the parent of a process, or None if the process is gone (or waits to be buried)."""
    try:
        state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else int(parent)


@pytest.mark.slow
def test_four_processes(checked, tmp_path):
    """The last batch of an epoch has 2 images, fewer than ranks: two of them take part without any."""
    changed = {**RECIPE, "limit": 66, "batch_size": 16, "micro_batches": 1}
    (tmp_path / "recipe.json").write_text(json.dumps(changed))
    found, _ = checked("training.py", 4, "uninterrupted", "stopped", "shares", place=tmp_path)
    assert found["shares"]["none"][1] == [0, 1, 0, 1]
    train(Recipe(**changed), tmp_path / "one", quiet=True)
    assert_same_training(tmp_path / "one", tmp_path / "two")
    train(Recipe(**changed), tmp_path / "stopped", resume=True, quiet=True)
    assert_same_training(tmp_path / "one", tmp_path / "stopped")
