"""Coupled draws: exact rates, the number, work and neighbours that each coupling promises, and joint probabilities."""

import re
from fractions import Fraction
from itertools import combinations, pairwise, permutations, product
from math import ceil, floor

import numpy as np
import pytest

from helpers import assert_binomial
from residrop.common.errors import ConfigError, PlanError
from residrop.schedule.sampler import DepthSampler, Draw, Plan, Site
from residrop.schedule.survival import linear_decay

UNEQUAL = (0.9, 0.35, 0.5, 0.75, 0.625)
COSTS = (3.0, 1.0, 2.0, 1.0, 2.0)
APART = (0.9, 0.35, 0.7, 0.75, 0.625)
DESIGNS = {
    "systematic": ("systematic", UNEQUAL, ()),
    "equal rates": ("systematic", (0.7,) * 5, ()),
    "balanced": ("balanced", UNEQUAL, COSTS),
    "apart": ("apart", APART, ()),
}


def sampler_for(coupling, rates, costs=(), *, granularity="block", **options):
    scope = options.pop("scope", "shared")
    sites = [Site((rate,), granularity, scope) for rate in rates]
    return DepthSampler(sites, coupling=coupling, costs=costs, **options)


def coins_of(sampler, steps, every=1):
    """bool [steps, blocks]"""
    return np.array([[draw.alive for draw in sampler.plan(every * step).draws] for step in range(steps)])


def rows_of(plan, batch_size):
    """bool [blocks, rows]"""
    found = np.zeros((len(plan.draws), batch_size), dtype=bool)
    for block, draw in enumerate(plan.draws):
        start, live = draw.rows(batch_size)
        found[block, (start + np.arange(live)) % batch_size] = True
    return found


def overlap(first, other):
    """Exact length of what two arcs (beginning, length) of a circle of length 1 have in common."""
    (a, p), (b, q) = first, other
    shift = (b - a) % 1
    return max(Fraction(0), min(p, shift + q) - shift) + max(Fraction(0), min(p, shift + q - 1))


def joint_presence(orders, rates):
    """Probability that both of two blocks are present, for arcs end to end, over equally likely orders."""
    rates = [Fraction(rate) for rate in rates]
    found = dict.fromkeys(combinations(range(len(rates)), 2), Fraction(0))
    for order in orders:
        begin, at = {}, Fraction(0)
        for block in order:
            begin[block] = at
            at += rates[block]
        for a, b in found:
            found[a, b] += overlap((begin[a], rates[a]), (begin[b], rates[b]))
    return {pair: total / len(orders) for pair, total in found.items()}


def orders_of(costs):
    """All orders of blocks by falling cost."""
    groups = [[block for block, own in enumerate(costs) if own == cost] for cost in sorted(set(costs), reverse=True)]
    return [sum(parts, ()) for parts in product(*(tuple(permutations(group)) for group in groups))]


def expected_joint(name):
    coupling, rates, costs = DESIGNS[name]
    if coupling != "apart":
        return joint_presence(orders_of(costs or (1.0,) * len(rates)), rates)
    # both of two neighbours, unless one is absent, and never both are
    return {(a, a + 1): rates[a] + rates[a + 1] - 1.0 for a in range(len(rates) - 1)}


