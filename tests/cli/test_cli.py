"""The command line as a user meets it."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from residrop.cli import main
from residrop.data import load
from residrop.inference import evaluate, predict
from residrop.training import PRESETS, Recipe, load_run, loop, preset, train
from residrop.training.setup import loader_of_run

SMALL = ["--network", "resnet-8", "--limit", "200", "--epochs", "2", "--precision", "fp32", "--samples", "2"]
KEYS = {
    "rule",
    "parameters",
    "deterministic_error",
    "sampled_error",
    "samples",
    "train_seconds",
    "relative_time",
    "expected_depth",
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working directory and cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def cli(capsys):
    """Return a function from arguments to (exit code, standard output, standard error)."""

    def call(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Directory of a run that knows its digits; read only."""
    path = tmp_path_factory.mktemp("cli") / "run"
    recipe = Recipe(network="resnet-8", rule="stochastic-depth", epochs=4, batch_size=64, samples=2, precision="fp32")
    train(recipe, path, quiet=True)
    return path


@pytest.fixture
def digits(place):
    """Twelve test digits as PNG files, and their labels."""
    test = load("digits").test
    folder = place.parent / "images"
    folder.mkdir()
    paths = []
    for i in range(12):
        paths.append(folder / f"{i}.png")
        Image.fromarray(test.pixels[i, 0].numpy()).save(paths[-1])
    return paths, test.labels[:12]


