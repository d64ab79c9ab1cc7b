"""The law of the depth against enumeration, samples and the paper's Lemma 1."""

import itertools
import math

import numpy as np
import pytest

from helpers import assert_binomial, assert_chi_square, seed
from residrop.common.errors import ConfigError
from residrop.schedule.sampler import DepthSampler, Site
from residrop.schedule.survival import linear_decay, uniform
from residrop.theory import cost_law, depth_bound, depth_bound_probability, depth_law

RATES = (0.1, 0.5, 0.9, 1.0, 0.0, 0.35, 0.7, 0.7)


def linear_at(budget, blocks):
    """Linear decay with sum(p) = budget * blocks."""
    return linear_decay(blocks, 1 - (1 - budget) * 2 * blocks / (blocks + 1))


def enumerated(rates, costs):
    found = {}
    for mask in itertools.product((0, 1), repeat=len(rates)):
        weight = math.prod(p if alive else 1 - p for p, alive in zip(rates, mask, strict=True))
        value = round(sum(c for c, alive in zip(costs, mask, strict=True) if alive), 9)
        found[value] = found.get(value, 0.0) + weight
    return {value: weight for value, weight in sorted(found.items()) if weight > 0}


def test_law_equals_enumeration():
    law = depth_law(RATES)
    exact = enumerated(RATES, [1] * len(RATES))
    np.testing.assert_allclose([law.probabilities[int(v)] for v in exact], list(exact.values()), atol=1e-15)
    assert law.probabilities.sum() == pytest.approx(1.0, abs=1e-14)
    assert law.mean == pytest.approx((law.values * law.probabilities).sum())
    assert law.variance == pytest.approx(((law.values - law.mean) ** 2 * law.probabilities).sum())


def test_cost_law_equals_enumeration():
    costs = (1.5, 2.0, 2.0, 0.3, 7.0, 0.0, 0.1, 0.2)
    law = cost_law(RATES, costs, fixed=3.0)
    exact = enumerated(RATES, costs)
    kept = law.probabilities > 0
    np.testing.assert_allclose(law.values[kept] - 3.0, list(exact), atol=1e-9)
    np.testing.assert_allclose(law.probabilities[kept], list(exact.values()), atol=1e-14)
    assert law.mean == pytest.approx((law.values * law.probabilities).sum())
    assert law.variance == pytest.approx(((law.values - law.mean) ** 2 * law.probabilities).sum())


def test_cost_law_of_many_different_costs_is_on_a_grid():
    generator = np.random.default_rng(1)
    costs, rates = generator.uniform(1, 2, 60), generator.uniform(0.2, 1, 60)
    law = cost_law(rates, costs)
    assert len(law.values) <= 1 << 17
    assert law.probabilities.sum() == pytest.approx(1.0)
    assert (law.values * law.probabilities).sum() == pytest.approx(law.mean, rel=1e-3)
    assert ((law.values - law.mean) ** 2 * law.probabilities).sum() == pytest.approx(law.variance, rel=1e-2)


def test_draws_follow_the_law():
    rates = linear_decay(20, 0.4)
    sampler = DepthSampler([Site((rate,), "block", "shared") for rate in rates], seed=seed(3))
    depths = [sum(draw.alive for draw in sampler.plan(step).draws) for step in range(20000)]
    law = depth_law(rates)
    edges = [0, 10, 11, 12, 13, 14, 15, 16, 17, 21]
    expected = [law.probabilities[a:b].sum() for a, b in itertools.pairwise(edges)]
    assert_chi_square(np.histogram(depths, edges)[0], expected)


@pytest.mark.parametrize(
    ("rates", "variance", "bound"),
    [
        (uniform(100, 0.5), 25.00, 14.76),
        (linear_at(0.5, 100), 16.83, 12.32),
        (uniform(100, 0.7), 21.00, 13.62),
        (linear_at(0.7, 100), 18.06, 12.72),
        (uniform(54, 0.7454), 10.25, 9.85),
        (linear_at(0.7454, 54), 9.12, 9.36),
    ],
)
def test_lemma_1_in_numbers(rates, variance, bound):
    assert depth_law(rates).variance == pytest.approx(variance, abs=0.006)
    assert depth_bound(rates, 0.05) == pytest.approx(bound, abs=0.006)


@pytest.mark.parametrize("beta", [0.5, 0.05, 0.001])
def test_lemma_1_holds_exactly(beta):
    """The exact law leaves at most beta outside the bound, for all kinds of rates."""
    generator = np.random.default_rng(2)
    for rates in (uniform(40, 0.5), linear_decay(54, 0.5), generator.uniform(0, 1, 30), [0.999] * 3, [0.01] * 100):
        law, bound = depth_law(rates), depth_bound(rates, beta)
        outside = law.probabilities[np.abs(law.values - law.mean) > bound].sum()
        assert outside <= beta
        assert depth_bound_probability(rates, bound) == pytest.approx(beta, rel=1e-9)


def test_uniform_rates_are_the_most_variable():
    generator = np.random.default_rng(seed(4))
    for _ in range(200):
        rates = generator.uniform(0, 1, 12)
        even = uniform(12, float(rates.mean()))
        assert depth_law(rates).variance <= depth_law(even).variance + 1e-12
        assert depth_bound(rates, 0.1) <= depth_bound(even, 0.1) + 1e-12


def test_interval_holds_its_probability():
    law = depth_law(uniform(54, 0.6))
    low, high = law.interval(0.9)
    generator = np.random.default_rng(seed(5))
    depths = (generator.random((4000, 54)) < 0.6).sum(1)
    inside = law.probabilities[(law.values >= low) & (law.values <= high)].sum()
    assert inside >= 0.9
    assert_binomial(int(((depths >= low) & (depths <= high)).sum()), 4000, inside)


def test_certain_depth():
    law = depth_law([1.0, 0.0, 1.0])
    assert law.probabilities.tolist() == [0, 0, 1, 0]
    assert law.interval(0.5) == (2.0, 2.0)
    assert depth_bound([1.0, 0.0], 0.1) == 0.0
    assert depth_bound_probability([1.0], 0.0) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: depth_law([]), "one per block"),
        (lambda: depth_law([0.5, 1.5]), "survival rate 2"),
        (lambda: cost_law([0.5], [1.0, 2.0]), "one per block"),
        (lambda: cost_law([0.5], [-1.0]), "not negative"),
        (lambda: cost_law([0.5], [float("nan")]), "finite"),
        (lambda: depth_bound([0.5], 0.0), "between 0 and 1"),
        (lambda: depth_bound_probability([0.5], -1.0), "0 or more"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
