"""Draws: pure functions of (seed, step, block), and what reaches the rules."""

import copy
import hashlib
import math
import pickle
import random
import time
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import assert_binomial, assert_chi_square
from reference import GAMMA, key_of, live_rows, splitmix_output
from residrop.common.errors import ConfigError, PlanError
from residrop.schedule.sampler import DepthSampler, Draw, Plan, Rows, Site, derive_key
from residrop.schedule.survival import linear_decay
from residrop.schedule.timing import early, late, parse, plateau, points, progressive, warmup

WORDS = st.integers(-(2**70), 2**70)

BLOCKS = [Site((0.5,)) for _ in range(24)]
MIXED = [
    Site((0.5,)),
    Site((0.5,), "row", "per_rank"),
    Site(()),
    Site((0.7, 0.3), "unit", "per_rank"),
    Site((0.5,), "block", "per_rank"),
    Site((0.5,), "row", "shared"),
    Site((0.4,), "unit", "shared"),
]


def coins(sampler, step=None, **options):
    return [draw.alive for draw in sampler.plan(step, **options).draws]


def keys(sampler, step=None, **options):
    return [draw.key for draw in sampler.plan(step, **options).draws]


# The hash


@given(st.lists(WORDS, min_size=1, max_size=5))
def test_derive_key_equals_reference(words):
    key = derive_key(*words)
    assert key == key_of(*words)
    assert 0 <= key < 2**64


def test_derive_key_order_and_length_matter():
    assert derive_key(1, 2) != derive_key(2, 1)
    assert derive_key(1) != derive_key(1, 0)
    assert derive_key(0) == 0xE220A8397B1DCDAF  # SplitMix64's first output for seed 0
    assert derive_key(-1) == derive_key(2**64 - 1)
    assert len({derive_key(a, b) for a in range(100) for b in range(100)}) == 10_000


def test_plan_law_pinned():
    """A change here changes every recorded run: it needs a line under "law changes" in the changelog."""
    plan = DepthSampler(MIXED, seed=11, rank=3).plan(5, part=2)
    shared, keys = key_of(11, 3, 1, 5), key_of(11, 3, 2, 5, 2)

    def at(base, block):
        return splitmix_output((base + block * GAMMA) % 2**64)

    assert plan.draws == (
        Draw((0.5,), alive=at(shared, 1) < 2**63),
        Draw((0.5,), key=at(key_of(keys, 3), 2)),
        Draw((), alive=True),
        Draw((0.7, 0.3), key=at(key_of(keys, 3), 4)),
        Draw((0.5,), alive=at(key_of(shared, 3), 5) < 2**63),
        Draw((0.5,), key=at(keys, 6)),
        Draw((0.4,), key=at(keys, 7)),
    )
    assert plan.step == 5


EDGES = [
    Site((rate,), scope=scope)
    for rate in (0.0, 5e-324, 1e-20, 2.0**-64, 0.1, 1 - 2.0**-53, 1.0)
    for scope in ("shared", "per_rank")
]


@pytest.mark.parametrize(
    ("sites", "steps", "recorded"),
    [
        (MIXED, 0, "386ad2a1028c3e49"),
        (MIXED, 10, "8d921344555577e3"),
        (MIXED * 8, 0, "2625636a3c67d1f4"),
        (MIXED * 8, 10, "d584c2ec5f205910"),
        (EDGES, 0, "a916e6113a69d2fe"),
        (EDGES, 10, "c549a0b07127a234"),
        ([], 0, "4d21f002b6a59ca3"),
        ([], 10, "4d21f002b6a59ca3"),
    ],
)
def test_plans_are_those_of_the_first_release(sites, steps, recorded):
    """Digests of plans that a loop over the blocks made, one scalar hash each; recorded runs depend on them."""
    told = hashlib.sha256()
    for seed in (0, -12, 2**70 + 1):
        for rank in range(3):
            sampler = DepthSampler(sites, seed=seed, timing=warmup(steps), rank=rank)
            for step in (0, 1, 5, 9, 10, 999, 2**40):
                plans = [sampler.plan(step, part=part) for part in (0, 1, 7)]
                plans += [sampler.plan(step, stream="sample"), sampler.expectation(step)]
                told.update(repr([(plan.step, *(draw[:3] for draw in plan.draws)) for plan in plans]).encode())
    assert told.hexdigest()[:16] == recorded


