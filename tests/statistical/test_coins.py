"""Coins of every level have their probability and know nothing of each other (alpha = 1e-6 a check)."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from helpers import assert_binomial, assert_chi_square, assert_independent, assert_lag_independent, seed
from residrop.functional import mix, row_mask, unit_mask
from residrop.schedule.sampler import DepthSampler, Site, derive_key

MANY = 1 << 16
SEED = seed(2024)
RATES = (0.5, 0.9, 0.25, 0.5, 0.95, 0.75, 0.5, 0.1)


def block_coins(number=MANY, *, by="step", rates=RATES, stream="train", scope="shared", rank=0):
    """bool array [number, blocks]: the coins of consecutive steps, or of step 0 under consecutive seeds."""
    sites = [Site((rate,), "block", scope) for rate in rates]
    if by == "step":
        sampler = DepthSampler(sites, seed=SEED, rank=rank)
        plans = (sampler.plan(step, stream=stream) for step in range(number))
    else:
        plans = (DepthSampler(sites, seed=SEED + i, rank=rank).plan(0, stream=stream) for i in range(number))
    return np.array([[draw.alive for draw in plan.draws] for plan in plans])


@pytest.fixture(scope="module", params=["step", "seed"])
def coins(request):
    return block_coins(by=request.param)


# Blocks


def test_block_frequencies(coins):
    for block, rate in enumerate(RATES):
        assert_binomial(int(coins[:, block].sum()), MANY, rate, f"block {block}")


def test_blocks_independent_within_a_step(coins):
    for a in range(len(RATES)):
        for b in range(a):
            assert_independent(coins[:, a], coins[:, b], RATES[a], RATES[b], f"blocks {b} and {a}")


def test_blocks_jointly(coins):
    """All 2^4 patterns of four blocks, neighbours and not."""
    for chosen in ((0, 1, 2, 3), (2, 3, 5, 6), (0, 3, 6, 2)):
        codes = coins[:, chosen] @ (1 << np.arange(4))
        law = np.ones(1)
        for block in chosen:
            law = np.outer([1 - RATES[block], RATES[block]], law).ravel()
        assert_chi_square(np.bincount(codes, minlength=16), law, f"blocks {chosen}")


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 16, 64, 256, 4096])
def test_steps_and_seeds_independent(coins, lag):
    for block, rate in enumerate(RATES):
        assert_lag_independent(coins[:, block], lag, rate, f"block {block}")


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_neighbouring_blocks_of_neighbouring_steps_independent(coins, shift):
    """Coins run over a counter: block l + 1 of a step must not be block l of the next, nor the other way round."""
    for a in range(len(RATES) - shift):
        b = a + shift
        assert_independent(coins[:-1, a], coins[1:, b], RATES[a], RATES[b], f"blocks {a}, {b}")
        assert_independent(coins[:-1, b], coins[1:, a], RATES[b], RATES[a], f"blocks {b}, {a}")


def test_runs_of_one_block(coins):
    """Patterns of 5 consecutive steps (or seeds) of one fair block."""
    column = coins[: MANY - MANY % 5, 0].reshape(-1, 5)
    assert_chi_square(np.bincount(column @ (1 << np.arange(5)), minlength=32), np.full(32, 1 / 32))


def test_live_depth_is_a_sum_of_independent_coins():
    rates = [0.5] * 10
    depth = block_coins(MANY // 4, rates=rates).sum(1)
    law = np.array([1.0])
    for rate in rates:
        law = np.convolve(law, [1 - rate, rate])
    assert_chi_square(np.bincount(depth, minlength=11), law)


def test_streams_and_ranks_independent():
    number = MANY // 4
    train, sample = block_coins(number), block_coins(number, stream="sample")
    ranks = [block_coins(number, scope="per_rank", rank=rank) for rank in range(3)]
    for block, rate in enumerate(RATES):
        assert_independent(train[:, block], sample[:, block], rate, rate, "train and sample")
        assert_independent(train[:, block], ranks[0][:, block], rate, rate, "shared and rank 0")
        assert_independent(ranks[0][:, block], ranks[1][:, block], rate, rate, "ranks 0 and 1")
        assert_independent(ranks[1][:, block], ranks[2][:, block], rate, rate, "ranks 1 and 2")
        assert_binomial(int(ranks[1][:, block].sum()), number, rate)


def test_seed_and_step_do_not_trade_places():
    """Step k of seed s against step k - 1 of seed s + 1."""
    sites = [Site((0.5,))] * 4
    here = [DepthSampler(sites, seed=s).plan(k).draws for s in range(64) for k in range(1, 65)]
    there = [DepthSampler(sites, seed=s + 1).plan(k - 1).draws for s in range(64) for k in range(1, 65)]
    a, b = (np.array([[draw.alive for draw in draws] for draws in plans]) for plans in (here, there))
    for block in range(4):
        assert_independent(a[:, block], b[:, block], 0.5, 0.5)


@pytest.mark.slow
def test_many_blocks_pairwise_jointly():
    """54 blocks, all 1431 pairs, over 2^16 steps."""
    rates = [0.5] * 54
    drawn = block_coins(rates=rates)
    for a in range(54):
        assert_binomial(int(drawn[:, a].sum()), MANY, 0.5)
        for b in range(a):
            assert_binomial(int((drawn[:, a] == drawn[:, b]).sum()), MANY, 0.5, f"blocks {b}, {a} agree")


# Rows


def keys_of(number, granularity="row", part=0):
    sampler = DepthSampler([Site((0.5,), granularity)] * 2, seed=SEED)
    return np.array([[d.key for d in sampler.plan(step, part=part).draws] for step in range(number)], dtype=object)


@pytest.mark.parametrize(("rate", "total"), [(0.5, 5), (0.8, 8), (0.3, 1), (0.9, 128)])
def test_row_windows(rate, total):
    number = 1 << 13
    sampler = DepthSampler([Site((rate,), "row")] * 2, seed=SEED)
    alive = np.zeros((number, 2, total), bool)
    for step in range(number):
        for block, draw in enumerate(sampler.plan(step).draws):
            start, live = draw.rows(total)
            alive[step, block, (start + np.arange(live)) % total] = True
    for row in range(total):
        for block in range(2):
            assert_binomial(int(alive[:, block, row].sum()), number, rate, f"row {row}")
        assert_independent(alive[:, 0, row], alive[:, 1, row], rate, rate, f"row {row} in two blocks")
        assert_lag_independent(alive[:, 0, row], 1, rate, f"row {row} in two steps")


def test_bernoulli_rows():
    keys = keys_of(1 << 12)[:, 0]
    alive = np.stack([row_mask(16, 0.7, key).numpy() for key in keys])
    assert_binomial(int(alive.sum()), alive.size, 0.7)
    for row in range(16):
        assert_binomial(int(alive[:, row].sum()), len(keys), 0.7, f"row {row}")
    for lag in (1, 2, 8):
        assert_lag_independent(alive.T, lag, 0.7, "rows")
        assert_lag_independent(alive, lag, 0.7, "steps")


# Units

T1, T2 = 0.7, 0.4
RAW = 0xABCDEF << 40  # keys are public: a user may count them up by hand


@pytest.fixture(scope="module", params=["derived", "raw"])
def unit_coins(request):
    """bool arrays [keys, units] of two coins over consecutive keys: 2^15 as the sampler makes them, 2^13 numbers."""
    derived = request.param == "derived"
    ones = torch.ones(2, 8)
    codes = np.empty((MANY // 4 if derived else MANY // 8, 16), np.int8)
    for i in range(len(codes)):
        key = derive_key(SEED, i) if derived else RAW + i
        codes[i] = mix((ones, 2 * ones), (T1, T2), key).flatten().numpy()
    return codes & 1 == 1, codes & 2 == 2


def test_unit_frequencies(unit_coins):
    first, second = unit_coins
    for unit in range(16):
        assert_binomial(int(first[:, unit].sum()), len(first), T1, f"coin 0 of unit {unit}")
        assert_binomial(int(second[:, unit].sum()), len(second), T2, f"coin 1 of unit {unit}")


def test_two_coins_of_a_unit_independent(unit_coins):
    first, second = unit_coins
    for unit in range(16):
        assert_independent(first[:, unit], second[:, unit], T1, T2, f"coins of unit {unit}")


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8])
def test_neighbouring_units_independent(unit_coins, lag):
    for coin, theta in zip(unit_coins, (T1, T2), strict=True):
        for unit in range(16 - lag):
            assert_independent(coin[:, unit], coin[:, unit + lag], theta, theta, f"units {unit}, {unit + lag}")


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 256, 4096])
def test_neighbouring_keys_independent(unit_coins, lag):
    for coin, theta in zip(unit_coins, (T1, T2), strict=True):
        for unit in range(16):
            assert_lag_independent(coin[:, unit], lag, theta, f"unit {unit}, keys")


def test_neighbouring_units_of_neighbouring_keys_independent(unit_coins):
    """Unit i + 1 under one key against unit i under the next: an index that is merely shifted fails here."""
    for coin, theta in zip(unit_coins, (T1, T2), strict=True):
        for a, b in [*pairwise(range(16)), *((b, a) for a, b in pairwise(range(16)))]:
            assert_independent(coin[:-1, a], coin[1:, b], theta, theta, f"units {a}, {b} of neighbouring keys")


# One large mask: 2^20 units under a few keys


@pytest.mark.parametrize("theta", [0.01, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("coin", [0, 1, 2, 5])
def test_large_mask_frequencies(theta, coin):
    like = torch.empty(1 << 20)
    for i in range(4):
        mask = unit_mask(like, theta, derive_key(SEED, i), coin)
        assert_binomial(int(mask.sum()), 1 << 20, round(theta * 65536) / 65536)


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 8, 16, 32, 64, 128, 512, 1024, 3072, 8192, 16384, 65536, 1 << 19])
def test_large_mask_units_independent(lag):
    """Units of one fair mask, `lag` apart, agree as often as independent coins: an exact law for a fair coin."""
    like = torch.empty(1 << 20)
    agree = trials = 0
    for i in range(8):
        mask = unit_mask(like, 0.5, derive_key(SEED, i))
        here = int((mask[:-lag] == mask[lag:]).sum())
        assert_binomial(here, len(like) - lag, 0.5, f"{lag} apart, key {i}")
        agree, trials = agree + here, trials + len(like) - lag
    assert_binomial(agree, trials, 0.5, f"{lag} apart, all keys")


def test_large_mask_coins_and_keys_independent():
    like, thetas = torch.empty(1 << 20), (0.5, 0.25, 0.75, 0.5, 0.9)
    masks = [
        [unit_mask(like, theta, derive_key(SEED, i), coin).numpy() for coin, theta in enumerate(thetas)]
        for i in range(2)
    ]
    for a in range(5):
        for b in range(a):
            assert_independent(masks[0][a], masks[0][b], thetas[a], thetas[b], f"coins {b}, {a}")
        for b in range(5):
            assert_independent(masks[0][a], masks[1][b], thetas[a], thetas[b], f"coin {a}, coin {b} of another key")


def test_large_mask_bytes():
    """Patterns of 8 consecutive units of a fair mask."""
    bits = unit_mask(torch.empty(1 << 20), 0.5, derive_key(SEED, 1)).numpy().reshape(-1, 8)
    assert_chi_square(np.bincount(bits @ (1 << np.arange(8)), minlength=256), np.full(256, 1 / 256))


def test_counts_of_masks_vary_as_binomial():
    """Live counts over keys have the binomial spread: keys do not permute one mask among its units."""
    law = stats.binom(64, 0.5)
    edges = [0, 26, 29, 31, 33, 35, 38, 65]
    expected = [law.cdf(b - 1) - law.cdf(a - 1) for a, b in pairwise(edges)]
    like = torch.empty(8, 8)
    for name, keys in {
        "derived": [derive_key(SEED, i) for i in range(8000)],
        "raw": [RAW + i for i in range(8000)],
    }.items():
        counts = [int(unit_mask(like, 0.5, key).sum()) for key in keys]
        assert_chi_square(np.histogram(counts, edges)[0], expected, f"{name} keys")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 8, 16, 31, 32, 40, 63])
def test_every_bit_of_the_key_matters(bits):
    """Masks of keys that differ in one bit agree on half of their fair units."""
    like = torch.empty(1 << 16)
    for i in range(200):
        key = derive_key(SEED, i)
        a, b = unit_mask(like, 0.5, key), unit_mask(like, 0.5, key ^ (1 << bits))
        assert_independent(a.numpy(), b.numpy(), 0.5, 0.5, f"bit {bits}, key {i}")
