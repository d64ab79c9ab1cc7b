"""Costs of blocks, and survival rates from budgets on real models."""

import pytest
import torch

import residrop
from residrop import sampler_of, survival_for
from residrop.blocks.attach import rules_of
from residrop.common.errors import ConfigError
from residrop.theory import costs_of, discrepancy, sensitivity


@pytest.fixture
def batch():
    return torch.randn(8, 3, 16, 16), torch.arange(8) % 10


@pytest.fixture
def model():
    return residrop.create("resnet-14", rule="stochastic-depth", seed=1)


def spent(rates, costs):
    return costs.fixed + sum(rate * cost for rate, cost in zip(rates, costs.branches, strict=True))


def test_flops_are_complete(model, batch):
    from torch.utils.flop_counter import FlopCounterMode

    costs = costs_of(model, "flops", batch[0])
    plain = residrop.create("resnet-14", seed=1).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(batch[0])
    assert costs.total == counter.get_total_flops()
    assert costs.branches[1] > costs.branches[2] > 0  # a transition costs less


def test_time_is_measured_and_leaves_nothing_behind(model, batch):
    before, step = {k: v.clone() for k, v in model.state_dict().items()}, sampler_of(model).step
    costs = costs_of(model, "time", batch[0], repeats=2)
    assert len(costs.branches) == 6
    assert min(costs.branches) > 0.0
    assert costs.fixed >= 0.0
    assert sampler_of(model).step == step
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rule", ["uniform", "linear", "sensitivity", "max_regularization"])
@pytest.mark.parametrize("unit", ["blocks", "flops"])
def test_the_budget_is_spent(model, batch, rule, unit):
    costs = costs_of(model, unit, batch[0])
    rates = survival_for(model, f"0.7 of {unit}", rule, batches=[batch])
    assert spent(rates, costs) == pytest.approx(0.7 * costs.total, rel=1e-6)
    applied = residrop.create("resnet-14", rule="stochastic-depth", survival=rates, seed=1)
    assert [rule.rates[0] for rule in rules_of(applied)] == pytest.approx(rates)


def test_rules_follow_their_measurements(model, batch):
    rates = survival_for(model, 0.5, "sensitivity", batches=[batch])
    scores = sensitivity(model, [batch]).scores.abs()
    assert int(scores.argmax()) == max(range(6), key=lambda block: rates[block])
    g = discrepancy(model, [batch]).curvature
    rates = survival_for(model, 0.7, "max_regularization", batches=[batch])
    assert int(g.argmin()) == max(range(6), key=lambda block: rates[block])
    plain = survival_for(model, "0.6 of flops", "sensitivity", batches=[batch])
    by_cost = survival_for(model, "0.6 of flops", "sensitivity", batches=[batch], per_cost=True)
    assert plain != by_cost


def test_a_number_is_a_share_of_blocks(model):
    assert survival_for(model, 0.25) == (0.25,) * 6
    assert survival_for(model, "0.25 of blocks") == (0.25,) * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "half"}, "such as '0.6 of time'"),
        ({"budget": 1.5}, r"in \[0, 1\]"),
        ({"budget": 0.5, "rule": "best"}, "choose 'uniform'"),
        ({"budget": "0.5 of flops"}, "give one as x"),
        ({"budget": 0.5, "rule": "sensitivity"}, "at least one"),
        ({"budget": 0.1, "rule": "linear"}, "at least 2.5"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ConfigError, match=message):
        survival_for(model, **options)


def test_a_budget_below_stem_and_head(model, batch):
    with pytest.raises(ConfigError, match="without any branch"):
        survival_for(model, "0.001 of flops", batches=[batch])


def test_time_needs_blocks_that_can_be_left_out(batch):
    with pytest.raises(ConfigError, match="block-level rule"):
        costs_of(residrop.create("resnet-14", rule="swapout"), "time", batch[0])
