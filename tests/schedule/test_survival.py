"""Survival rates: the papers' numbers, exact ends, and refusals."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import residrop.schedule.survival as survival
from residrop.common.checks import check_rate
from residrop.common.errors import ConfigError, UsageError
from residrop.schedule.survival import (
    blocks,
    expected_depth,
    explicit,
    exponential,
    linear,
    linear_decay,
    parse,
    uniform,
)
from residrop.schedule.timing import Schedule

RATES = st.floats(0.0, 1.0)
DEPTHS = st.integers(1, 200)


# The schedules, written out


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        (uniform(1, 0.5), (0.5,)),
        (uniform(2, 0.5), (0.5, 0.5)),
        (uniform(3, 0.25), (0.25, 0.25, 0.25)),
        (linear_decay(1, 0.5), (0.5,)),
        (linear_decay(2, 0.5), (Fraction(3, 4), 0.5)),
        (linear_decay(3, 0.5), (Fraction(5, 6), Fraction(2, 3), 0.5)),
        (linear_decay(3, 0.0), (Fraction(2, 3), Fraction(1, 3), 0.0)),
        (linear_decay(2, 1.0), (1.0, 1.0)),
        (linear(1, 1.0, 0.5), (0.5,)),
        (linear(2, 1.0, 0.5), (1.0, 0.5)),
        (linear(3, 1.0, 0.5), (1.0, 0.75, 0.5)),
        (linear(3, 0.2, 0.8), (0.2, 0.5, 0.8)),
        (exponential(1, 0.5), (0.5,)),
        (exponential(2, 0.5), (1.0, 0.5)),
        (exponential(3, 0.5), (1.0, 0.5 * (3 - math.sqrt(2)), 0.5)),
        (exponential(5, 0.0), (1.0, 2 - 2**0.25, 2 - 2**0.5, 2 - 2**0.75, 0.0)),
        (exponential(3, 1.0), (1.0, 1.0, 1.0)),
        (explicit(3, [1, 0.5, 0]), (1.0, 0.5, 0.0)),
    ],
)
def test_schedule_fractions(rates, expected):
    assert rates == pytest.approx(tuple(map(float, expected)), abs=1e-15)
    assert all(type(rate) is float for rate in rates)


def test_linear_decay_default_is_paper():
    assert linear_decay(54) == linear_decay(54, 0.5)
    assert linear(9) == linear(9, 1.0, 0.5)
    assert exponential(9) == exponential(9, 0.5)


# Constants of the papers


@pytest.mark.parametrize(("depth", "last", "total"), [(54, 0.5, 40.25), (75, 0.5, 56.0), (600, 0.5, 449.75)])
def test_linear_decay_expected_depth_huang(depth, last, total):
    assert expected_depth(linear_decay(depth, last)) == pytest.approx(total, abs=1e-10)


@pytest.mark.parametrize(("depth", "last", "total"), [(50, 0.5, 37.25), (54, 0.2, 32.0)])
def test_linear_decay_expected_depth_other(depth, last, total):
    assert expected_depth(linear_decay(depth, last)) == pytest.approx(total, abs=1e-10)


def test_linear_decay_huang_54():
    rates = linear_decay(54, 0.5)
    assert rates[0] == pytest.approx(0.990741, abs=5e-7)
    assert rates[26] == 0.75
    assert rates[53] == 0.5
    assert 1 - expected_depth(linear_decay(54, 0.2)) / 54 == pytest.approx(0.4074, abs=5e-5)


@pytest.mark.parametrize(
    ("last", "budget"), [(0.01818, 0.5), (0.21455, 0.6), (0.41091, 0.7), (0.60727, 0.8), (0.80364, 0.9)]
)
def test_linear_decay_budget_54(last, budget):
    assert expected_depth(linear_decay(54, last)) / 54 == pytest.approx(budget, abs=5e-6)


def test_linear_decay_smallest_budget_54():
    assert expected_depth(linear_decay(54, 0.0)) / 54 == pytest.approx(0.490741, abs=5e-7)


def test_linear_decay_nine_blocks_table():
    table = (0.9444, 0.8889, 0.8333, 0.7778, 0.7222, 0.6667, 0.6111, 0.5556, 0.5)
    assert linear_decay(9, 0.5) == pytest.approx(table, abs=5e-5)


def test_linear_swapout_nine_blocks_exact():
    assert linear(9, 1, 0.5) == (1, 0.9375, 0.875, 0.8125, 0.75, 0.6875, 0.625, 0.5625, 0.5)


def test_linear_swapout_fifteen_blocks():
    rates = linear(15, 1, 0.8)
    assert (rates[0], rates[-1]) == (1.0, 0.8)
    assert expected_depth(rates) / 15 == pytest.approx(0.9, abs=1e-14)


def test_exponential_layer_skip_as_the_paper_writes_it():
    """D(l) = exp(l ln 2 / (L - 1)) - 1 for l = 0..L-1, times p_max; here of a 32-layer model with p_max = 0.2."""
    drops = [0.2 * (math.exp(layer * math.log(2) / 31) - 1) for layer in range(32)]
    assert exponential(32, 0.8) == pytest.approx([1 - drop for drop in drops], abs=1e-15)


@pytest.mark.parametrize("depth", [1, 2, 3, 54])
@pytest.mark.parametrize("last", [0.0, 1e-300, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    ("schedule", "first"),
    [
        (uniform, lambda depth, last: last),
        (linear_decay, lambda depth, last: last + (1 - last) * (depth - 1) / depth),
        (lambda depth, last: linear(depth, 1.0, last), lambda depth, last: 1.0 if depth > 1 else last),
        (exponential, lambda depth, last: 1.0 if depth > 1 else last),
    ],
    ids=["uniform", "linear_decay", "linear", "exponential"],
)
def test_both_ends_of_every_schedule_are_exact(schedule, first, depth, last):
    rates = schedule(depth, last)
    assert (len(rates), rates[0], rates[-1]) == (depth, first(depth, last), last)


# Properties


@given(DEPTHS, RATES)
def test_uniform_is_constant(depth, rate):
    assert uniform(depth, rate) == (rate,) * depth


@given(DEPTHS, RATES)
def test_linear_decay_falls_to_exactly_last(depth, last):
    rates = linear_decay(depth, last)
    assert len(rates) == depth
    assert rates[-1] == last
    assert all(0.0 <= rate <= 1.0 for rate in rates)
    assert all(a >= b for a, b in pairwise(rates))
    assert rates[0] == pytest.approx(1 - (1 - last) / depth, abs=1e-12)
    assert math.fsum(rates) == pytest.approx(depth - (1 - last) * (depth + 1) / 2, abs=1e-9)


@given(DEPTHS, RATES)
def test_exponential_falls_ever_faster_to_exactly_last(depth, last):
    rates = exponential(depth, last)
    assert len(rates) == depth
    assert rates[-1] == last
    assert rates[0] == (1.0 if depth > 1 else last)
    assert all(0.0 <= b <= a <= 1.0 for a, b in pairwise(rates))
    falls = [a - b for a, b in pairwise(rates)]
    assert all(b >= a - 1e-15 for a, b in pairwise(falls))


@given(st.integers(2, 200), RATES, RATES)
def test_linear_ends_exact(depth, first, last):
    rates = linear(depth, first, last)
    assert len(rates) == depth
    assert rates[0] == first
    assert rates[-1] == last


@given(DEPTHS, RATES, RATES)
def test_linear_stays_between_ends(depth, first, last):
    rates = linear(depth, first, last)
    low, high = min(first, last), max(first, last)
    slack = 1e-15
    assert all(0.0 <= rate <= 1.0 for rate in rates)
    assert all(low - slack <= rate <= high + slack for rate in rates)
    sign = 1 if first >= last else -1
    assert all(sign * (a - b) >= -slack for a, b in pairwise(rates))


@given(st.integers(2, 200), RATES, RATES)
def test_linear_mean_is_middle(depth, first, last):
    assert expected_depth(linear(depth, first, last)) / depth == pytest.approx((first + last) / 2, abs=1e-12)


@given(st.lists(RATES, min_size=1, max_size=50))
def test_explicit_and_expected_depth(rates):
    assert explicit(len(rates), rates) == tuple(rates)
    assert expected_depth(rates) == pytest.approx(math.fsum(rates))


# Refusals

BAD_RATES = [
    (float("nan"), "is nan"),
    (float("inf"), "is inf"),
    (float("-inf"), "is -inf"),
    (-0.1, "is -0.1"),
    (1.1, "is 1.1"),
    (2, "is 2"),
    (True, "is True; give a number"),
    (False, "is False; give a number"),
    ("0.5", "is '0.5'; give a number"),
    (np.float32(1.5), r"is .*1\.5"),
    (np.float64("nan"), "is .*nan"),
    (np.bool_(True), "is .*True.*; give a number"),
    (np.array([0.5]), "is array.*; give a number"),
    (10**400, "is 1000"),
    (None, "is None; give a number"),
    (0.5j, "is 0.5j; give a number"),
]


@pytest.mark.parametrize(("rate", "message"), BAD_RATES)
def test_check_rate_refuses(rate, message):
    with pytest.raises(ConfigError, match=rf"survival {message}"):
        check_rate("survival", rate)


@pytest.mark.parametrize(
    "rate",
    [1, 0.5, Fraction(1, 2), np.float16(0.5), np.float32(0.5), np.float64(0.5), np.int64(1), np.uint8(0)],
    ids=repr,
)
def test_check_rate_takes_any_real_number(rate):
    assert check_rate("survival", rate) == rate
    assert type(check_rate("survival", rate)) is float
    assert parse(rate, 3) == uniform(3, float(rate))
    assert parse(np.array([rate, 0.25]), 2) == (float(rate), 0.25)
    assert all(type(found) is float for found in (*parse(rate, 2), *linear(3, rate, 0.5)))


@pytest.mark.parametrize(("rate", "message"), BAD_RATES)
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda rate: uniform(3, rate), "rate"),
        (lambda rate: linear_decay(3, rate), "last"),
        (lambda rate: linear(3, rate, 0.5), "first"),
        (lambda rate: linear(3, 1.0, rate), "last"),
        (lambda rate: linear(1, rate, 0.5), "first"),
        (lambda rate: exponential(3, rate), "last"),
        (lambda rate: explicit(3, [1.0, rate, 0.5]), "survival rate of block 2"),
        (lambda rate: expected_depth([rate]), "survival rate of block 1"),
        (lambda rate: Schedule((0.5, rate)), "rate 2"),
    ],
)
def test_schedules_refuse_rates(call, name, rate, message):
    with pytest.raises(ConfigError, match=f"{name} {message}"):
        call(rate)


@pytest.mark.parametrize("depth", [0, -1, 2.0, True, "3", None, float("nan")])
@pytest.mark.parametrize("function", [uniform, blocks, linear_decay, linear, exponential])
def test_schedules_refuse_depth(function, depth):
    with pytest.raises(ConfigError, match=r"depth .*is .*; give"):
        function(depth, 0.5)


@pytest.mark.parametrize("rates", [[], [0.5], [0.5] * 3])
def test_explicit_refuses_length(rates):
    with pytest.raises(ConfigError, match=rf"{len(rates)} survival rates were given for 2 residual blocks"):
        explicit(2, rates)


def test_expected_depth_refuses_empty():
    with pytest.raises(ConfigError, match="depth"):
        expected_depth([])


def test_refusals_are_value_errors():
    assert issubclass(ConfigError, UsageError)
    assert issubclass(UsageError, ValueError)


# parse


@pytest.mark.parametrize(
    ("spec", "rates"),
    [
        (0.8, uniform(3, 0.8)),
        (1, uniform(3, 1.0)),
        (0, uniform(3, 0.0)),
        ("0.8", uniform(3, 0.8)),
        (" 1 ", uniform(3, 1.0)),
        ("1,0.9,0.8", (1.0, 0.9, 0.8)),
        ("1, 0.9 ,0.8", (1.0, 0.9, 0.8)),
        ([1, 0.9, 0.8], (1.0, 0.9, 0.8)),
        ((1, 0.9, 0.8), (1.0, 0.9, 0.8)),
        ("uniform(0.5)", uniform(3, 0.5)),
        ("linear_decay(0.2)", linear_decay(3, 0.2)),
        ("linear(1, 0.5)", linear(3, 1, 0.5)),
        (" linear ( 1 , 0.5 ) ", linear(3, 1, 0.5)),
        ("exponential(0.5)", exponential(3, 0.5)),
        ("blocks(2)", (2 / 3,) * 3),
        ("blocks(0)", (0.0,) * 3),
        ("blocks(3)", (1.0,) * 3),
        ("linear(0.5,1)", linear(3, 0.5, 1)),
    ],
)
def test_parse_reads(spec, rates):
    assert parse(spec, 3) == rates


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "not understood"),
        ("half", "'half' is not understood; give a rate such as 0.8"),
        ("linear", "not understood"),
        ("linear()", "not understood"),
        ("linear(1, x)", "not understood"),
        ("linear(1, 0.5", "not understood"),
        ("linear(1, 0.5) extra", "not understood"),
        ("cosine(0.5)", r"schedule 'cosine' is unknown; give .*linear_decay\(0.5\)"),
        ("uniform(0.5, 0.6)", r"has 2 numbers; uniform takes 1, as in uniform\(0.5\)"),
        ("linear_decay(1, 0.5)", "has 2 numbers; linear_decay takes 1"),
        ("linear(0.5)", r"has 1 numbers; linear takes 2, as in linear\(1, 0.5\)"),
        ("linear(1, 0.5, 3)", "has 3 numbers"),
        ("exponential(1, 0.5)", r"has 2 numbers; exponential takes 1, as in exponential\(0.5\)"),
        ("blocks(4)", "4 of 3 residual blocks cannot be present; give a number from 0 to 3"),
        ("blocks(-1)", "-1 of 3 residual blocks"),
        ("blocks(nan)", "nan of 3 residual blocks"),
        ("uniform(1.5)", "rate is 1.5"),
        ("linear(1.5, 0.5)", "first is 1.5"),
        ("linear_decay(-0.5)", "last is -0.5"),
        ("nan", "rate is nan"),
        ("inf", "rate is inf"),
        ("1,0.5", "2 survival rates were given for 3"),
        ("1,2,1", "block 2 is 2"),
        ("1,,1", "not understood"),
        (True, "rate is True"),
        (1.5, "rate is 1.5"),
        ([0.5], "1 survival rates were given for 3"),
        ([1, "a", 0], "block 2 is 'a'"),
        ([], "0 survival rates"),
    ],
)
def test_parse_refuses(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse(spec, 3)


@pytest.mark.parametrize("spec", [None, object()])
def test_parse_refuses_other_types(spec):
    """The docstring: raises ConfigError on anything else."""
    with pytest.raises(ConfigError, match="survival"):
        parse(spec, 3)


@given(DEPTHS, RATES, RATES)
def test_parse_inverts_repr(depth, first, last):
    assert parse(f"linear({first!r}, {last!r})", depth) == linear(depth, first, last)
    assert parse(f"linear_decay({last!r})", depth) == linear_decay(depth, last)
    assert parse(f"exponential({last!r})", depth) == exponential(depth, last)
    assert parse(repr(first), depth) == uniform(depth, first)


def test_public_names_exist():
    assert all(hasattr(survival, name) for name in survival.__all__)
