"""Survival rates that a training finds for itself, and what it measures along the way."""

import json

import pytest
import torch
from torch.nn import functional as F

import residrop
from residrop.blocks.attach import sampler_of
from residrop.common.errors import ConfigError, RunError
from residrop.schedule import budgets
from residrop.theory.costs import Costs
from residrop.training import Recipe, Run, loop, train
from residrop.training.checkpoint import load_run
from residrop.training.networks import survival_of
from residrop.training.setup import prepare

SENSE = {"survival": None, "budget": "0.5", "spend": "sensitivity"}


def lines_of(path, name):
    return [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def adaptive(tiny, tmp_path_factory):
    """Return (recipe, directory, outcome) of a run that measures its rates before every epoch, and watches."""
    recipe = tiny(**SENSE, refresh=1, epochs=3, validation=40, select="best", watch=("sensitivity", "discrepancy"))
    path = tmp_path_factory.mktemp("adaptive") / "run"
    return recipe, path, train(recipe, path, quiet=True)


def test_budget_spent_alike_is_the_run_of_that_rate(tiny, tmp_path, assert_same_run):
    train(tiny(survival="0.5"), tmp_path / "rate", quiet=True)
    train(tiny(survival=None, budget="0.5"), tmp_path / "budget", quiet=True)
    assert lines_of(tmp_path / "budget", "survival")[0]["rates"] == [0.5, 0.5, 0.5]
    (tmp_path / "budget" / "survival.jsonl").unlink()
    states = [tmp_path / name / "last.pt" for name in ("rate", "budget")]
    for path in states:
        state = torch.load(path, weights_only=True)
        torch.save({**state, "survival": []}, path)
    assert_same_run(tmp_path / "rate", tmp_path / "budget")


@pytest.mark.parametrize("spend", ["sensitivity", "max_regularization"])
def test_measuring_disturbs_nothing(tiny, tmp_path, monkeypatch, assert_same_run, spend):
    train(tiny(survival="0.5"), tmp_path / "rate", quiet=True)
    measured = []

    def alike(scores, budget, costs, **options):
        measured.append(scores)
        return budgets.uniform_at(len(scores), budget, costs)

    monkeypatch.setattr("residrop.theory.costs.budgets.sensitivity_at", alike)
    monkeypatch.setattr("residrop.theory.costs.budgets.max_regularization_at", alike)
    watch = ("sensitivity", "discrepancy")
    train(tiny(survival=None, budget="0.5", spend=spend, refresh=1, watch=watch), tmp_path / "m", quiet=True)
    assert len(measured) == 2
    assert measured[0] != measured[1]
    state = torch.load(tmp_path / "m" / "last.pt", weights_only=True)
    Run(tmp_path / "m").save_state({**state, "survival": [], "instruments": []})
    assert_same_run(tmp_path / "rate", tmp_path / "m")


def test_rates_are_those_of_the_network_as_it_stands(tiny, tmp_path, monkeypatch):
    seen = []
    original = loop.rates_now

    def spy(recipe, model, loader, *rest):
        batches = list(loader.fixed_batches(4, 128))
        seen.append(residrop.survival_for(model, 0.5, "sensitivity", batches=batches))
        line = original(recipe, model, loader, *rest)
        assert survival_of(model) == line["rates"]
        return line

    monkeypatch.setattr(loop, "rates_now", spy)
    train(tiny(**SENSE, refresh=2, epochs=4), tmp_path, quiet=True)
    lines = lines_of(tmp_path, "survival")
    assert [line["epoch"] for line in lines] == [0, 2]
    assert [tuple(line["rates"]) for line in lines] == seen
    assert seen[0] != seen[1]
    for rates in seen:
        assert sum(rates) == pytest.approx(1.5)


def test_adaptive_run_resumed_mid_epoch_equals_the_uninterrupted(
    adaptive, tmp_path, interrupt, cut_power, assert_same_run
):
    recipe, whole, _ = adaptive
    broken = tmp_path / "broken"
    interrupt(recipe, broken, 2)
    cut_power(recipe, broken, 5, resume=True)
    assert len(lines_of(broken, "survival")) == 2  # the second of an epoch that is made again
    interrupt(recipe, broken, 6, resume=True)
    train(recipe, broken, resume=True, quiet=True)
    assert_same_run(whole, broken)
    for name in ("survival", "instruments"):
        mine, theirs = (lines_of(path, name) for path in (whole, broken))
        assert [line["epoch"] for line in mine] == [line["epoch"] for line in theirs]
        key = "rates" if name == "survival" else "discrepancy"
        assert [line[key] for line in mine] == [line[key] for line in theirs]


def test_weights_know_their_rates(adaptive):
    _, path, outcome = adaptive
    course = [line["rates"] for line in lines_of(path, "survival")]
    assert survival_of(load_run(path)[1]) == outcome.rates
    assert outcome.rates in course
    assert survival_of(load_run(path, "best")[1]) == outcome.rates
    errors = [line["validation_error"] for line in outcome.history]
    assert outcome.rates == course[errors.index(min(errors))]
    assert outcome.to_dict()["run"]["survival"] == outcome.rates
    assert json.loads((path / "recipe.json").read_text())["survival"] is None


def test_watched_instruments_are_those_of_the_network(adaptive):
    recipe, path, _ = adaptive
    lines = lines_of(path, "instruments")
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    state = Run.open(path).load_state()
    model = load_run(path)[1]
    model.load_state_dict(state["model"])
    batches = list(prepare(recipe).loaders["train"].fixed_batches(1, 64))
    assert lines[-1]["discrepancy"] == pytest.approx(
        residrop.theory.discrepancy(model, batches).curvature.tolist(), rel=1e-4
    )
    assert lines[-1]["sensitivity"] == pytest.approx(
        residrop.theory.sensitivity(model, batches).scores.tolist(), rel=1e-3, abs=1e-5
    )


def test_weights_without_rates_are_refused(adaptive, tmp_path, tiny):
    path = tmp_path / "run"
    train(tiny(survival="0.5", epochs=1), path, quiet=True)
    recipe = Run(path).recipe().to_dict()
    (path / "recipe.json").write_text(json.dumps({**recipe, "survival": None, "budget": "0.5"}))
    with pytest.raises(RunError, match=r"model\.safetensors does not say its survival rates"):
        load_run(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "much"}, "budget 'much' is not understood"),
        ({"budget": "1.5"}, "the budget is 1.5"),
        ({"spend": "sensitivity"}, "spend is 'sensitivity'.*needs a budget"),
        ({"budget": "0.5", "refresh": 1}, "refresh is 1"),
        ({"budget": "0.5", "spend": "max_regularization", "per_cost": True}, "per_cost is True"),
        ({"budget": "0.5", "least": 0.1}, "least is 0.1"),
        ({"budget": "0.5", "spend": "sensitivity", "least": 1.1}, r"least is 1.1; .* lies in \[0, 1\]"),
        ({"watch": ("noise",)}, "watch is .*'sensitivity', 'discrepancy'"),
    ],
)
def test_bad_budgets_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "0.1", "spend": "linear"}, "cannot be met by linear decay"),
        ({"budget": "0.01 of flops"}, "cannot be met: without any branch"),
        ({"budget": "0.5", "rule": "swapout", "network": "resnet-ours-8"}, "Swapout.* has 2 rates"),
    ],
)
def test_budgets_that_cannot_be_met_end_before_training(tiny, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny(survival=None, **changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("decay_dropped", [False, True])
def test_first_gradient_is_that_of_block_1_where_it_is_present(tiny, tmp_path, monkeypatch, decay_dropped):
    recipe = tiny(survival="0.5,1,1", micro_batches=2, decay_dropped=decay_dropped)
    found = []
    original = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        first = [p for p in self.param_groups[0]["params"] if p.ndim == 4][1]  # after the stem
        found.append(None if first.grad is None or not first.grad.any() else first.grad.abs().mean().item())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    outcome = train(recipe, tmp_path, quiet=True)
    assert len(found) == 8
    for line, part in zip(outcome.history, (found[:4], found[4:]), strict=True):
        live = [size for size in part if size is not None]
        assert 0 < len(live) < 4
        assert line["first_gradient"] == pytest.approx(sum(live) / len(live), rel=1e-6)


def _live(model, steps):
    sampler = sampler_of(model)
    return [[draw.alive for draw in sampler.plan(step).draws] for step in range(steps)]


def test_set_survival_keeps_the_words_of_the_coins():
    model = residrop.create("resnet-14", rule="stochastic-depth", survival=0.5, seed=3)
    sampler_of(model).step = 5
    before = _live(model, 200)
    rates = [0.5, 0.2, 0.9, 0.5, 1.0, 0.0]
    residrop.set_survival(model, rates)
    assert sampler_of(model).step == 5
    after = _live(model, 200)
    other = residrop.create("resnet-14", rule="stochastic-depth", survival=rates, seed=3)
    assert after == _live(other, 200)
    for old, new in zip(before, after, strict=True):
        assert (old[0], old[3]) == (new[0], new[3])
        assert new[1] <= old[1]
        assert new[2] >= old[2]
        assert new[4:] == [True, False]
    x = torch.rand(2, 3, 32, 32)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(x), other.eval()(x), rtol=0, atol=0)
    assert len(set(map(tuple, after))) > 10


def test_set_survival_changes_nothing_if_it_refuses():
    model = residrop.create("resnet-8", rule="stochastic-depth", survival=0.5)
    for rates in ([0.5, 0.5], [0.5, 0.5, 1.1], [0.5, 0.5, float("nan")]):
        with pytest.raises(ConfigError):
            residrop.set_survival(model, rates)
    assert survival_of(model) == [0.5] * 3
    constant = residrop.create("resnet-8", rule="constant")
    residrop.set_survival(constant, [1, 1, 1])
    with pytest.raises(ConfigError, match="no coins"):
        residrop.set_survival(constant, [1, 1, 0.5])


def test_set_survival_during_training_is_a_run_at_the_new_rates():
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
    model = residrop.create("resnet-8", rule="stochastic-depth", survival=0.9, timing="warmup(4)")
    residrop.set_survival(model, [0.2, 0.3, 0.4])
    same = residrop.create("resnet-8", rule="stochastic-depth", survival=[0.2, 0.3, 0.4], timing="warmup(4)")
    same.load_state_dict(model.state_dict())
    for _ in range(6):
        losses = [F.cross_entropy(each.train()(x), y) for each in (model, same)]
        assert torch.equal(*losses)


@pytest.mark.parametrize(("budget", "dtype"), [("0.6 of time", torch.bfloat16), ("0.6 of flops", None)])
def test_time_is_measured_in_the_arithmetic_of_the_training(tiny, tmp_path, monkeypatch, budget, dtype):
    seen = []
    original = loop.rates_now

    def spy(*args):
        enabled = torch.is_autocast_enabled("cpu")
        seen.append(torch.get_autocast_dtype("cpu") if enabled else None)
        return original(*args)

    monkeypatch.setattr(loop, "rates_now", spy)
    monkeypatch.setattr("residrop.theory.costs._timed", lambda *_: Costs((1.0,) * 3, 0.0, "time"))
    train(tiny(survival=None, budget=budget, epochs=1, precision="bf16"), tmp_path, quiet=True)
    assert seen == [dtype]
    assert 0.0 < lines_of(tmp_path, "survival")[0]["rates"][0] < 1.0


def logged(path):
    """Lines of the measurements, without what a clock decides."""
    names = [path / f"{name}.jsonl" for name in ("survival", "instruments")]
    lines = [[json.loads(line) for line in name.read_text().splitlines()] for name in names]
    return [[{key: value for key, value in line.items() if key != "seconds"} for line in one] for one in lines]


@pytest.mark.parametrize("minutes", [15.0, pytest.param(0.0, marks=pytest.mark.slow)], ids=["epochs", "updates"])
def test_a_run_cut_off_anywhere_logs_the_same_measurements(
    tiny, tmp_path, cut_power, interrupt, assert_same_run, minutes
):
    """Also before its first state: what it had measured by then is measured again, and stands there once."""
    recipe = tiny(
        survival=None, budget="0.6", spend="sensitivity", refresh=1, watch=("sensitivity", "discrepancy"),
        epochs=3, checkpoint_minutes=minutes,
    )  # fmt: skip
    train(recipe, tmp_path / "whole", quiet=True)
    broken = tmp_path / "broken"
    cut_power(recipe, broken, 1)
    assert len(logged(broken)[0]) == 1
    cut_power(recipe, broken, 2, resume=True)
    cut_power(recipe, broken, 5, resume=True)
    interrupt(recipe, broken, 6, resume=True)
    cut_power(recipe, broken, 8, resume=True)
    cut_power(recipe, broken, 10, resume=True)
    train(recipe, broken, resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", broken)
    assert logged(broken) == logged(tmp_path / "whole")
    assert [line["epoch"] for line in logged(broken)[1]] == [0, 1, 2, 3]
