"""`residrop compare` as a user meets it."""

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from command_line import KEYS, SMALL, assert_refused, strictly
from residrop.training import loop


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
