"""Rates from budgets: the budget is met, the rules are those of the papers, and what cannot be is said."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, minimize

from residrop.common.errors import ConfigError
from residrop.schedule.budgets import linear_at, max_regularization_at, sensitivity_at, uniform_at
from residrop.schedule.survival import linear_decay

scores = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)
positive = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60)
share = st.floats(0, 1)


def spent(rates, costs=None):
    return math.fsum(rate * cost for rate, cost in zip(rates, costs or [1.0] * len(rates), strict=True))


def costs_for(count, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 5, count).tolist()


@given(scores, share, share)
def test_sensitivity_spends_the_budget(values, part, least):
    costs = costs_for(len(values))
    budget = sum(costs) * (least + part * (1 - least))
    rates = sensitivity_at(values, budget, costs, least=least)
    assert spent(rates, costs) == pytest.approx(budget, rel=1e-9, abs=1e-9)
    assert all(least - 1e-12 <= rate <= 1 for rate in rates)


@given(positive, share)
def test_max_regularization_spends_the_budget(values, part):
    costs = costs_for(len(values))
    rates = max_regularization_at(values, part * sum(costs), costs)
    assert spent(rates, costs) == pytest.approx(part * sum(costs), rel=1e-9, abs=1e-9)


def test_sensitivity_is_proportional_where_nothing_is_capped():
    rates = sensitivity_at([1.0, -2.0, 3.0], 1.2)
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6])


def test_sensitivity_against_bisection():
    generator = np.random.default_rng(3)
    for _ in range(50):
        values, least = generator.standard_cauchy(30), generator.uniform(0, 0.3)
        budget = generator.uniform(30 * least, 30)
        low, high = 0.0, 1e12
        for _ in range(300):
            middle = (low + high) / 2
            total = np.minimum(1, least + middle * np.abs(values)).sum()
            low, high = (middle, high) if total < budget else (low, middle)
        np.testing.assert_allclose(
            sensitivity_at(values, budget, least=least), np.minimum(1, least + high * np.abs(values)), atol=1e-9
        )


def test_sensitivity_in_degenerate_cases():
    assert sensitivity_at([0.0, 0.0], 1.0) == (0.5, 0.5)
    assert sensitivity_at([0.0, 3.0, 0.0], 2.0) == (0.5, 1.0, 0.5)
    assert sensitivity_at([0.0, 5.0], 0.0) == (0.0, 0.0)
    assert sensitivity_at([1.0, 5.0], 2.0) == (1.0, 1.0)
    assert sensitivity_at([1e-320, 5.0], 1e-9)[1] == pytest.approx(1e-9)


@pytest.mark.parametrize("blocks", [10, 54])
@pytest.mark.parametrize("part", [0.3, 0.5, 0.7, 0.95])
def test_lemma_2_against_a_numerical_optimiser(blocks, part):
    """To 1e-6, some rates at their bounds."""
    g = np.random.default_rng(blocks).gamma(1.0, size=blocks) + 0.05
    rates = max_regularization_at(g, part * blocks)
    found = minimize(
        lambda p: -(p * (1 - p) * g).sum(),
        np.full(blocks, part),
        jac=lambda p: -(1 - 2 * p) * g,
        bounds=[(0, 1)] * blocks,
        constraints=LinearConstraint(np.ones((1, blocks)), part * blocks, part * blocks),
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    np.testing.assert_allclose(rates, found.x, atol=1e-6)


def test_lemma_2_properties():
    np.testing.assert_allclose(max_regularization_at([2.0] * 7, 3.0), [3 / 7] * 7)
    small, large = max_regularization_at([1.0, 10.0], 0.8)
    assert small < large < 0.5  # a small discrepancy moves furthest from 1/2
    small, large = max_regularization_at([1.0, 10.0], 1.2)
    assert small > large > 0.5
    assert max_regularization_at([1.0, 10.0], 1.0) == (0.5, 0.5)


def test_uniform_and_linear():
    assert uniform_at(4, 3.0) == (0.75,) * 4
    np.testing.assert_allclose(uniform_at(2, 3.0, [1.0, 5.0]), [0.5, 0.5])
    for part, last in ((0.5, 0.0182), (0.6, 0.2145), (0.7, 0.4109), (0.8, 0.6073), (0.9, 0.8036)):
        assert linear_at(54, 54 * part)[-1] == pytest.approx(last, abs=5e-5)
    costs = costs_for(9)
    rates = linear_at(9, 0.8 * sum(costs), costs)
    assert spent(rates, costs) == pytest.approx(0.8 * sum(costs))
    np.testing.assert_allclose(rates, linear_decay(9, rates[-1]))


def test_linear_decay_cannot_drop_more_than_half():
    least = 54 * (0.5 - 1 / 108)
    np.testing.assert_allclose(linear_at(54, least)[-1], 0.0, atol=1e-12)
    with pytest.raises(ConfigError, match=r"at least 26\.5"):
        linear_at(54, 0.3 * 54)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform_at(4, 5.0), "the nearest is 4"),
        (lambda: uniform_at(4, -1.0), "the nearest is 0"),
        (lambda: uniform_at(0, 0.0), "at least one"),
        (lambda: uniform_at(2, 1.0, [1.0]), "one per block"),
        (lambda: uniform_at(2, 1.0, [1.0, 0.0]), "cost 2 is 0"),
        (lambda: uniform_at(2, float("nan")), "cannot be met"),
        (lambda: sensitivity_at([1.0, float("nan")], 1.0), "block 2 is nan"),
        (lambda: sensitivity_at([1.0, 2.0], 0.1, least=0.2), r"the nearest is 0\.4"),
        (lambda: sensitivity_at([1.0], 1.0, least=1.5), "least"),
        (lambda: max_regularization_at([1.0, 0.0], 1.0), "block 2 is 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
