"""Unit masks as a random number generator: large samples, spectra of pictures, and keys that never come again."""

import numpy as np
import pytest
import torch

from helpers import ALPHA, assert_binomial, assert_chi_square, assert_independent, seed
from residrop.functional import swapout, unit_mask, use_compiler
from residrop.schedule.sampler import DepthSampler, Site

SEED = seed(7)
SITES = [Site((0.5, 0.5), "unit", "per_rank") for _ in range(54)]


def keys_of(steps, *, rank=0, part=0, stream="train"):
    sampler = DepthSampler(SITES, seed=SEED, rank=rank)
    return [draw.key for step in range(steps) for draw in sampler.plan(step, part=part, stream=stream).draws]


def mask(shape, key, theta=0.5, coin=0):
    return unit_mask(torch.empty(shape), theta, key, coin).numpy()


def test_no_key_comes_again_in_a_run():
    """Steps, blocks, micro-batches, ranks, training and sampling: 64-bit keys, all different."""
    keys = keys_of(8000)
    for options in ({"part": 1}, {"rank": 1}, {"stream": "sample"}):
        keys += keys_of(2000, **options)
    assert len(set(keys)) == len(keys) == 54 * 14000


def test_ranks_share_coins_of_blocks_and_not_masks_of_units():
    sites = [Site((0.5,), "block", "shared"), Site((0.5, 0.5), "unit", "per_rank"), Site((0.5, 0.5), "unit", "shared")]
    ranks = [DepthSampler(sites, seed=3, rank=rank) for rank in range(4)]
    for step in range(200):
        plans = [sampler.plan(step).draws for sampler in ranks]
        assert len({draws[0].alive for draws in plans}) == 1
        assert len({draws[1].key for draws in plans}) == 4
        assert len({draws[2].key for draws in plans}) == 1


@pytest.mark.parametrize("shape", [(1024, 1024), (256, 4096), (1000, 1023)])
@pytest.mark.parametrize("theta", [0.5, 0.9])
def test_no_pattern_in_a_picture(shape, theta):
    """Of white noise every Fourier coefficient's power is exponential with mean 1; a pattern is a peak, or a band."""
    picture = mask(shape, key=seed(11), theta=theta).astype(float) - theta
    power = np.abs(np.fft.rfft2(picture)) ** 2 / (picture.size * theta * (1 - theta))
    inner = power[1:, 1 : (shape[1] + 1) // 2]  # without those that are real, and so chi-square
    assert inner.max() < np.log(inner.size / ALPHA)
    cells = np.histogram(inner, bins=[*-np.log(1 - np.arange(20) / 20), np.inf])[0]
    assert_chi_square(cells, np.full(20, 1 / 20), "powers")
    for axis in (0, 1):  # mean powers of a row or column of frequencies
        lines = inner.mean(axis)
        spread = 6 / np.sqrt(inner.shape[axis])
        assert np.abs(lines - 1).max() < spread


@pytest.mark.parametrize("shape", [(8, 16, 32, 32), (64, 256, 8)])
def test_channels_blocks_and_steps_know_nothing_of_each_other(shape):
    sampler = DepthSampler(SITES[:4], seed=seed(5))
    drawn = [[mask(shape, draw.key) for draw in sampler.plan(step).draws] for step in range(3)]
    first = drawn[0][0]
    assert_independent(first[:, :-1:2], first[:, 1::2], 0.5, 0.5, "channels")
    assert_independent(first[:-1:2], first[1::2], 0.5, 0.5, "rows")
    for block in range(1, 4):
        assert_independent(first, drawn[0][block], 0.5, 0.5, f"blocks 0 and {block}")
    for step in range(1, 3):
        assert_independent(first, drawn[step][0], 0.5, 0.5, f"steps 0 and {step}")
        assert_independent(first, drawn[step][1], 0.5, 0.5, f"block 1 of step {step}")
    assert_independent(first, mask(shape, sampler.plan(0).draws[0].key, coin=1), 0.5, 0.5, "coins")


def test_results_do_not_depend_on_threads():
    x = torch.randn(64, 32, 16, 16)
    threads, found = torch.get_num_threads(), []
    use_compiler(False)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(swapout(x, -x, 0.5, 0.3, 9))
    finally:
        torch.set_num_threads(threads)
        use_compiler("auto")
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.slow
@pytest.mark.parametrize("theta", [0.5, 0.1, 0.9, 2**-12, 1 - 2**-12])
def test_hundred_million_bits(theta):
    """Frequencies of both coins, pairs of coins, and pairs at many distances, each with an exact bound."""
    size, theta = 1 << 27, round(theta * 65536) / 65536
    coins = [mask((size,), key=seed(13), theta=theta, coin=coin) for coin in (0, 1)]
    for coin in coins:
        assert_binomial(int(np.count_nonzero(coin)), size, theta)
    both = int(np.count_nonzero(coins[0] & coins[1]))
    assert_binomial(both, size, theta * theta, "both coins of a unit")
    first = coins[0]
    for lag in (1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 64, 100, 1024, 4096, 32768, 1 << 16, (1 << 16) + 1, 1 << 20, 1 << 26):
        pairs = first[: size // (2 * lag) * 2 * lag].reshape(-1, 2, lag)  # disjoint
        here = int(np.count_nonzero(pairs[:, 0] & pairs[:, 1]))
        assert_binomial(here, pairs[:, 0].size, theta * theta, f"units {lag} apart")
        across = coins[1][: size // (2 * lag) * 2 * lag].reshape(-1, 2, lag)
        cross = int(np.count_nonzero(pairs[:, 0] & across[:, 1]))
        assert_binomial(cross, pairs[:, 0].size, theta * theta, f"coins of units {lag} apart")


@pytest.mark.slow
def test_bytes_of_a_hundred_million_bits():
    bits = mask((1 << 27,), key=seed(17))
    assert_chi_square(np.bincount(np.packbits(bits), minlength=256), np.full(256, 1 / 256), "bytes")
    words = np.packbits(bits).view(np.uint16)
    assert_chi_square(np.bincount(words, minlength=1 << 16), np.full(1 << 16, 2.0**-16), "words")
