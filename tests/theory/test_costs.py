"""Costs of blocks, and survival rates from budgets on real models."""

from random import Random

import pytest
import timm
import torch
from torchvision.models import VisionTransformer

import residrop
from residrop import sampler_of, survival_for
from residrop.blocks.attach import rules_of
from residrop.blocks.residual import Residual
from residrop.common.errors import ConfigError, SpreadError, SpreadWarning
from residrop.inference.sampled.batch import Batch
from residrop.theory import costs_of, discrepancy, sensitivity
from residrop.theory.costs import Costs
from residrop.theory.costs import _groups as groups_of


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


class Clock:
    """A clock on which time passes in the six branches of ResNet-14 only, and where the machine does other things.

    `noise` gives the seconds that other things take during a branch.
    """

    def __init__(self, monkeypatch, model, noise=lambda: 0.0):
        self.now, self.ran, self.noise = 0.0, 0, noise
        monkeypatch.setattr("residrop.theory.costs.perf_counter", lambda: self.now)
        blocks = [module for module in model.modules() if isinstance(module, Residual)]
        self.seconds = [1.0, 1.0, 3.0, 2.0, 5.0, 4.0]
        for block, seconds in zip(blocks, self.seconds, strict=True):
            block.branch.register_forward_hook(lambda *_, seconds=seconds: self.work(seconds))

    def work(self, seconds):
        self.now += seconds + self.noise()
        self.ran += 1


@pytest.fixture
def tiny():
    return torch.randn(2, 3, 8, 8), torch.arange(2)


@pytest.mark.parametrize(("training", "kinds"), [(True, 5), (False, 6)])  # five structures; and all of them
def test_time_is_measured_and_leaves_nothing_behind(model, tiny, monkeypatch, training, kinds):
    clock, shares = Clock(monkeypatch, model), []
    before, step = {k: v.clone() for k, v in model.state_dict().items()}, sampler_of(model).step
    costs = costs_of(model, "time", tiny[0], training=training, repeats=3, on_progress=shares.append)
    assert costs.branches == pytest.approx(clock.seconds)
    assert costs.spread == pytest.approx([0.0] * 6)
    assert costs.fixed == pytest.approx(0.0)
    assert shares == pytest.approx([*(number / (12 * kinds) for number in range(1, 3 * kinds + 1)), 1.0])
    assert sampler_of(model).step == step
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_blocks_that_are_faster_alone_share_what_all_of_them_take(model, tiny, monkeypatch):
    """A block alone finds its weights in the cache: here it then takes half the time."""
    clock = Clock(monkeypatch, model)
    blocks = [module for module in model.modules() if isinstance(module, Residual)]
    ran = []

    def back(*_):
        if len(ran) < 3:
            clock.now -= sum(ran) / 2
        ran.clear()

    for block, seconds in zip(blocks, clock.seconds, strict=True):
        block.branch.register_forward_hook(lambda *_, seconds=seconds: ran.append(seconds))
    model.register_forward_hook(back)
    costs = costs_of(model, "time", tiny[0], training=False, repeats=2)
    assert costs.branches == pytest.approx(clock.seconds)
    assert costs.total == pytest.approx(16.0)


@pytest.mark.parametrize(("seed", "training"), [(0, True), (1, True), (2, True), (0, False)])
def test_a_busy_machine_alters_little_and_says_how_much(model, tiny, monkeypatch, seed, training):
    """Costs of 0 for some blocks, and of 1.5 for others, is what this gave before."""
    random = Random(seed)
    clock = Clock(monkeypatch, model, lambda: random.uniform(1.0, 10.0) * (random.random() < 0.1))
    costs = costs_of(model, "time", tiny[0], training=training)
    assert costs.branches[0] == costs.branches[1]  # one structure, one cost
    for cost, wanted, error in zip(costs.branches, clock.seconds, costs.spread, strict=True):
        assert abs(cost - wanted) <= max(4 * error, 0.1)
    rates = survival_for(model, "0.5 of time", batches=[tiny])
    assert spent(rates, Costs(tuple(clock.seconds), 0.0, "time")) == pytest.approx(8.0, rel=0.1)


def test_a_machine_too_busy_is_refused_or_flops_are_taken(model, tiny, monkeypatch):
    random = Random(0)
    clock = Clock(monkeypatch, model, lambda: random.uniform(0.0, 100.0))
    with pytest.raises(SpreadError, match=r"a block takes .* ± .* ms of a step of .* ms, .* ask for flops"):
        costs_of(model, "time", tiny[0], repeats=4)
    assert clock.ran > 4 * 4 * 5 * 9  # it tried for long
    monkeypatch.setattr("residrop.theory.costs._MOST", 1)
    with pytest.warns(SpreadWarning, match=r"uncertain.*; the budget is 0.5 of flops now"):
        rates = survival_for(model, "0.5 of time", batches=[tiny])
    assert rates == survival_for(model, "0.5 of flops", batches=[tiny])


def test_blocks_of_one_structure_share_their_cost_whatever_library_they_are_of(batch):
    resnet = residrop.create("resnet-20", rule="stochastic-depth")
    assert groups_of(resnet, Batch(batch[0])) == [[0, 1, 2], [3], [4, 5], [6], [7, 8]]
    next(resnet.blocks[1].branch.parameters()).requires_grad_(False)
    assert groups_of(resnet, Batch(batch[0]))[:2] == [[0, 2], [1]]  # one gradient less is computed
    vit = VisionTransformer(16, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)
    residrop.apply(vit, survival=0.5)
    assert groups_of(vit, Batch(batch[0])) == [[0, 2, 4], [1, 3, 5]]
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, drop_path_rate=0.2)
    residrop.apply(vit, survival="from_model")
    assert groups_of(vit, Batch(torch.randn(2, 3, 32, 32))) == [[0, 2, 4], [1, 3, 5]]


def test_branches_that_hold_all_that_is_trained_can_be_timed(model, tiny, monkeypatch):
    """Without any of them there is no gradient, which must be no error."""
    clock = Clock(monkeypatch, model)
    model.requires_grad_(False)
    model.blocks[5].branch.requires_grad_(True)
    assert costs_of(model, "time", tiny[0], repeats=2).branches == pytest.approx(clock.seconds)


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
