"""A training that diverges ends with one line; what was saved before is kept, and a comparison goes on."""

import json

import pytest
import torch

from residrop.cli import main
from residrop.common.errors import RunError
from residrop.training import Run, loop, train

SMALL = ["--network", "resnet-8", "--limit", "200", "--epochs", "2", "--samples", "0", "--precision", "fp32", "--quiet"]


@pytest.fixture
def scale(monkeypatch):
    """Return a function that multiplies all weights by a factor after an update."""
    original = loop._update

    def arrange(factor, number, rule="stochastic-depth"):
        def update(recipe, state, *args):
            original(recipe, state, *args)
            if state.update == number and recipe.rule == rule:
                with torch.no_grad():
                    for parameter in state.model.parameters():
                        parameter.mul_(factor)

        monkeypatch.setattr(loop, "_update", update)

    return arrange


def strictly(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("number", [8, pytest.param(7, marks=pytest.mark.slow)])
def test_weights_lost_in_the_last_epoch_do_not_replace_good_ones(tiny, tmp_path, scale, number):
    """After the last update no loss shows it."""
    recipe = tiny(validation=30)
    scale(float("nan"), number)
    for resume in (False, True):
        with pytest.raises(RunError, match=r"the (weights are not finite|loss is nan) in epoch 2; try a smaller lr"):
            train(recipe, tmp_path / "run", resume=resume, quiet=True)
        state = Run(tmp_path / "run").load_state()
        assert state is not None
        assert state["update"] == 4
        assert all(bool(one.isfinite().all()) for one in state["model"].values())
    assert len(Run(tmp_path / "run").history()) == 1
    scale(1.0, 1)
    assert len(train(recipe, tmp_path / "run", resume=True, quiet=True).history) == 2


def test_finite_weights_whose_outputs_are_not_are_reported_as_null(tiny, tmp_path, scale, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scale(1e30, 8)
    train(tiny(samples=2), tmp_path / "run", quiet=True)
    found = strictly((tmp_path / "run" / "evaluation.json").read_text())
    assert found["details"]["deterministic"]["nll"] is None
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        strictly(line)
    assert main(["evaluate", "run", "--samples", "2", "--json", "a.json"]) == 0
    assert strictly((tmp_path / "a.json").read_text())["details"]["sampled"]["nll"] is None
    assert main(["report", "run"]) == 0
    train(tiny(samples=2), tmp_path / "run", resume=True, quiet=True)
    capsys.readouterr()


def test_a_comparison_goes_on_without_a_rule_that_diverges(tmp_path, scale, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scale(float("nan"), 8)
    rules = ["--rules", "stochastic-depth", "constant"]
    assert main(["compare", *rules, *SMALL, "--out", "both", "--json", "a.json"]) == 2
    out, err = capsys.readouterr()
    assert "failed: stochastic-depth-seed0: the weights are not finite in epoch 2" in out
    assert err.startswith("residrop: error: 1 of 2 trainings failed; stochastic-depth-seed0: the weights")
    assert err.count("\n") == 1
    assert [row["rule"] for row in strictly((tmp_path / "both/compare.json").read_text())] == ["constant"]
    assert [row["rule"] for row in strictly((tmp_path / "a.json").read_text())] == ["constant"]
    scale(1.0, 1)
    assert main(["compare", "--resume", "--out", "both", "--quiet"]) == 0
    assert len(strictly((tmp_path / "both/compare.json").read_text())) == 2
    scale(float("nan"), 8)
    assert main(["compare", "--rules", "stochastic-depth", *SMALL, "--out", "none"]) == 2
    assert "all 1 trainings failed" in capsys.readouterr().err
