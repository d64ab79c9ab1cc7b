"""Sampling only while a decision is open: the bound holds, and inputs leave the batch."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import residrop
from helpers import ALPHA
from residrop.blocks.attach import sampler_of
from residrop.common.errors import ConfigError, PlanError
from residrop.inference import predict, predict_adaptive
from residrop.inference.sampled.adaptive import Race, _least, _orders

HORIZON = 30


def dirichlet(count, means, sharpness, seed=0):
    """Passes [HORIZON, count, classes] of inputs whose probabilities scatter around `means`."""
    law = np.random.default_rng(seed).dirichlet(sharpness * np.asarray(means), (HORIZON, count))
    return torch.from_numpy(law)


def two_faced(count, share, classes=2, seed=0):
    """Passes that are sure of class 0 with probability `share`, else of another: the widest scatter there is."""
    coins = torch.from_numpy(np.random.default_rng(seed).random((HORIZON, count)) < share)
    other = torch.from_numpy(np.random.default_rng(seed + 1).integers(1, classes, (HORIZON, count)))
    return nn.functional.one_hot(torch.where(coins, 0, other), classes).double()


HARD = {
    "a tie": two_faced(20_000, 0.5),
    "nearly a tie": two_faced(20_000, 0.55),
    "many others": two_faced(20_000, 0.3, classes=6),
    "a trap": torch.stack([two_faced(20_000, 0.8, seed=s).double() for s in (0, 2)]).mean(0),
    "scattered": dirichlet(20_000, [0.36, 0.34, 0.3], 8.0),
    "narrow": dirichlet(20_000, [0.345, 0.335, 0.32], 400.0),
    "clear": dirichlet(20_000, [0.7, 0.2, 0.1], 20.0),
}


def raced(passes, alpha):
    """(class decided for, passes used, settled) of every input, looking after every pass."""
    count = passes.shape[1]
    race = Race(passes[0], HORIZON, alpha)
    decided, used = torch.full((count,), -1), torch.full((count,), HORIZON)
    settled = torch.zeros(count, dtype=torch.bool)
    for number in range(HORIZON):
        if number:
            race.update(passes[number])
        new = race.settled() & ~settled
        decided[new], used[new] = race.total.argmax(1)[new], number + 1
        settled |= new
    return torch.where(settled, decided, race.total.argmax(1)), used, settled


@pytest.mark.parametrize("alpha", [0.05, 0.2])
@pytest.mark.parametrize("case", HARD)
def test_decisions_are_those_of_all_passes_as_often_as_promised(case, alpha):
    passes = HARD[case]
    decided, _, settled = raced(passes, alpha)
    wrong = int((decided != passes.mean(0).argmax(1)).sum())
    assert wrong <= stats.binom(passes.shape[1], alpha).isf(ALPHA)
    assert settled.any()


def test_the_simulation_tells_a_bound_that_is_broken():
    # one tenth of the evidence: the tests above would not let it pass
    passes = two_faced(20_000, 0.5)
    decided, _, _ = raced(passes, 0.5)
    wrong = int((decided != passes.mean(0).argmax(1)).sum())
    assert wrong > stats.binom(passes.shape[1], 0.05).isf(ALPHA)


def test_capital_is_worth_no_more_than_at_the_start_where_classes_tie():
    # of a population whose mean difference is exactly 0, in random order, nobody can win on average
    rng = np.random.default_rng(5)
    wins = []
    population = np.array([1.0, 0.0] * (HORIZON // 2))
    order = np.stack([rng.permutation(population) for _ in range(40_000)], axis=1)
    passes = torch.from_numpy(np.stack((order, 1 - order), axis=2))
    race = Race(passes[0], HORIZON, 0.05)
    for number in range(1, 20):
        race.update(passes[number])
        wins.append(race.capital.gather(2, (1 - race.candidates)[:, :, None]).exp().squeeze(2).numpy())
    found = np.stack(wins)  # [looks, inputs, candidates]
    error = found.std(1, ddof=1) / np.sqrt(found.shape[1])
    assert (found.mean(1) <= 1.0 + 6 * error).all()
    ever = (found[:, :, 0].max(0) >= 20.0).sum()
    assert ever <= stats.binom(found.shape[1], 1 / 20).isf(ALPHA)


def test_sure_inputs_stop_early_and_ties_do_not():
    sure = torch.tensor([0.99, 0.005, 0.005]).expand(HORIZON, 100, 3)
    _, used, settled = raced(sure, 0.05)
    assert settled.all()
    assert used.unique().tolist() == [6]
    _, used, _ = raced(two_faced(2000, 0.5), 0.05)
    assert used.double().mean() > 24


@pytest.mark.parametrize(("alpha", "passes"), [(0.05, 6), (0.01, 8), (0.5, 3)])
def test_the_surest_decision_takes(alpha, passes):
    assert _least(30, alpha) == passes
    assert _least(1, alpha) == 1
    assert _least(2, alpha) == 2


def test_a_lead_that_nothing_can_turn_is_settled_at_any_confidence():
    sure = torch.tensor([[1.0, 0.0]])
    race = Race(sure, HORIZON, 1e-300)
    while not race.settled():
        race.update(sure)
    assert race.count == 16


# On networks


def network(rule="swapout", **options):
    model = residrop.create("resnet-8", rule=rule, classes=4, channels=1, seed=0, **options)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 1, 8, 8))
        model.tail.linear.weight.mul_(4.0)  # some inputs are easy, some are not
    return model


FORMS = {"stochastic-depth": {}, "row": {"rule": "stochastic-depth", "granularity": "row"}, "swapout": {}}


def test_orders_are_random_and_a_row_has_its_own_in_every_batch():
    orders = _orders(3, 7, 6000, 5)
    assert torch.equal(orders.sort(1).values, torch.arange(5).expand(6000, 5))
    assert torch.equal(_orders(3, 7, 100, 5), orders[:100])
    assert not torch.equal(_orders(3, 8, 100, 5), orders[:100])
    counts = torch.bincount((orders * torch.tensor([625, 125, 25, 5, 1])).sum(1))
    counts = counts[counts > 0]
    assert len(counts) == 120  # all permutations, each equally often
    assert stats.chisquare(counts.numpy()).pvalue > ALPHA


@pytest.mark.parametrize("form", FORMS)
def test_adaptive_samples_are_some_of_all_in_an_order_of_each_input(form):
    options = FORMS[form]
    model, x = network(**{"rule": form, "survival": "linear(1, 0.5)", **options}), torch.randn(40, 1, 8, 8)
    found = predict_adaptive(model, x, first=7, max_samples=20)
    every = predict(model, x, 20, first=7, keep=True).sample_probabilities
    used = found.used.tolist()
    assert len(set(used)) > 2
    assert min(used) >= 6
    orders = torch.arange(20).expand(40, -1) if form == "swapout" else _orders(sampler_of(model).seed, 7, 40, 20)
    wanted = torch.stack([every[orders[row, :count], row].mean(0) for row, count in enumerate(used)])
    torch.testing.assert_close(found.probabilities, wanted, rtol=0.0, atol=2e-6)
    assert found.mean_samples == pytest.approx(np.mean(used))
    assert (found.used[~found.settled] == 20).all()
    agreed = int((found.classes == every.mean(0).argmax(1)).sum())
    assert agreed >= stats.binom(40, 0.95).ppf(ALPHA)


def test_more_confidence_takes_more_samples():
    model, x = network(), torch.randn(40, 1, 8, 8)
    means = [predict_adaptive(model, x, confidence=c).mean_samples for c in (0.5, 0.9, 0.99, 0.9999)]
    assert means == sorted(means)
    assert means[0] + 3 < means[-1]


def test_inputs_that_are_settled_leave_the_batch():
    model, x = network(), torch.randn(40, 1, 8, 8)
    rows = []
    model.blocks.block3.branch.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    found = predict_adaptive(model, x, stack=1)
    assert sum(rows) == int(found.used.sum())
    assert rows[:6] == [40] * 6
    assert max(rows[6:]) <= 40  # samples of those who are left are stacked, up to the size of the batch


@pytest.mark.parametrize("max_samples", [1, 2, 30])
def test_few_samples(max_samples):
    found = predict_adaptive(network(), torch.randn(3, 1, 8, 8), max_samples=max_samples)
    assert found.used.max() <= max_samples


def test_no_inputs_are_no_trouble():
    found = predict_adaptive(network(), torch.randn(0, 1, 8, 8))
    assert found.probabilities.shape == (0, 4)
    assert np.isnan(found.mean_samples)


def test_repeats_and_leaves_the_model_as_it_was():
    model, x = network(), torch.randn(20, 1, 8, 8)
    model.blocks.block2.eval()
    flags, step = [module.training for module in model.modules()], sampler_of(model).step
    force = sampler_of(model).in_force
    one, again, other = (predict_adaptive(model, x, first=first) for first in (0, 0, 100))
    assert all(torch.equal(a, b) for a, b in zip(one[:3], again[:3], strict=True))
    assert not torch.equal(one.probabilities, other.probabilities)
    assert [module.training for module in model.modules()] == flags
    assert (sampler_of(model).step, sampler_of(model).in_force) == (step, force)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"confidence": 1.0}, "confidence is 1.0; give a number between 0 and 1"),
        ({"confidence": "high"}, "confidence is 'high'"),
        ({"confidence": float("nan")}, "confidence is nan"),
        ({"max_samples": 0}, "max_samples is 0; give a whole number of at least 1"),
        ({"stack": 0}, "stack is 0"),
    ],
)
def test_bad_numbers_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        predict_adaptive(network(), torch.randn(2, 1, 8, 8), **given)


def test_bad_models_and_passes_are_refused():
    with pytest.raises(ConfigError, match=r"no sampler; call residrop\.attach"):
        predict_adaptive(nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(PlanError, match="first is -1"):
        predict_adaptive(network(), torch.randn(2, 1, 8, 8), first=-1)
