"""`residrop evaluate` as a user meets it."""

import errno
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import residrop.cli.evaluate
from command_line import KEYS, assert_refused, assert_refused_by_tyro, strictly
from residrop.inference import error_curve, evaluate, evaluate_adaptive
from residrop.training import load_run
from residrop.training.setup import loader_of_run


def test_evaluate_gives_the_numbers_of_the_library(cli, run):
    code, out, err = cli("evaluate", run, "--samples", "3", "--json", "-")
    found = strictly(out)
    assert code == 0
    assert found.keys() >= KEYS
    opened, model = load_run(run)
    wanted = evaluate(model, loader_of_run(opened).eval_batches(), 3)
    assert found["deterministic_error"] == wanted.deterministic.error < 15.0
    assert found["sampled_error"] == wanted.sampled.error
    assert found["details"] == wanted.to_dict()
    assert found["train_seconds"] == pytest.approx(
        json.loads((run / "evaluation.json").read_text())["train_seconds"], rel=1e-9
    )
    assert "deterministic (expectation)" in err  # the table makes way for the JSON


def test_evaluate_shows_a_table_and_writes_json_to_a_file(cli, run, place):
    code, out, _ = cli("evaluate", run, "--samples", "0", "--json", "new/folder/found.json")
    assert code == 0
    assert "deterministic (expectation)" in out
    assert "sampled (" not in out
    found = strictly((place / "new/folder/found.json").read_text())
    assert found["sampled_error"] is None
    assert found["samples"] == 0


def test_evaluate_leaves_the_run_alone(cli, run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli("evaluate", run, "--samples", "1")[0] == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "abacus"], "'abacus' cannot be used here"),
        (["--data", "nonsense"], "neither a folder nor a known name"),
        (["--data", "folder:nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_bad_input_to_evaluate_is_one_line(cli, place, run, arguments, words):
    result = cli("evaluate", run, *arguments)
    assert_refused(result, place)
    assert words in result[2]


def test_negative_samples_to_evaluate_are_one_line(cli, place, run):
    result = cli("evaluate", run, "--samples", "-1")
    assert_refused(result, place)
    assert "samples is -1" in result[2]


def test_evaluating_on_other_classes_is_one_line(cli, place, run):
    folder = place.parent / "data"
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(folder / part / label / "0.png")
    result = cli("evaluate", run, "--data", folder)
    assert_refused(result, place)
    assert "test: class 'cat' is not among the classes (0, 1, 2, 3, 4 and 5 more)" in result[2]


def test_damaged_run_is_one_line(cli, place, run):
    copy = place.parent / "copy"
    for name in ("model.safetensors", "recipe.json", "dataset.json", "normalization.safetensors"):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        (copy / name).write_bytes(b"rubbish")
        result = cli("evaluate", copy)
        assert_refused(result, place)
        assert name in result[2]


def test_unfinished_run_is_one_line_with_advice(cli, place, run):
    copy = shutil.copytree(run, place.parent / "copy")
    (copy / "model.safetensors").unlink()
    result = cli("evaluate", copy)
    assert_refused(result, place)
    assert "continue it with --resume" in result[2]


def test_line_of_metrics_cut_short_by_a_power_failure_does_not_stop_evaluate(cli, run, place):
    copy = shutil.copytree(run, place.parent / "copy")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5, "tra')
    assert cli("evaluate", copy, "--samples", "0")[0] in (0, 2)


def test_evaluate_adaptive_prints_samples_error_and_agreement(cli, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = cli("evaluate", run, "--samples", 10, "--adaptive", "--confidence", 0.9, "--json", "-")
    assert code == 0
    found = json.loads(out)["adaptive"]
    opened, model = load_run(run)
    wanted = evaluate_adaptive(model, loader_of_run(opened).eval_batches(), confidence=0.9, max_samples=10)
    assert found == wanted.to_dict()
    assert f"adaptive sampling: {wanted.mean_samples:.2f} ± {wanted.samples_se:.2f} of 10 passes an image" in err
    assert f"agreement with all 10 passes: {wanted.agreement:.2f}% of {wanted.images} images" in err
    assert wanted.agreement > 95
    assert "curve" not in json.loads(out)
    assert not (run / "samples.png").exists()


def test_evaluate_classes_draws_and_prints(cli, run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    code, out, _ = cli("evaluate", tmp_path / "copy", "--samples", "0", "--classes", "--json", tmp_path / "found.json")
    assert code == 0
    assert "most often taken for" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["class"] for row in found["classes"]] == [str(digit) for digit in range(10)]
    assert sum(map(sum, found["confusion"])) == sum(row["images"] for row in found["classes"]) == 355
    right = sum(row[i] for i, row in enumerate(found["confusion"]))
    assert found["deterministic_error"] == pytest.approx(100 * (1 - right / 355))
    assert (tmp_path / "copy" / "confusion.png").read_bytes()[:4] == b"\x89PNG"


def test_evaluate_curve_draws_and_prints(cli, run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run, target = shutil.copytree(run, tmp_path / "run"), tmp_path / "curve.json"
    code, out, _ = cli("evaluate", run, "--samples", 6, "--curve", "--repetitions", 2, "--json", target)
    assert code == 0
    found = json.loads(target.read_text())["curve"]
    opened, model = load_run(run)
    wanted = error_curve(model, loader_of_run(opened).eval_batches(), 6, 2)
    assert found == json.loads(json.dumps(wanted.to_dict()))
    assert "error of averaged passes, 2 repetitions" in " ".join(out.split())
    assert f"{wanted.error[5]:.2f}%" in out
    assert f"curve: {run / 'samples.png'}" in out
    with Image.open(run / "samples.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 500


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--adaptive", "--samples", "0"], "samples is 0, but --adaptive needs sampled passes"),
        (["--curve", "--samples", "0"], "samples is 0, but --curve needs sampled passes"),
        (["--curve", "--repetitions", "0"], "repetitions is 0; give a whole number of at least 1"),
        (["--adaptive", "--confidence", "1.5"], "confidence is 1.5; give a number between 0 and 1"),
    ],
)
def test_numbers_that_do_not_fit_are_one_line(cli, place, run, arguments, words):
    result = cli("evaluate", run, *arguments)
    assert_refused(result, place)
    assert words in result[2]


def test_samples_that_are_no_whole_number_are_told_by_tyro(cli, place, run):
    result = cli("evaluate", run, "--samples", "1.5")
    assert_refused_by_tyro(result, place, "residrop evaluate")
    assert "'1.5'" in result[2]


def test_a_run_that_cannot_be_written_is_told_before_the_work(cli, run, monkeypatch):
    def refuse(**options):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    monkeypatch.setattr(residrop.cli.evaluate, "evaluate", lambda *args, **options: pytest.fail("work was done"))
    code, _, err = cli("evaluate", run, "--curve")
    assert code == 2
    assert "--curve: " in err
    assert "samples.png cannot be written" in err


def test_one_repetition_is_shown_without_standard_errors(cli, run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    code, out, _ = cli("evaluate", run, "--samples", 2, "--curve", "--repetitions", 1)
    assert code == 0
    assert "error of averaged passes, 1 repetition " in " ".join(out.split())
