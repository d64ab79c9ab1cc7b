"""The statistical helpers themselves: known regions, and that a wrong program is caught."""

import numpy as np
import pytest
from scipy import stats

from helpers import (
    assert_binomial,
    assert_chi_square,
    assert_independent,
    assert_lag_independent,
    assert_mean,
    binomial_region,
)
from reference import GAMMA, key_of, lowbias32, splitmix_output


def test_binomial_region_known():
    assert binomial_region(20_000, 0.8) == (15_721, 16_274)


@pytest.mark.parametrize(("trials", "probability"), [(10, 0.5), (100, 0.01), (5000, 0.3), (7, 1.0), (7, 0.0)])
def test_binomial_region_tails(trials, probability):
    low, high = binomial_region(trials, probability)
    law = stats.binom(trials, probability)
    assert law.cdf(low - 1) <= 5e-7
    assert law.sf(high) <= 5e-7
    assert low == 0 or law.cdf(low) > 5e-7  # no smaller region would do
    assert high == 0 or law.sf(high - 1) > 5e-7


def test_assert_binomial_catches_wrong_rate():
    assert_binomial(16_000, 20_000, 0.8)
    with pytest.raises(AssertionError, match="15600 of 20000"):
        assert_binomial(15_600, 20_000, 0.8)
    with pytest.raises(AssertionError, match="1 of 9"):
        assert_binomial(1, 9, 0.0)


def test_assert_chi_square_catches_dependence():
    rng = np.random.default_rng(0)
    a, b = rng.random(4000) < 0.7, rng.random(4000) < 0.4
    assert_independent(a, b, 0.7, 0.4)
    with pytest.raises(AssertionError, match="p-value"):
        assert_independent(a, b & a, 0.7, 0.4)
    with pytest.raises(AssertionError, match="p-value"):
        assert_independent(a, b, 0.6, 0.4)
    with pytest.raises(AssertionError, match="too few"):
        assert_chi_square([3, 4], [0.5, 0.5])
    with pytest.raises(AssertionError, match="sum to"):
        assert_chi_square([300, 400], [0.5, 0.4])


def test_assert_lag_independent_catches_lag():
    coins = np.random.default_rng(0).random(8192) < 0.4
    for lag in (1, 3, 4):
        assert_lag_independent(coins, lag, 0.4)
    echo = np.concatenate((coins, coins[:4]))
    echo[4:] = np.where(np.random.default_rng(1).random(8192) < 0.2, echo[:-4], echo[4:])
    with pytest.raises(AssertionError, match="4 apart: p-value"):
        assert_lag_independent(echo, 4, 0.4)
    with pytest.raises(AssertionError, match="fewer than 20000"):
        assert_lag_independent(coins, 10_000, 0.4)


def test_assert_mean_catches_bias():
    samples = np.random.default_rng(0).normal(0.0, 1.0, (10_000, 3))
    assert_mean(samples, np.zeros(3))
    with pytest.raises(AssertionError, match="standard errors"):
        assert_mean(samples, [0.0, 0.0, 0.1])


def test_reference_splitmix_published_sequence():
    # SplitMix64 seeded with 1234567, as published with the reference implementation's test vectors (Rosetta Code)
    state = 1234567
    outputs = [splitmix_output((state + i * GAMMA) % 2**64) for i in range(1, 6)]
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert key_of(0) == 0xE220A8397B1DCDAF


def test_reference_lowbias32_bijective_on_samples():
    assert lowbias32(0) == 0
    assert len({lowbias32(x) for x in range(50_000)}) == 50_000
