"""`residrop compare` as a user meets it."""

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from command_line import KEYS, SMALL, assert_refused, strictly
from residrop.training import loggers, loop


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
        "residrop: error: all already holds a comparison; continue it with residrop compare --resume --out all, or "
        "choose another --out\n"
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


# Values of other fields


def test_sweep_trains_every_combination(cli, place):
    sweep = ["--sweep", "survival=0.5,linear(1, 0.5)", "lr=0.05,0.1"]
    code, out, err = cli(
        "compare",
        "--rules",
        "constant",
        "stochastic-depth",
        *sweep,
        "--seed",
        "1",
        *SMALL,
        "--out",
        "all",
        "--json",
        "-",
    )
    assert code == 0, err
    rows = strictly(out)
    pairs = [(survival, lr) for survival in ("0.5", "linear(1, 0.5)") for lr in ("0.05", "0.1")]
    labels = [f"stochastic-depth, survival={survival}, lr={lr}" for survival, lr in pairs]
    assert [row["label"] for row in rows] == ["constant, lr=0.05", "constant, lr=0.1", *labels]
    for row, (survival, lr) in zip(rows[2:], pairs, strict=True):
        assert row["run"]["survival"] == survival
        name = f"stochastic-depth-survival={survival}-lr={lr}".replace("(1, 0.5)", "-1-0.5").replace(")", "")
        recipe = json.loads((place / f"all/{name}-seed1/recipe.json").read_text())
        assert (recipe["survival"], recipe["lr"], recipe["seed"]) == (survival, float(lr), 1)
    code, out, _ = cli("compare", "--resume", "--out", "all", "--quiet", "--json", "-")
    assert code == 0
    assert strictly(out) == rows


def test_sweep_of_one_rule_names_values_alone(cli, place, monkeypatch):
    options = ["--rules", "stochastic-depth", *SMALL, "--log", "csv", "--quiet", "--json", "-", "--out", "all"]
    code, out, _ = cli("compare", *options, "--sweep", "nesterov=True,false", "lr-drops=0.5 0.75")
    assert code == 0
    monkeypatch.setattr(loop, "_update", None)  # nothing is trained again, under more rules either
    assert cli("compare", "--resume", "--quiet", "--out", "all")[0] == 0
    assert (
        cli("compare", "--resume", "--quiet", "--out", "all", "--rules", "stochastic-depth", "stochastic-depth")[0] == 0
    )
    assert len(list((place / "all").glob("stochastic-depth-nesterov=*-lr_drops=0.5-0.75-seed0/metrics.csv"))) == 2
    assert [row["label"] for row in strictly(out)] == [
        f"nesterov={value}, lr_drops=0.5 0.75" for value in ("True", "false")
    ]


def test_time_is_relative_to_constant_depth_of_the_same_values(cli):
    options = ["--rules", "constant", "stochastic-depth", *SMALL, "--quiet", "--json", "-"]
    _, out, _ = cli("compare", *options, "--sweep", "batch_size=32,64", "survival=0.5,0.8")
    rows = strictly(out)
    constant = {row["swept"]["batch_size"]: row["train_seconds"] for row in rows if row["rule"] == "constant"}
    assert len(constant) == 2
    assert len(rows) == 6
    for row in rows:
        assert row["relative_time"] == pytest.approx(row["train_seconds"] / constant[row["swept"]["batch_size"]])


def test_fields_swept_twice_are_refused(cli, place):
    result = cli("compare", *SMALL, "--sweep", "lr=0.1", "lr=0.2", "--out", "all")
    assert_refused(result, place)
    assert "a field twice" in result[2]


def test_survival_is_not_swept_under_a_budget(cli, place):
    options = ["--rules", "stochastic-depth", "--budget", "0.6", *SMALL, "--sweep", "survival=0.5,0.7", "--out", "all"]
    assert_refused(cli("compare", *options), place)


def test_a_missing_logger_is_told_before_anything(cli, place, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    assert_refused(cli("compare", *SMALL, "--log", "wandb", "--out", "all"), place)
    assert_refused(cli("train", *SMALL, "--log", "mlflow", "--out", "run"), place)


def test_a_comparison_goes_into_no_directory_of_a_run(cli, place):
    assert cli("train", *SMALL, "--quiet", "--out", "run")[0] == 0
    for command in (["train", "--seeds", "2"], ["train", "--seeds", "2", "--resume"], ["compare"]):
        code, _, err = cli(*command, *SMALL, "--out", "run")
        assert code == 2
        assert "run holds a single run" in err
    assert not (place / "run/settings.json").exists()


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("survivl=0.5", "did you mean survival?"),
        ("survival", "give FIELD=VALUE,VALUE"),
        ("survival=0.5,,0.7", "a value is empty"),
        ("seed=0,1", "seeds with --seeds"),
        ("rule=swapout", "rules with --rules"),
        ("nesterov=maybe", "either True or False"),
        ("survival=0.5,1.5", "1.5"),
        ("of=branch,shortcut", "none of constant, stochastic-depth takes it"),
        ("lr=0.1,-1", "lr is -1.0"),
    ],
)
def test_wrong_sweeps_are_refused_before_anything_is_trained(cli, place, sweep, words):
    result = cli("compare", "--rules", "constant", "stochastic-depth", *SMALL, "--sweep", sweep, "--out", "all")
    assert_refused(result, place)
    assert words in result[2]


def test_a_value_of_the_wrong_kind_is_refused_by_the_parser(cli, place):
    code, _, err = cli("compare", *SMALL, "--sweep", "epochs=two", "--out", "all")
    assert code == 2
    assert "epochs" in err
    assert "two" in err
    assert not any((place / "all").glob("*-seed*"))


def test_train_with_several_seeds_gives_mean_and_deviation(cli, place):
    options = ["--rule", "stochastic-depth", "--survival", "0.7", "--seed", "3", "--seeds", "3", *SMALL]
    code, out, err = cli("train", *options, "--out", "several", "--json", "-")
    assert code == 0, err
    (row,) = strictly(out)
    errors = [one["deterministic"]["error"] for one in row["details"]]
    assert len(errors) == 3
    assert row["deterministic_error"] == pytest.approx(np.mean(errors))
    assert row["deterministic_error_std"] == pytest.approx(np.std(errors, ddof=1))
    assert row["run"]["survival"] == "0.7"
    assert {path.name for path in (place / "several").iterdir() if path.is_dir()} == {
        f"stochastic-depth-seed{seed}" for seed in (3, 4, 5)
    }
    assert "±" in err
    code, out, _ = cli("compare", "--resume", "--out", "several", "--quiet", "--json", "-")
    assert (code, strictly(out)) == (0, [row])
    for again in ([], ["--resume"]):
        code, _, err = cli("train", *options, "--out", "several", *again)
        assert code == 2
        assert "residrop compare --resume --out several" in err


@pytest.mark.parametrize(
    "wrong", [["--rule", "swapout", "--granularity", "row"], ["--rule", "constant", "--survival", "0.5"]]
)
def test_several_seeds_refuse_what_one_does(cli, place, wrong):
    assert_refused(cli("train", *SMALL, *wrong, "--out", "run"), place)
    assert_refused(cli("train", *SMALL, *wrong, "--seeds", "2", "--out", "run"), place)


def test_no_seeds_at_all_are_refused(cli, place):
    assert_refused(cli("train", "--seeds", "0", *SMALL, "--out", "none"), place)