def plan_by_definition(sampler, step, part, code):
    """A plan written from the definitions: one scalar hash and one exact comparison for every block."""
    draws = []
    for block, (site, rates) in enumerate(zip(sampler.sites, sampler.rates_at(step), strict=True), 1):
        coin = site.granularity == "block"
        base = key_of(sampler.seed, code, 1, step) if coin else key_of(sampler.seed, code, 2, step, part)
        base = key_of(base, sampler.rank) if site.scope == "per_rank" else base
        word = splitmix_output((base + block * GAMMA) % 2**64)
        alive = not rates or (Fraction(word, 2**64) < Fraction(rates[0]) if coin else None)
        draws.append(Draw(rates, alive, word if rates and not coin else None))
    return draws


SITES = st.lists(
    st.builds(
        Site,
        st.one_of(st.just(()), st.tuples(st.floats(0.0, 1.0))),
        st.sampled_from(["block", "row", "unit"]),
        st.sampled_from(["shared", "per_rank"]),
    ),
    max_size=20,
)


@given(SITES, st.integers(-(2**65), 2**65), st.integers(0, 2**70), st.integers(0, 9), st.integers(0, 999))
def test_plan_equals_definition(sites, seed, step, part, rank):
    for timing in ("constant", "warmup(1000000000000)", "early(5)"):
        sampler = DepthSampler(sites, seed=seed, timing=timing, rank=rank)
        assert list(sampler.plan(step, part=part).draws) == plan_by_definition(sampler, step, part, 3)
    sample = DepthSampler(sites, seed=seed, rank=rank)
    assert list(sample.plan(step, part=part, stream="sample").draws) == plan_by_definition(sample, step, part, 4)


@given(st.integers(0, 2**40), st.integers(0, 30))
def test_coin_is_exact_next_to_its_threshold(seed, block):
    """A word w is below the rate p if and only if w / 2^64 < p, for the floats next to w / 2^64."""
    word = splitmix_output((key_of(seed, 3, 1, 7) + (block + 1) * GAMMA) % 2**64)
    nearest = min(word / 2**64, 1.0)
    rates = [nearest, math.nextafter(nearest, 0.0), math.nextafter(nearest, 1.0)]
    for rate in rates:
        sites = [*[Site((0.5,))] * block, Site((rate,)), Site((0.5,))]
        assert coins(DepthSampler(sites, seed=seed), 7)[block] is (Fraction(word, 2**64) < Fraction(rate))


def test_coin_is_exact_below_the_last_bit_of_its_threshold():
    """Rates below 2^-12 are finer than words: p 2^64 is no whole number, and the word just below it is alive."""
    words = ((seed, splitmix_output((key_of(seed, 3, 1, 7) + GAMMA) % 2**64)) for seed in range(60_000))
    seed, word = next(found for found in words if found[1] < 2**52)
    rate = word / 2**64  # exact
    for one, alive in ((rate, False), (math.nextafter(rate, 1.0), True), (math.nextafter(rate, 0.0), False)):
        assert coins(DepthSampler([Site((one,))], seed=seed), 7) == [alive]


# Purity


@given(st.integers(-(2**65), 2**65), st.integers(0, 2**40))
def test_plan_pure_function_of_seed_and_step(seed, step):
    assert DepthSampler(MIXED, seed=seed).plan(step) == DepthSampler(MIXED, seed=seed).plan(step)


def test_plan_independent_of_call_order_and_generators():
    sampler = DepthSampler(MIXED, seed=3)
    forward = [sampler.plan(step) for step in range(20)]
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002 - the point is that the global generator does not matter
    state = random.getstate()
    backward = [sampler.plan(step) for step in reversed(range(20))]
    assert forward == backward[::-1]
    assert random.getstate() == state
    assert sampler.step == 0


def test_plan_defaults_to_own_step():
    sampler = DepthSampler(BLOCKS, seed=3)
    assert sampler.plan() == sampler.plan(0)
    sampler.step = 7
    assert sampler.plan() == sampler.plan(7)
    assert sampler.plan() != sampler.plan(0)


def test_plans_differ_between_steps_seeds_and_blocks():
    by_step = {tuple(coins(DepthSampler(BLOCKS, seed=0), step)) for step in range(200)}
    by_seed = {tuple(coins(DepthSampler(BLOCKS, seed=seed), 0)) for seed in range(-100, 100)}
    assert len(by_step) == len(by_seed) == 200
    keyed = DepthSampler([Site((0.5,), "unit")] * 50, seed=0)
    assert len({key for step in range(200) for key in keys(keyed, step)}) == 10_000