@pytest.mark.parametrize("steps", [1 << 13, pytest.param(1 << 20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DESIGNS)
def test_rates_are_exact_and_joint_probabilities_those_of_the_design(name, steps):
    coupling, rates, costs = DESIGNS[name]
    coins = coins_of(sampler_for(coupling, rates, costs, seed=3), steps, every=4)  # an order lasts that long
    for block, rate in enumerate(rates):
        assert_binomial(int(coins[:, block].sum()), steps, rate, f"block {block}")
    for (a, b), joint in expected_joint(name).items():
        assert_binomial(int((coins[:, a] & coins[:, b]).sum()), steps, float(joint), f"blocks {a} and {b}")


@pytest.mark.parametrize(("coupling", "costs"), [("systematic", ()), ("balanced", COSTS)])
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_presence_in_different_steps_is_independent_while_an_order_lasts(coupling, costs, lag):
    sampler, pairs = sampler_for(coupling, UNEQUAL, costs, seed=4), 1 << 13
    coins = coins_of(sampler, 4 * pairs).reshape(pairs, 4, -1)
    for (a, p), (b, q) in product(enumerate(UNEQUAL), repeat=2):
        both = int((coins[:, 0, a] & coins[:, lag, b]).sum())
        assert_binomial(both, pairs, p * q, f"block {a}, and {b} so many steps later: {lag}")


def halves(plan):
    """The two sets of blocks that an order makes at rates of 1/2: every second block of it, and the others."""
    coins = tuple(draw.alive for draw in plan.draws)
    return frozenset([coins, tuple(not coin for coin in coins)])


@pytest.mark.parametrize("draw_every", [1, 3])
def test_an_order_lasts_for_four_training_draws(draw_every):
    sampler = sampler_for("systematic", (0.5,) * 16, draw_every=draw_every)
    found = [halves(sampler.plan(step)) for step in range(40 * draw_every)]
    assert [len(set(found[first : first + 4 * draw_every])) for first in range(0, len(found), 4 * draw_every)] == [
        1
    ] * 10
    assert len(set(found)) == 10
    sampled = [halves(sampler.plan(number, stream="sample")) for number in range(40)]
    assert len(set(sampled)) == 40  # few sampled passes are averaged, so each has an order of its own


@pytest.mark.parametrize("coupling", ["systematic", "apart"])
def test_words_of_rows_are_drawn_anew_in_every_step(coupling):
    sampler = sampler_for(coupling, (0.5,) * 3, granularity="row")
    plans = [sampler.plan(step, part=part) for step in range(8) for part in range(2)]
    assert len({draw.key for plan in plans for draw in plan.draws}) == 3 * len(plans)


def test_rates_that_change_under_an_order_are_obeyed():
    sampler, other = (sampler_for("systematic", (0.5,) * 16) for _ in range(2))
    sampler.plan(0)
    sampler.change([Site((0.25,))] * 16)
    other.change([Site((0.25,))] * 16)
    assert sum(draw.alive for draw in sampler.plan(1).draws) == 4
    assert sampler.plan(1) == other.plan(1)


def test_formula_of_equal_rates():
    """Of n or n + 1 of N, each choice as likely as any other (simple random sampling)."""
    found = joint_presence(orders_of((1.0,) * 5), (Fraction(7, 10),) * 5)
    half = (Fraction(3 * 2, 5 * 4) + Fraction(4 * 3, 5 * 4)) / 2  # three and a half blocks
    assert all(joint == half for joint in found.values())


@pytest.mark.parametrize(
    "rates", [UNEQUAL, (0.5,) * 8, (0.3,) * 7, tuple(linear_decay(110, 0.5)), (1.0, 0.0, 0.4, 1.0)]
)
def test_as_many_blocks_are_present_as_their_rates_add_up_to(rates):
    counts = coins_of(sampler_for("systematic", rates), 2000).sum(1)
    mean = sum(map(Fraction, rates))
    assert set(counts) <= {floor(mean), ceil(mean)}
    assert_binomial(int((counts == floor(mean) + 1).sum()), 2000, float(mean - floor(mean)), "rounding up")


@pytest.mark.parametrize("seed", range(5))
def test_work_varies_by_one_block_at_most(seed):
    rng = np.random.default_rng(seed)
    blocks = int(rng.integers(3, 40))
    rates, costs = rng.uniform(0, 1, blocks).tolist(), rng.choice([1.0, 2.5, 4.0, 9.0], blocks).tolist()
    work = coins_of(sampler_for("balanced", rates, costs, seed=seed), 3000) @ costs
    assert work.max() - work.min() <= max(costs) + 1e-9
    assert abs(work.mean() - np.dot(rates, costs)) < 0.05 * max(costs)
    independent = coins_of(sampler_for("independent", rates, seed=seed), 3000) @ costs
    assert independent.max() - independent.min() > max(costs)


def test_one_of_two_neighbours_is_present():
    rates = (0.5, 0.5, 0.9, 0.1, 1.0, 0.0, 1.0, 0.75, 0.4, 0.6)
    coins = coins_of(sampler_for("apart", rates), 4000)
    assert (coins[:, 1:] | coins[:, :-1]).all()
    free = coins_of(sampler_for("independent", rates), 4000)
    assert not (free[:, 1:] | free[:, :-1]).all()


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_rows_have_their_rate_and_what_the_coupling_promises(name, batch_size):
    coupling, rates, costs = DESIGNS[name]
    sampler, steps = sampler_for(coupling, rates, costs, granularity="row", seed=1), 3000
    present = np.array([rows_of(sampler.plan(step), batch_size) for step in range(steps)])  # [steps, blocks, rows]
    for (block, rate), row in product(enumerate(rates), range(batch_size)):
        assert_binomial(int(present[:, block, row].sum()), steps, rate, f"row {row} in block {block}")
    for block, rate in enumerate(rates):
        assert set(present[:, block].sum(1)) <= {floor(rate * batch_size), ceil(rate * batch_size)}
    neighbours = (present[:, 1:] | present[:, :-1]).all()
    depth, work = present.sum(1), np.einsum("sbr,b->sr", present, costs or (1.0,) * len(rates))
    mean = sum(map(Fraction, rates))
    promised = {
        "apart": neighbours,
        "systematic": set(depth.flat) <= {floor(mean), ceil(mean)},
        "balanced": work.max() - work.min() <= max(costs or (1.0,)),
    }
    assert promised[coupling]
    assert not all(promised.values())  # it is this coupling's promise, not any one's


def test_windows_of_two_rows_keep_their_mean():
    """Where a batch norm needs two rows, windows of one would be too few; they are none or two."""
    sites = [Site((0.15,), "row", fewest=2), Site((0.85,), "row", fewest=2)]
    sampler = DepthSampler(sites, coupling="systematic")
    live = [sampler.plan(step).draws[0].rows(8).live for step in range(4000)]
    assert set(live) == {0, 2}
    assert_binomial(live.count(2), 4000, 0.6, "windows of two")


@pytest.mark.parametrize("granularity", ["block", "row"])
@pytest.mark.parametrize("coupling", ["systematic", "balanced"])
def test_ranks_agree_in_their_numbers_and_draw_their_own(coupling, granularity):
    costs = COSTS if coupling == "balanced" else ()
    made = [
        sampler_for(coupling, UNEQUAL, costs, granularity=granularity, scope="per_rank", rank=rank) for rank in range(3)
    ]
    for step in range(50):
        plans = [sampler.plan(step) for sampler in made]
        if granularity == "block":
            present = [[draw.alive for draw in plan.draws] for plan in plans]
        else:
            present = [rows_of(plan, 8).tolist() for plan in plans]
        assert len({int(np.sum(one)) for one in present}) == 1
    assert len({str([sampler.plan(step) for step in range(32)]) for sampler in made}) == 3


def test_plans_are_functions_of_seed_and_step():
    first, other = (sampler_for("systematic", UNEQUAL, seed=5) for _ in range(2))
    plans = [first.plan(step) for step in range(20)]
    assert [other.plan(step) for step in reversed(range(20))] == plans[::-1]
    assert [sampler_for("systematic", UNEQUAL, seed=6).plan(step) for step in range(20)] != plans
    assert first.plan(3, part=1) == plans[3]  # an update's micro-batches share the coins
    rows = sampler_for("systematic", UNEQUAL, granularity="row")
    assert rows.plan(3, part=1) != rows.plan(3)
    assert [first.plan(step, stream="sample") for step in range(20)] != plans


def test_blocks_of_one_kind_are_coupled_with_one_another():
    """Blocks and rows, and what is shared and what is each rank's own, have circles of their own."""
    kinds = [("block", "shared"), ("row", "per_rank"), ("block", "per_rank"), ("row", "shared")]
    sites = [Site((0.5,), *kinds[number % 4]) for number in range(16)] + [Site(())]
    sampler = DepthSampler(sites, coupling="systematic")
    for step in range(200):
        draws = sampler.plan(step).draws
        assert draws[-1] == Draw((), alive=True)
        blocks = [sum(draw.alive for draw in draws[number:16:4]) for number in (0, 2)]
        rows = [rows_of(Plan(draws[number:16:4]), 6).sum(0) for number in (1, 3)]
        assert blocks == [2, 2]
        assert (np.array(rows) == 2).all()


def test_rates_that_move_are_obeyed():
    sampler = sampler_for("systematic", (0.5,) * 8, timing="warmup(100)")
    for step, mean in ((0, 8), (50, 6), (100, 4), (200, 4)):
        assert sum(draw.alive for draw in sampler.plan(step).draws) == mean


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        ([Site((0.5,))], {"coupling": "close"}, "coupling is 'close'; choose"),
        ([Site((0.5,), "unit")], {"coupling": "systematic"}, "draws of granularity 'unit' are independent"),
        ([Site((0.5,), "number")], {"coupling": "apart"}, "draws of granularity 'number' are independent"),
        ([Site((0.5,))], {"coupling": "balanced"}, "give costs="),
        ([Site((0.5,))], {"coupling": "systematic", "costs": (1.0,)}, "has no use for costs"),
        ([Site((0.5,))], {"coupling": "balanced", "costs": (1.0, 2.0)}, "2 costs were given for 1 rules"),
        ([Site((0.5,))] * 2, {"coupling": "balanced", "costs": (1.0, -1.0)}, "cost 2 is -1.0; costs are finite"),
        (
            [Site((0.5,)), Site((0.3,)), Site((0.9,))],
            {"coupling": "apart"},
            r"add up to 1 at least; take 0.833 of every drop 1 - p_l \(the lowest rate is 0.417 then\)",
        ),
        ([Site((0.3,))] * 2, {"coupling": "apart", "timing": "early(100)"}, "add up to 1 at least"),
        ([Site((0.3,))] * 2, {"coupling": "apart", "timing": "points(0:0, 50:1, 100:0.2)"}, "add up to 1 at least"),
    ],
)
def test_bad_input(sites, options, message):
    with pytest.raises(ConfigError, match=message):
        DepthSampler(sites, **options)


