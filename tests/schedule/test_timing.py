"""Rates over time: exact at every corner of every kind, in steps and in shares of a training."""

import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from residrop.common.errors import ConfigError
from residrop.schedule import timing
from residrop.schedule.survival import linear_decay
from residrop.schedule.timing import (
    Schedule,
    Timing,
    constant,
    early,
    exponential,
    late,
    parse,
    plateau,
    points,
    progressive,
    warmup,
)

SHARES = st.floats(0.0, 1.0)
STEPS = st.integers(0, 10**6)
CURVES = st.lists(st.tuples(STEPS, SHARES), min_size=1, max_size=6).map(lambda pairs: points(*sorted(pairs)))
TIMINGS = st.one_of(
    st.builds(constant),
    st.builds(warmup, STEPS),
    st.builds(early, STEPS, STEPS),
    st.builds(late, STEPS),
    st.builds(plateau, STEPS, STEPS),
    st.builds(progressive, st.floats(1e-9, 10.0), st.one_of(st.none(), STEPS)),
    st.builds(exponential, STEPS),
    CURVES,
)


def course(timing, first, last):
    """s at the steps from `first` to `last`, both included."""
    return [timing.share(step) for step in range(first, last + 1)]


# Every corner, and the steps next to it


@pytest.mark.parametrize(
    ("made", "written", "first", "expected"),
    [
        (constant(), "constant", 0, [1, 1, 1]),
        (warmup(0), "warmup(0)", 0, [1, 1]),
        (warmup(1), "warmup(1)", 0, [0, 1, 1]),
        (warmup(2), "warmup(2)", 0, [0, 0.5, 1, 1]),
        (warmup(4), "warmup(4)", 0, [0, 0.25, 0.5, 0.75, 1, 1]),
        (warmup(1000), "warmup(1000)", 998, [0.998, 0.999, 1, 1]),
        (early(0), "early(0)", 0, [0, 0]),
        (early(1), "early(1)", 0, [1, 0, 0]),
        (early(5), "early(5)", 3, [1, 1, 0, 0]),
        (early(5, 0), "early(5, 0)", 3, [1, 1, 0, 0]),
        (early(5, 1), "early(5, 1)", 3, [1, 1, 1, 0, 0]),
        (early(5, 4), "early(5, 4)", 4, [1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (early(0, 4), "early(0, 4)", 0, [1, 0.75, 0.5, 0.25, 0, 0]),
        (late(0), "late(0)", 0, [1, 1]),
        (late(1), "late(1)", 0, [0, 1, 1]),
        (late(5), "late(5)", 3, [0, 0, 1, 1]),
        (plateau(0, 0), "plateau(0, 0)", 0, [0, 0]),
        (plateau(3, 0), "plateau(3, 0)", 1, [1, 1, 0, 0]),
        (plateau(3, 1), "plateau(3, 1)", 2, [1, 1, 0, 0]),
        (plateau(3, 2), "plateau(3, 2)", 2, [1, 1, 0.5, 0, 0]),
        (plateau(100, 4), "plateau(100, 4)", 99, [1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (exponential(0), "exponential(0)", 0, [1, 1]),
        (exponential(1), "exponential(1)", 0, [0, 1, 1]),
        (exponential(2), "exponential(2)", 0, [0, 2**0.5 - 1, 1, 1]),
        (points((0, 0.5)), "points(0:0.5)", 0, [0.5, 0.5]),
        (points((3, 0.5)), "points(3:0.5)", 0, [0.5] * 5),
        (points((2, 0), (4, 1)), "points(2:0, 4:1)", 0, [0, 0, 0, 0.5, 1, 1]),
        (points((1, 0), (2, 1), (4, 0.5)), "points(1:0, 2:1, 4:0.5)", 0, [0, 0, 1, 0.75, 0.5, 0.5]),
        (points((2, 1), (2, 0.25), (4, 0.75)), "points(2:1, 2:0.25, 4:0.75)", 0, [1, 1, 0.25, 0.5, 0.75, 0.75]),
        (points((0, 0), (1, 1), (9, 1), (10, 0)), "points(0:0,1:1,9:1,10:0)", 0, [0, *[1] * 9, 0, 0]),
    ],
    ids=str,
)
def test_corners(made, written, first, expected):
    """Exact: a step earlier or later is a different law."""
    assert course(made, first, first + len(expected) - 1) == expected
    assert parse(written) == made
    assert made.share(10**15) == made.final == expected[-1]
    assert made.share(-1) == made.share(0)
    assert all(type(share) is float for share in course(made, first, first + 1))


def test_plateau_and_early_are_one_curve():
    assert plateau(7, 3) == early(7, 3)
    assert plateau(7, 0) == early(7)
    assert early(7) != late(7)


@given(st.integers(1, 10**9))
def test_warmup_is_the_quotient(steps):
    """t / w to the last bit: recorded runs depend on it."""
    for step in {0, 1, steps // 3, steps // 2, steps - 1}:
        assert warmup(steps).share(step) == step / steps
    assert warmup(steps).share(steps) == warmup(steps).share(steps + 1) == 1.0


# Progressive layer drop


@pytest.mark.parametrize("theta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("gamma", [0.001, 0.3])
def test_progressive_is_the_papers_law(theta, gamma):
    """keep(t) = (1 - theta) exp(-gamma t) + theta for the last layer, 1 - l/L (1 - keep) for layer l."""
    depth = 12
    schedule = Schedule(linear_decay(depth, theta), progressive(gamma))
    for step in (0, 1, 2, 10, 1000, 100_000):
        keep = (1 - theta) * math.exp(-gamma * step) + theta
        rates = schedule.at(step)
        assert rates[-1] == pytest.approx(keep, abs=1e-15)
        assert rates == pytest.approx([1 - layer / depth * (1 - keep) for layer in range(1, depth + 1)], abs=1e-14)
    assert schedule.at(0) == (1.0,) * depth


def test_progressive_at_its_corners():
    free, held = progressive(0.5), progressive(0.5, 3)
    law = [1 - math.exp(-0.5 * step) for step in range(7)]
    assert course(free, 0, 6) == pytest.approx(law, abs=1e-15)
    assert course(held, 0, 6) == pytest.approx([*law[:4], *law[3:4] * 3], abs=1e-15)
    assert held.share(3) == held.share(4) == held.final
    assert held.share(2) < held.share(3) == free.share(3)
    assert free.share(0) == free.share(-5) == 0.0
    assert (free.final, free.share(10**6)) == (1.0, 1.0)
    assert progressive(2.0, 0).share(0) == progressive(2.0, 0).final == 0.0
    assert progressive(1e-12).share(1) == pytest.approx(
        1e-12, rel=1e-9, abs=0
    )  # 1 - exp(-1e-12) would lose four digits


def test_exponential_is_layer_skips_curriculum():
    """S(t) = e^(t ln 2 / (T - 1)) - 1 over the steps t = 0..T-1."""
    training = 1000
    law = [math.exp(step * math.log(2) / (training - 1)) - 1 for step in range(training)]
    assert course(exponential(training - 1), 0, training - 1) == pytest.approx(law, abs=1e-14)


# Properties


@given(TIMINGS, STEPS)
def test_shares_lie_between_0_and_1(made, step):
    corners = [corner + near for corner, _ in made.points for near in (-1, 0, 1)]
    assert all(0.0 <= made.share(one) <= 1.0 for one in (step, *corners))
    assert 0.0 <= made.final <= 1.0


@given(CURVES, STEPS)
def test_points_interpolate(made, step):
    """Between neighbours the line, at a point the last of those there, exact."""
    for place, (corner, share) in enumerate(made.points):
        last = place + 1 == len(made.points) or made.points[place + 1][0] > corner
        assert made.share(corner) == share or not last
    low, high = [p for p in made.points if p[0] <= step], [p for p in made.points if p[0] > step]
    assume(low and high)
    (start, a), (end, b) = low[-1], high[0]
    assert made.share(step) == pytest.approx(a + (b - a) * (step - start) / (end - start), abs=1e-12)
    assert min(a, b) - 1e-15 <= made.share(step) <= max(a, b) + 1e-15


@given(TIMINGS, STEPS)
def test_string_reads_back(made, step):
    again = parse(str(made))
    assert again == made
    assert hash(again) == hash(made)
    assert again.share(step) == made.share(step)


@pytest.mark.parametrize("made", [warmup(30), late(30), progressive(0.1, 30), exponential(30)], ids=str)
def test_rising_kinds_rise_and_falling_kinds_fall(made):
    rising = course(made, 0, 40)
    assert all(a <= b for a, b in pairwise(rising))
    assert rising[0] < rising[-1]
    falling = course(early(10, 20), 0, 40)
    assert all(a >= b for a, b in pairwise(falling))


# Refusals


@pytest.mark.parametrize("steps", [-1, 1.5, 3.0, True, "3", None, math.nan])
@pytest.mark.parametrize(
    "call",
    [
        warmup,
        early,
        late,
        lambda steps: early(5, steps),
        lambda steps: plateau(steps, 5),
        lambda steps: plateau(5, steps),
        lambda steps: progressive(0.5, steps) if steps is not None else progressive(0.5, "x"),
        exponential,
        lambda steps: points((steps, 0.5)),
    ],
)
def test_steps_are_whole(call, steps):
    with pytest.raises(ConfigError, match=r"is .*; give a whole number of at least 0"):
        call(steps)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, math.inf, True, "1", None])
def test_shares_are_refused(share):
    with pytest.raises(ConfigError, match=r"the share at step 4 is .*; give a number from 0 \(full depth\) to 1"):
        points((0, 0.0), (4, share))


@pytest.mark.parametrize("gamma", [0, 0.0, -1.0, math.nan, math.inf, True, "1", None])
def test_gamma_is_refused(gamma):
    with pytest.raises(ConfigError, match=r"gamma is .*; give a finite number > 0"):
        progressive(gamma)


def test_falling_steps_and_empty_curves_are_refused():
    with pytest.raises(ConfigError, match="step 3 of the timing comes after step 4; give steps in rising order"):
        points((4, 0.0), (3, 1.0))
    with pytest.raises(ConfigError, match="the timing has no points"):
        points()
    with pytest.raises(ConfigError, match="a gamma and 2 points"):
        Timing(((0, 0.0), (1, 1.0)), gamma=0.5)
    with pytest.raises(ConfigError, match="gamma is -1"):
        Timing((), gamma=-1.0)
    wrong = [{"points": ((1, 0.0), (4, 1.0))}, {"points": ((0, 0.0), (4, 0.5))}, {}, {"points": (), "gamma": 1.0}]
    for fields in wrong:
        with pytest.raises(ConfigError, match=r"an exponential timing has the points \(0, 0\) and \(steps, 1\)"):
            Timing(**fields, exponential=True)


def test_timing_and_schedule_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        constant().gamma = 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule((0.5,)).timing = constant()


# Strings


@pytest.mark.parametrize(
    ("spec", "made"),
    [
        (" constant ", constant()),
        ("constant()", constant()),
        (" warmup ( 10 ) ", warmup(10)),
        ("warmup(1e3)", warmup(1000)),
        ("warmup(10.0)", warmup(10)),
        ("warmup(123456789012345678901)", warmup(123456789012345678901)),
        ("plateau(10,5)", plateau(10, 5)),
        ("progressive(0.001)", progressive(0.001)),
        ("progressive(1e-3, 500)", progressive(0.001, 500)),
        ("exponential(500)", exponential(500)),
        ("points( 0 : 0.5 ,10: 1 )", points((0, 0.5), (10, 1.0))),
        (early(3), early(3)),
    ],
    ids=str,
)
def test_parse_reads_steps(spec, made):
    assert parse(spec) == made


@pytest.mark.parametrize(
    "spec",
    ["", "half", "0.5", "warmup", "warmup()", "warmup(x)", "warmup(1, 2)", "warmup(1", "warmup(1) more", "warm-up(1)",
     "constant(1)", "early(1, 2, 3)", "late(1, 2)", "plateau(1)", "progressive()", "progressive(1, 2, 3)", "points()",
     "exponential()", "exponential(1, 2)",
     "points(1)", "points(1:2:3)", "points(0:0, 1)", "warmup(1:2)", "warmup(1,)", 4, None, 0.5, True,
     ["warmup(1)"]],
)  # fmt: skip
@pytest.mark.parametrize("training", [None, 100])
def test_parse_refuses_what_it_cannot_read(spec, training):
    with pytest.raises(ConfigError, match=r"survival timing .* is not understood; give constant, warmup\(steps\), "):
        parse(spec, training)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("warmup(0.1)", r"'warmup\(0\.1\)' has the time 0\.1; times are whole steps of at least 0 here"),
        ("early(-1)", "has the time -1"),
        ("early(4, 0.5)", r"has the time 0\.5"),
        ("early(5, -1)", "has the time -1"),
        ("late(nan)", "has the time nan"),
        ("late(inf)", "has the time inf"),
        ("plateau(1.5, 1.5)", r"has the time 1\.5"),
        ("points(0.5:1)", r"has the time 0\.5"),
        ("points(5:0, 4:1)", "goes back in time"),
        ("points(5:2)", "the share at step 5 is 2"),
        ("points(5:nan)", "the share at step 5 is nan"),
        ("progressive(0)", "gamma is 0"),
        ("progressive(0.1, 1.5)", r"has the time 1\.5"),
    ],
)
def test_parse_refuses_steps(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse(spec)


# Shares of a training


@pytest.mark.parametrize(
    ("spec", "made"),
    [
        ("constant", constant()),
        ("warmup(0.1)", warmup(20)),
        ("warmup(0)", warmup(0)),
        ("warmup(1)", warmup(200)),
        ("early(0.5)", early(100)),
        ("early(0.5, 0.25)", early(100, 50)),
        ("late(0.75)", late(150)),
        ("plateau(0.7, 0.1)", plateau(140, 20)),
        ("plateau(0.9, 0.1)", plateau(180, 20)),
        ("exponential(0.5)", exponential(100)),
        ("points(0:0, 0.1:1, 1:0.5)", points((0, 0.0), (20, 1.0), (200, 0.5))),
    ],
)
def test_parse_reads_shares(spec, made):
    assert parse(spec, training=200) == made


def test_ends_of_phases_are_rounded_once():
    """Not the lengths, whose roundings would add up: 0.25 + 0.25 of 6 steps end at step 3, not at 2 + 2."""
    assert parse("plateau(0.25, 0.25)", training=6) == plateau(2, 1)
    assert parse("warmup(0.7)", training=12) == warmup(round(0.7 * 12)) == warmup(8)
    for training in range(1, 60):
        for hold, fade in ((0.1, 0.9), (0.35, 0.65), (0.7, 0.3), (1 / 3, 1 / 3)):
            made = parse(f"early({hold!r}, {fade!r})", training)
            assert [corner for corner, _ in made.points] == [round(hold * training), round((hold + fade) * training)]


@given(st.integers(1, 10**6), st.floats(1e-3, 50.0))
def test_progressive_gamma_is_per_training(steps, gamma):
    made = parse(f"progressive({gamma!r})", training=steps)
    assert made.final == made.share(steps) == made.share(steps + 1) == pytest.approx(1 - math.exp(-gamma))
    assert made.share(0) == 0.0
    half = steps // 2
    assert made.share(half) == pytest.approx(1 - math.exp(-gamma * half / steps))
    assert made.share(steps - 1) <= made.share(steps)
    assert parse(f"progressive({gamma!r}, 0.5)", steps).final == pytest.approx(1 - math.exp(-gamma / 2))


@pytest.mark.parametrize(
    "spec",
    ["constant", "warmup(0.3)", "early(0.5)", "early(0.5, 0.1)", "late(0.5)", "plateau(0.5, 0.1)", "progressive(3)",
     "progressive(3, 0.5)", "exponential(1)", "points(0:1, 0.5:0.25)"],
)  # fmt: skip
def test_training_of_no_steps_is_over(spec):
    ended = parse(spec, training=0)
    assert course(ended, 0, 3) == [parse(spec, training=1000).final] * 4
    assert ended.final == ended.share(0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("warmup(100)", r"'warmup\(100\)' reaches the time 100; times are shares of the training .* \[0, 1\]"),
        ("warmup(1.1)", r"reaches the time 1\.1"),
        ("early(-0.1)", r"reaches the time -0\.1"),
        ("early(0.9, 0.2)", r"reaches the time 1\.1"),
        ("early(0.5, -0.2)", r"reaches the time -0\.2"),
        ("late(nan)", "reaches the time nan"),
        ("points(0:0, 2:1)", "reaches the time 2"),
        ("points(0.4:1, 0.3:0)", "goes back in time"),
        ("progressive(-3)", "gamma is -3"),
        ("progressive(3, 7)", "reaches the time 7"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("training", [0, 1, 10, 1000])
def test_parse_refuses_shares(spec, message, training):
    with pytest.raises(ConfigError, match=message):
        parse(spec, training)


@pytest.mark.parametrize("training", [-1, 1.5, True, "10"])
def test_training_is_a_whole_number(training):
    with pytest.raises(ConfigError, match=r"training .* is .*; give a whole number of at least 0"):
        parse("warmup(0.5)", training)


# Schedules over depth and time


@given(st.lists(SHARES, max_size=8), TIMINGS, STEPS)
def test_rates_are_the_share_of_every_drop(rates, made, step):
    schedule = Schedule(tuple(rates), made)
    share = made.share(step)
    now = schedule.at(step)
    assert now == schedule.under(share)
    assert now == pytest.approx([1 - share * (1 - rate) for rate in rates], abs=1e-15)
    assert all(rate - 1e-15 <= one <= 1.0 for rate, one in zip(rates, now, strict=True))
    assert schedule.under(1.0) == tuple(rates)
    assert schedule.under(0.0) == (1.0,) * len(rates)


def test_warmup_off_by_one_at_both_ends():
    schedule = Schedule((0.5, 0.0, 1.0), warmup(4))
    assert schedule.at(0) == (1.0, 1.0, 1.0)
    assert schedule.at(1) == (0.875, 0.75, 1.0)  # a step earlier or later is a different law
    assert schedule.at(2) == (0.75, 0.5, 1.0)
    assert schedule.at(3) == (0.625, 0.25, 1.0)
    assert schedule.at(4) == (0.5, 0.0, 1.0)
    assert schedule.at(10**9) == (0.5, 0.0, 1.0)


@given(st.lists(SHARES, min_size=1, max_size=8), st.integers(1, 60))
def test_warmup_starts_at_one_ends_exact_falls(rates, steps):
    schedule = Schedule(tuple(rates), warmup(steps))
    course = [schedule.at(step) for step in range(steps + 3)]
    assert course[0] == (1.0,) * len(rates)
    assert course[steps] == course[steps + 1] == course[steps + 2] == tuple(rates)
    for before, after in pairwise(course):
        assert all(rate <= a <= b <= 1.0 for a, b, rate in zip(after, before, rates, strict=True))


def test_schedule_defaults_and_strings():
    assert Schedule((0.3, 0.7)).at(0) == (0.3, 0.7)
    assert Schedule(()).at(0) == ()
    assert Schedule((0.3,), "warmup(2)") == Schedule((0.3,), warmup(2))
    assert [Schedule((0.3,), plateau(1, 2)).at(step)[0] for step in range(5)] == pytest.approx([0.3, 0.3, 0.65, 1, 1])
    with pytest.raises(ConfigError, match="survival timing 4 is not understood"):
        Schedule((0.3,), 4)


def test_public_names_exist():
    assert all(hasattr(timing, name) for name in timing.__all__)