def test_seed_and_step_are_not_interchangeable():
    assert coins(DepthSampler(BLOCKS, seed=1), 2) != coins(DepthSampler(BLOCKS, seed=2), 1)
    assert coins(DepthSampler(BLOCKS, seed=1), 0) != coins(DepthSampler(BLOCKS, seed=0), 1)


def test_block_coin_does_not_depend_on_later_blocks():
    short, long = DepthSampler(BLOCKS[:5], seed=4), DepthSampler(BLOCKS, seed=4)
    assert all(coins(short, step) == coins(long, step)[:5] for step in range(50))


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_rates_zero_and_one_are_certain(seed, step):
    sampler = DepthSampler([Site((0.0,)), Site((1.0,))] * 4, seed=seed)
    assert coins(sampler, step) == [False, True] * 4


def test_coins_monotone_in_rate():
    """The same uniform decides, so a larger rate never kills a block that a smaller one keeps."""
    low, high = DepthSampler([Site((0.3,))] * 24, seed=8), DepthSampler([Site((0.6,))] * 24, seed=8)
    pairs = [pair for step in range(200) for pair in zip(coins(low, step), coins(high, step), strict=True)]
    assert all(b or not a for a, b in pairs)
    assert any(b and not a for a, b in pairs)


# Scope, part and stream


def test_scope_defaults_across_ranks():
    ranks = [DepthSampler(MIXED, seed=5, rank=rank) for rank in range(8)]
    plans = [[sampler.plan(step).draws for step in range(40)] for sampler in ranks]
    for place, (granularity, scope) in enumerate((site.granularity, site.scope) for site in MIXED):
        courses = {tuple(draws[place] for draws in plan) for plan in plans}
        constant = not MIXED[place].rates
        assert len(courses) == (1 if scope == "shared" or constant else 8), (place, granularity, scope)


def test_part_changes_keys_but_not_coins():
    sampler = DepthSampler(MIXED, seed=5, rank=1)
    for step in range(20):
        parts = [sampler.plan(step, part=part).draws for part in range(6)]
        for place, site in enumerate(MIXED):
            drawn = {draws[place] for draws in parts}
            assert len(drawn) == (1 if site.granularity == "block" else 6), (place, site)
    assert sampler.plan(3) == sampler.plan(3, part=0)


def test_part_of_one_step_is_not_another_step():
    sampler = DepthSampler([Site((0.5,), "unit")], seed=5)
    assert len({keys(sampler, step, part=part)[0] for step in range(40) for part in range(40)}) == 1600


def test_sample_stream_differs_from_train():
    sampler = DepthSampler(BLOCKS, seed=5)
    train = {tuple(coins(sampler, step)) for step in range(100)}
    sample = {tuple(coins(sampler, step, stream="sample")) for step in range(100)}
    assert len(train) == len(sample) == 100
    assert not train & sample
    keyed = DepthSampler([Site((0.5,), "row")], seed=5)
    assert keys(keyed, 4) != keys(keyed, 4, stream="sample")


def test_sample_stream_uses_final_rates_during_warmup():
    sampler = DepthSampler([Site((0.25,)), Site((0.5, 0.75), "unit")], timing="warmup(100)")
    assert [draw.rates for draw in sampler.plan(1, stream="sample").draws] == [(0.25,), (0.5, 0.75)]


# Warm-up and expectation


def test_warmup_rates_in_plans():
    sampler = DepthSampler([Site((0.5,)), Site(()), Site((0.0, 0.25), "unit")], seed=1, timing="warmup(4)")
    assert [draw.rates for draw in sampler.plan(0).draws] == [(1.0,), (), (1.0, 1.0)]
    assert [draw.rates for draw in sampler.plan(2).draws] == [(0.75,), (), (0.5, 0.625)]
    assert [draw.rates for draw in sampler.plan(3).draws] == [(0.625,), (), (0.25, 0.4375)]
    assert [draw.rates for draw in sampler.plan(4).draws] == [(0.5,), (), (0.0, 0.25)]
    assert sampler.rates_at(2) == [(0.75,), (), (0.5, 0.625)]