@pytest.mark.parametrize("rates", [(0.5, 0.3, 0.9), (0.2, 0.3), (0.0, 0.0), (0.01, 0.98)])
def test_the_share_that_the_error_names_is_feasible(rates):
    with pytest.raises(ConfigError) as caught:
        sampler_for("apart", rates)
    share, lowest = map(float, re.findall(r"take ([0-9.]+) of .* rate is ([0-9.]+) then", str(caught.value))[0])
    lowered = [1.0 - share * (1.0 - rate) for rate in rates]
    assert min(lowered) == pytest.approx(lowest, abs=6e-4)
    assert min(p + q for p, q in pairwise(lowered)) < 1.01  # and hardly more
    sampler_for("apart", lowered)


@pytest.mark.parametrize("granularity", ["block", "row"])
def test_rates_that_add_up_to_one_but_for_rounding_are_apart(granularity):
    for percent in range(1, 100):
        rates = (percent / 100, (100 - percent) / 100, percent / 100)
        plan = sampler_for("apart", rates, granularity=granularity).plan(percent)
        present = rows_of(plan, 4) if granularity == "row" else np.array([[draw.alive] for draw in plan.draws])
        assert (present[1:] | present[:-1]).all()


def test_costs_may_be_an_array():
    sampler = sampler_for("balanced", UNEQUAL, np.array(COSTS))
    assert sampler.costs == COSTS


def test_windows_given_by_hand_have_no_place_on_the_circle():
    with pytest.raises(PlanError, match="no key for rows"):
        Draw((0.5,)).rows(4)
    assert Draw((0.5,), key=1).rows(8).live == 4