def strictly(text):
    """JSON without NaN and infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def everything(folder):
    return sorted(str(path) for path in folder.rglob("*"))


# Help


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(cli, arguments):
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    assert all(f"\n  {command} " in out for command in ("train", "compare", "evaluate", "predict", "recipes"))
    assert "residrop COMMAND --help" in out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["--recipe", "--out", "--resume", "--json", "--epochs", "--survival", "linear_decay", "Ctrl-C"]),
        ("compare", ["--rules", "--seeds", "--resume", "constant", "Table 1", "relative"]),
        ("evaluate", ["--samples", "--data", "--device", "--json", "Run directory"]),
        ("predict", ["--samples", "entropy", "Pillow", "mutual information"]),
        ("recipes", ["--networks", "--rules", "--data"]),
    ],
)
def test_help_of_a_command_teaches(cli, place, command, words):
    code, out, err = cli(command, "--help")
    assert (code, err) == (0, "")
    flat = " ".join(out.split())
    assert [word for word in words if word not in flat] == []
    assert everything(place) == []


def test_help_of_train_has_every_field_of_the_recipe(cli):
    _, out, _ = cli("train", "--help")
    missing = [name for name in Recipe().to_dict() if f"--{name.replace('_', '-')}" not in out]
    assert missing == []


def test_defaults_in_the_help_are_those_of_the_recipe(cli):
    _, out, _ = cli("train", "--recipe", "swapout/v2-20-w2", "--help")
    flat = " ".join(out.replace("│", " ").split())
    assert "(default: resnet-ours-20)" in flat
    assert "(default: 256)" in flat


# Happy paths


def test_train_writes_runs_numbered_from_one(cli, place):
    for number in ("001", "002"):
        code, out, _ = cli("train", *SMALL, "--json", f"{number}.json", "--quiet")
        assert code == 0
        assert "deterministic (expectation)" in out
        assert "sampled (2 passes)" in out
        assert (place / "runs" / f"digits-{number}" / "model.safetensors").exists()
    assert sorted(path.name for path in (place / "runs").iterdir()) == ["digits-001", "digits-002"]
    found = strictly((place / "001.json").read_text())
    assert found.keys() >= KEYS
    assert found == strictly((place / "runs/digits-001/evaluation.json").read_text())
    assert found["rule"] == "stochastic-depth"
    assert found["parameters"] == 75_002
    assert found["samples"] == 2
    assert found["expected_depth"] == pytest.approx(2.0)


def test_train_takes_the_recipe_and_overrides_its_fields(cli, place):
    code, out, err = cli(
        "train", "--recipe", "digits/swapout", *SMALL, "--network=resnet-ours-8", "--out", "deep/er/run", "--json", "-"
    )
    assert code == 0
    assert strictly(out)["rule"] == "swapout"
    assert "epoch   2/2" in err
    recipe = Recipe.from_dict(json.loads((place / "deep/er/run/recipe.json").read_text()))
    base = preset("digits/swapout").recipe
    assert recipe == base.replace(
        network="resnet-ours-8", limit=200, epochs=2, precision="fp32", samples=2, survival="linear(1, 0.5)"
    )


def test_recipe_may_be_a_file_and_names_the_run(cli, place):
    (place / "own").mkdir()
    (place / "own" / "wide.toml").write_text('base = "digits/swapout"\nlr = 0.07\nnetwork = "resnet-ours-8"\n')
    assert cli("train", "--recipe", "own/wide.toml", *SMALL[2:], "--lr-factor", "0.5", "--quiet")[0] == 0
    recipe = Recipe.from_dict(json.loads((place / "runs/wide-001/recipe.json").read_text()))
    assert (recipe.lr, recipe.lr_factor, recipe.network, recipe.rule) == (0.07, 0.5, "resnet-ours-8", "swapout")
    code, out, _ = cli("recipes", "own/wide.toml")
    assert code == 0
    assert out.startswith("own/wide.toml: based on digits/swapout\n")
    assert "  lr: 0.07\n" in out
    compared = cli("compare", "--recipe", "own/wide.toml", *SMALL[2:], "--rules", "swapout", "--quiet")
    assert compared[0] == 0, compared[2]
    assert (place / "runs" / "compare-wide-001" / "swapout-seed0" / "recipe.json").exists()


def test_quiet_train_writes_nothing_to_standard_error(cli):
    code, _, err = cli("train", *SMALL, "--quiet")
    assert (code, err) == (0, "")


def test_resume_reads_the_recipe_from_the_run(cli, place, monkeypatch):
    assert cli("train", *SMALL, "--lr", "0.07", "--out", "run", "--quiet")[0] == 0
    monkeypatch.setattr(loop, "_update", lambda *args: pytest.fail("trained again"))
    code, out, _ = cli("train", "--resume", "--out", "run", "--json", "-")
    assert code == 0
    assert strictly(out)["samples"] == 2
    code, _, err = cli("train", "--resume", "--out", "run", "--lr", "0.08")
    assert code == 2
    assert err.startswith("residrop: error: run was started with another recipe: lr (was 0.07, is 0.08)")
    assert len(err.splitlines()) == 1


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


def test_predict_gives_class_probability_and_uncertainty(cli, run, digits):
    paths, labels = digits
    code, out, _ = cli("predict", run, *paths, "--samples", "4", "--json", "-")
    rows = strictly(out)
    assert code == 0
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    keys = {"file", "class", "probability", "standard_error", "entropy", "mutual_information", "samples"}
    assert all(row.keys() == keys for row in rows)
    opened, model = load_run(run)
    pixels = load("digits").test.pixels[:12]
    wanted = predict(model, opened.normalization()(pixels), 4)
    assert [int(row["class"]) for row in rows] == wanted.classes.tolist()
    assert [row["probability"] for row in rows] == pytest.approx(wanted.probabilities.amax(1).tolist(), rel=1e-4)
    assert [row["entropy"] for row in rows] == pytest.approx(wanted.entropy.tolist(), rel=1e-3, abs=1e-5)
    assert sum(int(row["class"]) == label for row, label in zip(rows, labels.tolist(), strict=True)) >= 8


def test_predict_shows_a_table(cli, run, digits, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(digits[0][0].parent)
    code, out, _ = cli("predict", run, "3.png", "--samples", "0")
    opened, model = load_run(run)
    pixels = load("digits").test.pixels[3:4]
    found = predict(model, opened.normalization()(pixels), 0)
    assert code == 0
    line = next(line for line in out.splitlines() if "3.png" in line)
    assert f" {found.classes.item()} " in line
    assert f"{found.probabilities.max():.3f}" in line


def test_file_names_with_brackets_are_shown_in_full(cli, run, digits, monkeypatch):
    # rich reads [copy] as markup and swallows it
    monkeypatch.setenv("COLUMNS", "200")
    folder = digits[0][0].parent
    monkeypatch.chdir(folder)
    shutil.copy(digits[0][0], folder / "photo[copy].png")
    _, out, _ = cli("predict", run, "photo[copy].png", "--samples", "0")
    assert "photo[copy].png" in out


def test_paths_that_look_like_markup_do_not_crash(cli, run, digits):
    folder = digits[0][0].parent / "a["
    folder.mkdir()
    shutil.copy(digits[0][0], folder / "b].png")
    assert cli("predict", run, folder / "b].png", "--samples", "0")[0] == 0


def test_long_file_names_are_not_cut_where_standard_output_is_a_file(cli, run, digits):
    # without a terminal the table is 80 wide, and names are what gives way
    name = digits[0][0].parent / ("a-rather-long-file-name-" * 3 + ".png")
    shutil.copy(digits[0][0], name)
    _, out, _ = cli("predict", run, name, "--samples", "0")
    assert name.name in out


def test_compare_tabulates_rules_and_keeps_finished_runs(cli, place, monkeypatch):
    settings = ["--rules", "constant", "stochastic-depth", "swapout", "--seeds", "2", *SMALL, "--out", "all"]
    code, out, _ = cli("compare", *settings, "--json", "-")
    rows = strictly(out)
    assert code == 0
    assert [row["rule"] for row in rows] == ["constant", "stochastic-depth", "swapout"]
    for row in rows:
        assert row.keys() >= KEYS
        assert all(math.isfinite(row[key]) for key in KEYS - {"rule"})
        assert row["samples"] == 2
        assert len(row["details"]) == 2
        errors = [one["deterministic"]["error"] for one in row["details"]]
        assert row["deterministic_error"] == pytest.approx(np.mean(errors))
        assert row["deterministic_error_std"] == pytest.approx(np.std(errors, ddof=1))
    assert rows[0]["relative_time"] == 1.0
    assert rows[1]["relative_time"] == pytest.approx(rows[1]["train_seconds"] / rows[0]["train_seconds"])
    assert [row["expected_depth"] for row in rows] == pytest.approx([3.0, 2.0, 2.25])
    assert strictly((place / "all/compare.json").read_text()) == rows
    with Image.open(place / "all/curves.png") as picture:
        assert picture.format == "PNG"

    code, out, err = cli("compare", *settings)
    assert (code, out) == (2, "")
    assert err == (
        "residrop: error: all already holds a comparison; continue it with --resume, or choose another --out\n"
    )

    shutil.rmtree(place / "all/swapout-seed1")
    trained = []
    original = loop._update
    monkeypatch.setattr(loop, "_update", lambda recipe, *rest: trained.append(recipe) or original(recipe, *rest))
    code, out, _ = cli("compare", *settings, "--resume", "--quiet", "--json", "-")
    again = strictly(out)
    assert code == 0
    assert {(recipe.rule, recipe.seed) for recipe in trained} == {("swapout", 1)}
    assert len(trained) == 8
    assert [row["deterministic_error"] for row in again] == [row["deterministic_error"] for row in rows]
    assert again[:2] == rows[:2]


def test_compare_without_constant_has_no_relative_time(cli):
    code, out, err = cli("compare", "--rules", "swapout", *SMALL, "--json", "-", "--quiet")
    assert code == 0
    assert strictly(out)[0]["relative_time"] is None
    assert "swapout" in err


def test_compare_gives_every_rule_its_own_survival_unless_it_is_given(cli, place):
    settings = ["--rules", "constant", "stochastic-depth", *SMALL, "--epochs", "1", "--quiet"]
    cli("compare", *settings, "--out", "a")
    cli("compare", *settings, "--out", "b", "--survival", "0.9", "--granularity", "row")
    recipes = {
        (out, rule): json.loads((place / out / f"{rule}-seed0/recipe.json").read_text())
        for out in "ab"
        for rule in ("constant", "stochastic-depth")
    }
    assert [recipes[key]["survival"] for key in recipes] == ["1", "linear_decay(0.5)", "1", "0.9"]
    assert [recipes[key]["granularity"] for key in recipes] == [None, None, None, "row"]


@pytest.mark.parametrize(
    ("option", "word"), [(None, "swapout/v2-20-w2"), ("--networks", "resnet-ours-<depth>"), ("--rules", "skipforward"),
                         ("--data", "cifar100")]
)  # fmt: skip
def test_recipes_lists(cli, option, word):
    arguments = [option] if option else []
    code, out, err = cli("recipes", *arguments)
    assert (code, err) == (0, "")
    code, out, err = cli("recipes", *arguments, "--json", "-")
    rows = strictly(out)
    assert code == 0
    assert word in [next(iter(row.values())) for row in rows]
    assert "what it is" in rows[0]


@pytest.mark.parametrize("name", ["digits", "swapout/v2-32-w4-cifar100"])
def test_recipes_shows_one_in_full(cli, name):
    code, out, err = cli("recipes", name)
    assert (code, err) == (0, "")
    assert PRESETS[name].title in " ".join(out.split())
    assert all(f"  {key}: {value}\n" in out for key, value in PRESETS[name].recipe.to_dict().items())
    found = strictly(cli("recipes", name, "--json", "-")[1])
    assert Recipe.from_dict(found["recipe"]) == PRESETS[name].recipe


# Bad input: exit code 2, one line, nothing on disk


def assert_refused(result, place, before=()):
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("residrop: error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert len(err) > len("residrop: error: ") + 15
    assert everything(place) == sorted(before)


BAD = {
    "unknown command": (["nonsense"], "'nonsense' is unknown; choose one of train, compare"),
    "bad option": (["train", "--nonsense", "3"], "--nonsense"),
    "misspelt option": (["train", "--epoch", "3"], "--epochs"),
    "missing value": (["train", "--epochs"], "--epochs"),
    "not a number": (["train", "--epochs", "ten"], "'ten'"),
    "zero epochs": (["train", "--epochs", "0"], "epochs is 0; give a whole number of at least 1"),
    "negative rate": (["train", "--lr", "-1"], "lr is -1.0"),
    "nan": (["train", "--lr", "nan"], "lr is nan"),
    "bad choice": (["train", "--select", "first"], "'last', 'best'"),
    "best of nothing": (["train", "--select", "best"], "set validation"),
    "unsorted drops": (["train", "--lr-drops", "0.7", "0.5"], "rising order"),
    "micro-batches": (["train", "--micro-batches", "3"], "3 equal micro_batches"),
    "unknown recipe": (["train", "--recipe", "swapout/v3"], "did you mean swapout/v"),
    "no recipe file": (["train", "--recipe", "own.toml"], "'own.toml' cannot be read: No such file"),
    "unknown rule": (["train", "--rule", "nonsense"], "'nonsense' is unknown; choose one of constant"),
    "unknown network": (["train", "--network", "resmet-20"], "'resmet-20' is unknown"),
    "impossible depth": (["train", "--network", "resnet-21"], "21"),
    "unknown data": (["train", "--data", "nonsense"], "neither a folder nor a known name"),
    "missing folder": (["train", "--data", "folder:nowhere"], "nowhere"),
    "unknown device": (["train", "--device", "abacus"], "'abacus' cannot be used here"),
    "absent device": (["train", "--device", "cuda:63"], "'cuda:63' cannot be used here"),
    "survival above one": (["train", "--survival", "1.5"], "1.5"),
    "survival below zero": (["train", "--survival=-0.5"], "-0.5"),
    "survival of other length": (["train", "--network", "resnet-8", "--survival", "1,1"], "2 survival rates"),
    "survival schedule": (["train", "--survival", "parabola(1)"], "'parabola' is unknown"),
    "theta_2 of another rule": (["train", "--theta-2", "0.5"], "theta_2"),
    "granularity of another rule": (["train", "--rule", "swapout", "--granularity", "row"], "granularity"),
    "too many held out": (["train", "--validation", "5000"], "validation=5000"),
    "resume what": (["train", "--resume"], "add --out RUN"),
    "out below a device": (["train", "--out", "/dev/null/run"], "/dev/null/run cannot be written"),
    "out in proc": (["train", "--out", "/proc/run"], "/proc/run cannot be written"),
    "compare: unknown rule": (["compare", "--rules", "constant", "nonsense"], "'nonsense' is unknown"),
    "compare: no rules": (["compare", "--rules"], "0 rules"),
    "compare: zero seeds": (["compare", "--seeds", "0"], "0 seeds"),
    "compare: negative seeds": (["compare", "--seeds", "-2"], "-2 seeds"),
    "compare: resume what": (["compare", "--resume"], "add --out DIRECTORY"),
    "evaluate: no run": (["evaluate"], "evaluate --help"),
    "evaluate: missing run": (["evaluate", "nowhere"], "nowhere is no directory"),
    "evaluate: not a run": (["evaluate", "."], "recipe.json does not exist"),
    "predict: missing run": (["predict", "nowhere", "a.png"], "nowhere is no directory"),
    "predict: no images": (["predict", "nowhere"], "no image files were given"),
    "recipes: unknown": (["recipes", "digit"], "did you mean digits"),
    "recipes: bad option": (["recipes", "--everything"], "--everything"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(cli, place, case):
    arguments, words = BAD[case]
    result = cli(*arguments)
    assert_refused(result, place)
    assert words in result[2]


def test_error_holds_no_box_where_the_output_is_not_utf8(cli, place):
    # tyro draws its boxes of - and | then (PYTHONIOENCODING=ascii, LC_ALL=C, pytest); only the other ones are removed
    result = cli("train", "--epoch", "3")
    assert_refused(result, place)
    assert result[2] == (
        "residrop: error: Unrecognized options: --epoch, 3 (did you mean --epochs?); see residrop train --help\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "1.5"], "1.5"),
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


def test_bad_input_to_predict_is_one_line(cli, place, run, digits):
    good = digits[0][0]
    bad = good.with_name("bad.png")
    bad.write_text("no image")
    for arguments, words in (
        ([good, "--samples", "-1"], "samples is -1; give a whole number of at least 0"),
        ([good, bad], "bad.png cannot be decoded"),
        ([good, "nowhere.png"], "nowhere.png is no file"),
        ([good.parent], "is no file"),
        ([good, "--device", "abacus"], "'abacus'"),
    ):
        result = cli("predict", run, *arguments)
        assert_refused(result, place)
        assert words in result[2]


def test_evaluating_on_other_classes_is_one_line(cli, place, run):
    folder = place.parent / "data"
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(folder / part / label / "0.png")
    result = cli("evaluate", run, "--data", folder)
    assert_refused(result, place)
    assert "was trained on 10 classes of 1-channel images" in result[2]


def test_train_into_a_run_or_a_file_is_one_line(cli, place, run):
    before = everything(run)
    result = cli("train", *SMALL, "--out", run)
    assert_refused(result, place)
    assert "already holds a run; continue it with --resume, or choose another --out" in result[2]
    assert everything(run) == before
    (place / "file").write_text("mine")
    assert_refused(cli("train", *SMALL, "--out", "file"), place, [str(place / "file")])


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


def test_resume_of_a_run_that_is_not_there_is_refused(cli, place):
    # a typo in --out starts the default training in a new directory
    assert_refused(cli("train", *SMALL, "--resume", "--out", "typo", "--quiet"), place)


@pytest.mark.parametrize(
    "option",
    [["--survival", "1.5"], ["--survival", "1,1"], ["--theta-2", "1.5"], ["--survival", "nonsense"]],
    ids=str,
)
def test_compare_checks_all_rules_before_it_trains_the_first(cli, place, option):
    # constant takes no rates, so it is trained in full before swapout refuses them
    assert_refused(cli("compare", "--rules", "constant", "swapout", *SMALL, "--quiet", *option), place)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--network", "nonsense"], "'nonsense' is unknown"),
        (["--network", "vanilla-3", "--rules", "depth-dropout"], "vanilla"),
        (["--out", "/dev/null/x"], "cannot be written"),
        (["--out", "/proc/x"], "cannot be written"),
        (["--device", "abacus"], "'abacus'"),
        (["--data", "nonsense"], "neither a folder nor a known name"),
    ],
    ids=str,
)
def test_compare_says_nothing_but_the_error(cli, place, option, words):
    # "constant, seed 0" comes first
    result = cli("compare", *SMALL, *option)
    assert_refused(result, place)
    assert words in result[2]


def test_unwritable_json_is_refused_before_hours_of_training(cli, place):
    assert_refused(cli("train", *SMALL, "--quiet", "--json", "/dev/null/x.json"), place)


def test_augmentation_that_cannot_be_is_refused_before_a_run_is_made(cli, place):
    # what is left "already holds a run", so the corrected command is refused, too
    assert_refused(cli("train", *SMALL, "--quiet", "--augmentation", "resized-crop", "--out", "run"), place)


# Ctrl-C


def test_ctrl_c_outside_training_is_one_word(cli, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("residrop.cli.commands.recipes_command", interrupt)
    assert cli("recipes") == (130, "", "residrop: interrupted\n")


# As a process


def process(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "residrop", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_module_gives_exit_codes(place):
    bad = process("train", "--epochs", "0")
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.startswith("residrop: error: ")
    assert "epochs is 0; give a whole number of at least 1" in bad.stderr
    assert bad.stderr.count("\n") == 1
    assert everything(place) == []


def test_json_is_written_to_a_pipe_not_over_it(cli, place):
    pipe = place / "pipe"
    os.mkfifo(pipe)
    found = []
    reader = threading.Thread(target=lambda: found.append(json.loads(pipe.read_text())))
    reader.start()
    assert cli("recipes", "--rules", "--json", pipe)[0] == 0
    reader.join(timeout=30)
    assert found[0][0]["rules"] == "constant"
    assert pipe.is_fifo()


def test_images_too_small_for_the_network_are_refused_before_a_run_is_made(cli, place, digits):
    for part in ("train", "test"):
        for label in "ab":
            folder = place / "tiny" / part / label
            folder.mkdir(parents=True)
            shutil.copy(digits[0][0], folder / "1.png")
            shutil.copy(digits[0][1], folder / "2.png")
    code, _, err = cli("train", *SMALL, "--quiet", "--data", f"folder:{place}/tiny?size=3", "--out", "run")
    assert code == 2
    assert err.count("\n") == 1
    assert not (place / "run").exists()


def test_a_reader_that_leaves_early_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "residrop", "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate()
    assert process.returncode == 0
    assert said == b""