def test_warmup_first_step_keeps_every_block():
    for seed in range(50):
        assert all(coins(DepthSampler([Site((0.0,))] * 10, seed=seed, timing="warmup(3)"), 0))


def test_warmup_coins_follow_the_rates_in_force():
    sampler = DepthSampler([Site((0.0,))] * 10, seed=1, timing="warmup(1000)")
    for step in (100, 500, 900):
        alive = sum(sum(coins(DepthSampler(sampler.sites, seed=s, timing="warmup(1000)"), step)) for s in range(500))
        assert_binomial(alive, 5000, 1 - step / 1000, f"step {step}")


def test_plans_reuse_their_draws_while_the_rates_stand_still():
    sampler = DepthSampler([Site((0.5,)), Site((0.25,))], timing=points((0, 1.0), (9, 1.0), (10, 0.5), (99, 0.5)))
    for first, last in ((0, 10), (10, 100)):
        for place in range(2):
            drawn = [sampler.plan(step).draws[place] for step in range(first, last)]
            assert len({id(draw) for draw in drawn}) == len(set(drawn)) <= 2
    assert sampler.plan(3).draws[0].rates == (0.5,)
    assert sampler.plan(50).draws[0].rates == (0.75,)


@pytest.mark.parametrize(
    "timing", [warmup(6), early(4), early(3, 4), late(4), plateau(2, 3), progressive(0.3), progressive(0.3, 4)], ids=str
)
def test_plans_and_rates_follow_the_timing_in_any_order(timing):
    sampler = DepthSampler([Site((0.5,)), Site(()), Site((0.0, 0.25), "unit")], seed=1, timing=timing)
    for step in [*range(12), 3, 11, 0, 7, 4]:
        drop = timing.share(step)
        wanted = [(1 - drop * 0.5,), (), (1 - drop, 1 - drop * 0.75)]
        for found in (
            sampler.rates_at(step),
            [draw.rates for draw in sampler.plan(step).draws],
            [draw.rates for draw in sampler.expectation(step).draws],
        ):
            assert [pytest.approx(rates, abs=1e-15) for rates in wanted] == found
        assert sampler.plan(step) == DepthSampler(sampler.sites, seed=1, timing=timing).plan(step)


def test_outside_training_counts_the_end_of_the_timing():
    sites = [Site((0.5,)), Site(()), Site((0.25, 0.75), "unit")]
    ends = {"constant": None, "warmup(9)": None, "late(9)": None, "progressive(0.1)": None, "early(9)": 0.0,
            "plateau(5, 4)": 0.0, "points(0:1, 9:0.5)": 0.5}  # fmt: skip
    for timing, share in ends.items():
        sampler = DepthSampler(sites, timing=timing)
        drop = 1.0 if share is None else share
        final = [tuple(1 - drop * (1 - rate) for rate in site.rates) for site in sites]
        assert [draw.rates for draw in sampler.plan(0, stream="sample").draws] == final
        drawn = [sampler.draw(index, False) for index in range(3)]
        assert drawn == ([None] * 3 if share is None else [Draw(rates) for rates in final])
    assert all(coins(DepthSampler(BLOCKS, timing="early(3)"), 0, stream="sample"))


def test_sampler_takes_a_timing_or_its_string():
    for timing in ("warmup(7)", " plateau( 2,3 ) ", "progressive(0.25)"):
        assert DepthSampler(BLOCKS, timing=timing).schedule == DepthSampler(BLOCKS, timing=parse(timing)).schedule
    with pytest.raises(ConfigError, match=r"timing 'warmup\(0\.1\)' has the time 0\.1; times are whole steps"):
        DepthSampler(BLOCKS, timing="warmup(0.1)")


def test_expectation_has_rates_and_no_coins():
    sampler = DepthSampler(MIXED, timing="warmup(2)")
    plan = sampler.expectation(1)
    assert [draw.rates for draw in plan.draws] == sampler.rates_at(1)
    assert all(draw.expected and draw.alive is None and draw.key is None for draw in plan.draws)
    assert plan.step == 1
    assert sampler.expectation().draws[0].rates == (1.0,)
    assert not any(draw.expected for draw in sampler.plan(0).draws)


# State


