"""Exact statistical checks. A correct program fails one of them with a probability of about one in a million."""

import os
import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

ALPHA = 1e-6
UNLOCKED = os.environ.get("RESIDROP_UNLOCK_SEED") == "1"


def seed(default: int) -> int:
    """The seed of a test: `default`, or a fresh one under RESIDROP_UNLOCK_SEED=1 (nightly)."""
    return random.SystemRandom().randrange(2**31) if UNLOCKED else default


def binomial_region(trials: int, probability: float) -> tuple[int, int]:
    """Smallest and largest count that is accepted, two-sided: each tail beyond has at most ALPHA / 2."""
    law = stats.binom(trials, probability)
    return int(law.ppf(ALPHA / 2)), int(law.isf(ALPHA / 2))


def assert_binomial(successes: int, trials: int, probability: float, what: str = "coins") -> None:
    """Fail unless `successes` of `trials` is a plausible outcome of independent coins of this probability."""
    low, high = binomial_region(trials, probability)
    assert low <= successes <= high, f"{what}: {successes} of {trials} at {probability}; accepted: [{low}, {high}]"


def assert_chi_square(counts: npt.ArrayLike, probabilities: npt.ArrayLike, what: str = "cells") -> None:
    """Fail unless cell counts fit cell probabilities (Pearson, chi-square law; needs 10 expected in every cell)."""
    observed, law = np.asarray(counts, float).ravel(), np.asarray(probabilities, float).ravel()
    assert observed.shape == law.shape
    assert abs(law.sum() - 1.0) < 1e-9, f"{what}: probabilities sum to {law.sum()}"
    expected = observed.sum() * law
    assert expected.min() >= 10, f"{what}: {expected.min():.1f} expected in a cell is too few for chi-square"
    p_value = stats.chisquare(observed, expected).pvalue
    assert p_value > ALPHA, f"{what}: p-value {p_value:.1e}, observed {observed}, expected {expected}"


def assert_independent(a: npt.ArrayLike, b: npt.ArrayLike, p_a: float, p_b: float, what: str = "pair") -> None:
    """Fail unless two sequences of coins have their probabilities and are independent (a 2x2 table)."""
    a, b = np.asarray(a, bool).ravel(), np.asarray(b, bool).ravel()
    assert a.shape == b.shape
    table = np.bincount(2 * a + b, minlength=4)
    assert_chi_square(table, np.outer([1 - p_a, p_a], [1 - p_b, p_b]), what)


def assert_lag_independent(coins: npt.ArrayLike, lag: int, probability: float, what: str = "coins") -> None:
    """Fail unless coins `lag` apart along the first axis are independent; the pairs taken are disjoint.

    Overlapping pairs would count every deviation of the frequency twice, and chi-square would not hold.
    """
    drawn = np.asarray(coins, bool)
    drawn = drawn[: len(drawn) // (2 * lag) * 2 * lag].reshape(-1, 2, lag, *drawn.shape[1:])
    assert drawn.size, f"{what}: fewer than {2 * lag} coins"
    assert_independent(drawn[:, 0], drawn[:, 1], probability, probability, f"{what}, {lag} apart")


def assert_mean(samples: npt.ArrayLike, mean: Sequence[float] | npt.ArrayLike, what: str = "samples") -> None:
    """Fail unless the average over the first axis is within 5 standard errors of `mean`, element by element.

    Elements without spread must equal their mean up to rounding.
    """
    drawn = np.asarray(samples, float)
    error = drawn.std(0, ddof=1) / np.sqrt(len(drawn))
    off = np.abs(drawn.mean(0) - np.asarray(mean, float))
    assert np.all(off <= 5 * error + 1e-6), f"{what}: {(off / (error + 1e-12)).max():.1f} standard errors off"