def test_state_dict_round_trip():
    sampler = DepthSampler(MIXED, seed=-12)
    for _ in range(9):
        sampler.before_forward(True)
    state = sampler.state_dict()
    assert state == {"seed": -12, "step": 9}
    resumed = DepthSampler(MIXED, seed=0)
    resumed.load_state_dict(state)
    assert resumed.plan() == sampler.plan()
    assert resumed.plan() != DepthSampler(MIXED, seed=0).plan(9)
    for _ in range(3):
        resumed.before_forward(True)
        sampler.before_forward(True)
        assert resumed.draw(0, True) == sampler.draw(0, True)
    assert resumed.state_dict() == sampler.state_dict() == {"seed": -12, "step": 12}


def test_copies_draw_the_same():
    sampler = DepthSampler(MIXED * 3, seed=4, timing=early(5, 5), rank=2)
    plans = [sampler.plan(step) for step in range(12)]
    for again in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert [again.plan(step) for step in range(12)] == plans


@pytest.mark.slow
@pytest.mark.parametrize("timing", ["constant", "warmup(1000000)"])
def test_drawing_costs_less_than_50_microseconds(timing):
    """For 54 blocks at rates that stand still; moving ones may cost three times that. The fastest run counts."""
    sampler = DepthSampler([Site((rate,)) for rate in linear_decay(54)], timing=timing)
    seconds = []
    for run in range(200):
        start = time.perf_counter()
        for step in range(20):
            sampler.plan(20 * run + step)
        seconds.append((time.perf_counter() - start) / 20)
    assert min(seconds) < (50e-6 if timing == "constant" else 150e-6)


@pytest.mark.parametrize("seed", [1.0, True, "1", None])
def test_sampler_refuses_seed(seed):
    with pytest.raises(ConfigError, match=r"seed is .*give a whole number"):
        DepthSampler(BLOCKS, seed=seed)


def test_sampler_refuses_rates_and_timing():
    with pytest.raises(ConfigError, match=r"rate 2 is 1\.5"):
        DepthSampler([Site((0.5,)), Site((1.5,))])
    with pytest.raises(ConfigError, match=r"timing 'warmup\(-1\)' has the time -1"):
        DepthSampler(BLOCKS, timing="warmup(-1)")


# Plans by hand


def test_plan_of_coins():
    plan = Plan.of([True, False, 1, 0])
    assert [draw.alive for draw in plan.draws] == [True, False, True, False]
    assert all(draw.alive in (True, False) and type(draw.alive) is bool for draw in plan.draws)
    assert plan.step == 0
    assert Plan.of([]).draws == ()


def test_plan_is_frozen():
    plan = Plan.of([True])
    with pytest.raises(AttributeError, match="can't set attribute"):
        plan.step = 3


@pytest.mark.parametrize("length", [0, 23, 25])
def test_give_refuses_other_length(length):
    sampler = DepthSampler(BLOCKS)
    with pytest.raises(PlanError, match=f"the plan has {length} draws, the model 24 rules; they must agree"):
        sampler.giving(Plan.of([True] * length))
    with pytest.raises(PlanError, match="run outside of a forward of its root"):
        sampler.draw(0, True)


def test_give_refuses_plan_of_another_model():
    """PlanError is documented as "a draw made for another model": equal length is not enough to pass."""
    sampler = DepthSampler([Site((0.7, 0.3), "unit"), Site((0.5,), "row")])
    with pytest.raises(PlanError):
        sampler.giving(Plan.of([True, False]))


def test_given_plan_is_obeyed_and_steps_stand_still():
    sampler = DepthSampler(BLOCKS[:3])
    plan = Plan.of([True, False, True])
    with sampler.giving(plan):
        for training in (True, False):
            sampler.before_forward(training)
            assert [sampler.draw(i, training).alive for i in range(3)] == [True, False, True]
    assert sampler.step == 0
    assert sampler.draw(0, False) is None
    sampler.before_forward(True)
    assert sampler.step == 1
    assert tuple(sampler.draw(i, True) for i in range(3)) == sampler.plan(0).draws


def test_draw_before_any_plan_refused():
    sampler = DepthSampler(BLOCKS)
    assert sampler.draw(0, False) is None
    with pytest.raises(
        PlanError,
        match=r"so it has no draw: call the module that residrop\.attach or residrop\.apply was given",
    ):
        sampler.draw(0, True)


# Rows


def test_rows_without_key_refused():
    for draw in (Draw((0.5,), alive=True), Draw((0.5,))):
        with pytest.raises(PlanError, match="no key for rows"):
            draw.rows(4)


@given(st.floats(0.0, 1.0), st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_rows_live_is_floor_or_ceil(rate, total, key):
    rows = Draw((rate,), key=key).rows(total)
    assert rows.live in {floor(rate * total), ceil(rate * total)}
    assert 0 <= rows.start < total
    assert 0 <= rows.live <= total
    assert type(rows.live) is int


@given(st.floats(0.0, 1.0), st.integers(1, 40), st.integers(0, 2**64 - 1))
def test_rows_equal_reference(rate, total, key):
    start, live = Draw((rate,), key=key).rows(total)
    assert [(start + i) % total for i in range(live)] == live_rows(key, rate, total)


@given(st.integers(1, 100), st.integers(0, 2**64 - 1))
def test_rows_certain_at_zero_and_one(total, key):
    assert Draw((0.0,), key=key).rows(total).live == 0
    assert Draw((1.0,), key=key).rows(total).live == total


def test_rows_of_empty_batch():
    assert Draw((0.5,), key=3).rows(0) == Rows(0, 0)


def test_rows_whole_number_is_never_rounded():
    assert {Draw((0.5,), key=key).rows(8).live for key in range(1000)} == {4}
    assert {Draw((0.75,), key=key).rows(4).live for key in range(1000)} == {3}


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("total", range(1, 41))
def test_rows_survive_at_the_rate(rate, total):
    """Every row by itself, the count of live rows, and the start, for every small batch size."""
    trials = 3000
    first = derive_key(total, int(rate * 100))
    rows = [Draw((rate,), key=derive_key(first, i)).rows(total) for i in range(trials)]
    alive = np.zeros(total, int)
    for start, live in rows:
        alive[[(start + i) % total for i in range(live)]] += 1
    for row, count in enumerate(alive):
        assert_binomial(int(count), trials, rate, f"row {row} of {total}")
    more = sum(live > floor(rate * total) for _, live in rows)
    assert_binomial(more, trials, rate * total - floor(rate * total), f"rounding up, {total} rows")
    starts = np.bincount([start for start, _ in rows], minlength=total)
    assert len(starts) == total
    for row, count in enumerate(starts):
        assert_binomial(int(count), trials, 1 / total, f"windows starting at row {row} of {total}")


@given(st.floats(0.0, 1.0), st.integers(1, 100), st.integers(0, 2**64 - 1))
def test_rows_are_none_or_two_at_least(rate, total, key):
    few, many = (Draw((rate,), key=key, fewest=fewest).rows(total) for fewest in (1, 2))
    assert few.start == many.start
    assert many.live in ({few.live} if total == 1 or rate * total >= 2 else {0, 2})


@pytest.mark.parametrize(("rate", "total"), [(0.1, 2), (0.5, 2), (0.9, 2), (0.5, 3), (0.25, 4), (0.1, 15)])
def test_rows_in_pairs_survive_at_the_rate(rate, total):
    """Where p * n is below 2: two rows with probability p * n / 2, so every row with probability p."""
    trials = 4000
    first = derive_key(total, int(rate * 100), 2)
    rows = [Draw((rate,), key=derive_key(first, i), fewest=2).rows(total) for i in range(trials)]
    assert {live for _, live in rows} <= {0, 2}
    assert_binomial(sum(live == 2 for _, live in rows), trials, rate * total / 2, "pairs")
    for row in range(total):
        alive = sum((row - start) % total < live for start, live in rows)
        assert_binomial(alive, trials, rate, f"row {row} of {total}")


def test_sites_hand_on_how_many_rows_are_needed():
    sites = [Site((0.5,), "row", fewest=fewest) for fewest in (1, 2)] + [Site((0.5,), "block")]
    assert [draw.fewest for draw in DepthSampler(sites).plan().draws] == [1, 2, 1]


def test_rows_start_independent_of_rounding():
    rows = [Draw((0.5,), key=derive_key(1, i)).rows(5) for i in range(20_000)]
    table = np.zeros((5, 2))
    for start, live in rows:
        table[start, live - 2] += 1
    assert_chi_square(table, np.full((5, 2), 0.1), "start x rounding")


def test_rows_wrap_around():
    wrapped = [rows for key in range(300) if sum(rows := Draw((0.6,), key=key).rows(10)) > 10]
    assert wrapped
    assert {rows.start for rows in wrapped} == {5, 6, 7, 8, 9}
