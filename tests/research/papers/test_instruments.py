"""Instruments against arithmetic, and timings on networks of a millisecond."""

import math

import pytest

from residrop.blocks.attach import depth_of, rules_of, using
from residrop.common.errors import ConfigError
from residrop.research.papers import INSTRUMENTS, PAPERS, Curve, Row, all_rows, find_row
from residrop.research.papers.instruments import _CURVES, _ROWS, measure, trace
from residrop.research.papers.timings import SHAPES, Bench, Steps, time_updates

TINY = {
    "network": "resnet-8",
    "baseline": "resnet-8",
    "rule": "stochastic-depth",
    "survival": "uniform(0.5)",
    "data": "digits",
    "batch_size": 4,
    "updates": 60_000,
}
STEPS = Steps([1.0, 3.0], [2.0, 2.0], [4.0, 6.0], [2.0, 4.0], [4.0, 4.0], [8.0, 8.0])


def row(metric, instrument, **setting):
    return Row(key="k", label="l", metric=metric, published=1.0, instrument=instrument, setting=setting)


def curve(instrument, **setting):
    return Curve(label="l", plotted="instrument", instrument=instrument, setting=setting)


def test_every_row_and_curve_has_its_instrument():
    rows = {one.instrument for _, one in all_rows() if one.instrument}
    curves = {one.instrument for p in PAPERS.values() for f in p.figures for one in f.curves if one.instrument}
    assert rows <= set(_ROWS)
    assert curves <= set(_CURVES)
    assert set(_ROWS) | set(_CURVES) == set(INSTRUMENTS)
    assert {one.setting["data"] for _, one in all_rows() if (one.instrument or "").startswith("timing")} <= set(SHAPES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stochastic-depth/section-3/blocks", (3 * 54 - 1) / 4),
        ("stochastic-depth/section-3/saved-0.5", 100 * (1 - 40.25 / 54)),
        ("stochastic-depth/section-3/saved-0.2", 100 * 0.8 * 55 / 108),
        ("depth-dropout/section-3/unit-0.5", 100 * (1 - 10 / 18)),
        ("depth-dropout/section-4/saved-0.25", 100 * (1 - (3 + 24 * (0.75 + 1 / 9)) / 27)),
        ("depth-dropout/section-4/saved-0.5", 100 * (1 - (3 + 24 * (0.5 + 1 / 9)) / 27)),
        ("depth-dropout/section-4/saved-0.75", 100 * (1 - (3 + 24 * (0.25 + 1 / 9)) / 27)),
    ],
)
def test_counts(name, value):
    reading = measure(find_row(name)[1], 0, Bench())
    assert reading.value == pytest.approx(value, abs=1e-9)
    assert reading.error is None


def test_growth_meets_proposition_1():
    _, wanted = find_row("sd-regularization/table-1/uniform-20")
    reading = measure(wanted, 0, Bench())
    assert abs(reading.value - 1.7) < 0.02
    assert 0.0 < reading.error < 0.01
    assert measure(wanted, 0, Bench()) == reading
    assert measure(wanted, 1, Bench()).value != reading.value


def test_explosion_is_reduced_by_six_orders():
    reading = measure(find_row("sd-regularization/section-3/explosion-0.5")[1], 0, Bench())
    assert abs(reading.value - 50 * math.log10(2 / 1.5)) < 6 * reading.error + 0.05  # finite width adds a little
    assert 0.0 < reading.error < 0.1


# Timings


def test_parts_and_shares():
    assert STEPS.of("forward") == [1.0, 3.0]
    assert STEPS.of("total") == [3.0, 5.0]
    assert STEPS.of("total", base=True) == [6.0, 8.0]
    assert STEPS.of("update", base=True) == [8.0, 8.0]
    saved, low, high = STEPS.saved("forward")
    assert saved == pytest.approx(100 * (1 - (0.5 + 0.75) / 2))
    assert low <= saved <= high


@pytest.mark.parametrize(
    ("metric", "instrument", "more", "value"),
    [
        ("minutes", "timing.training", {}, 5.0 * 60_000 / 60),
        ("share_saved", "timing.training", {}, 100 * (1 - (4 / 8 + 6 / 8) / 2)),
        ("milliseconds", "timing.update", {"part": "forward"}, 2000.0),
        ("milliseconds", "timing.update", {"part": "backward"}, 2000.0),
        ("milliseconds", "timing.update", {"part": "total"}, 4000.0),
        ("share_saved", "timing.update", {"part": "total"}, 100 * (1 - (3 / 6 + 5 / 8) / 2)),
    ],
)
def test_readings_of_known_times(monkeypatch, metric, instrument, more, value):
    monkeypatch.setattr("residrop.research.papers.instruments.time_updates", lambda setting, seed, bench: STEPS)
    reading = measure(row(metric, instrument, **TINY, **more), 0, Bench())
    assert reading.value == pytest.approx(value)
    assert "2 " in reading.note


def test_both_networks_take_turns_under_their_draws(monkeypatch):
    counts = {"plain": 0, "rule": 0}

    def clock(step, device):
        step()
        name = getattr(step, "func", step).__qualname__
        counts["rule"] += "_forward" in name
        return 1.0

    monkeypatch.setattr("residrop.research.papers.timings.seconds_of", clock)
    called = []
    bench = Bench("cpu", steps=3, warmup=1, precision="fp32", on_step=lambda: called.append(1))
    found = time_updates(TINY, 0, bench)
    assert len(called) == 4
    assert counts["rule"] == 8  # of both networks, warm-up included
    assert found == Steps([1.0] * 3, [1.0] * 3, [3.0] * 3, [1.0] * 3, [1.0] * 3, [3.0] * 3)


def test_forwards_obey_the_draws_nearest_to_the_mean(monkeypatch):
    depths = {}

    def watched(model, plan):
        drawn = any(rule.rates for rule in rules_of(model))
        depths.setdefault(drawn, []).append(depth_of(model, plan))
        return using(model, plan)

    monkeypatch.setattr("residrop.research.papers.timings.using", watched)
    time_updates(TINY, 0, Bench("cpu", steps=4, warmup=1, precision="fp32"))
    assert depths[False] == [3.0] * 5
    assert len(depths[True]) == 5
    assert set(depths[True]) <= {1.0, 2.0}  # of three blocks at 0.5


def test_measured_once_and_constant_depth_beside():
    bench = Bench("cpu", steps=2, warmup=1, precision="fp32")
    first = time_updates(TINY, 0, bench)
    assert all(seconds > 0.0 for column in first for seconds in column)
    assert all(len(column) == 2 for column in first)
    assert all(update >= forward + backward for forward, backward, update in zip(*first[:3], strict=True))
    assert time_updates({**TINY, "part": "total"}, 0, bench) is first
    plain = time_updates({**TINY, "rule": "constant", "survival": None}, 0, bench)
    assert plain.update == first.base_update
    assert plain.saved("update")[0] == 0.0
    assert len(bench.found) == 1
    assert time_updates(TINY, 1, bench) is not first


@pytest.mark.slow
def test_dropping_half_of_the_blocks_saves_time():
    bench = Bench("cpu", steps=15, precision="fp32")
    saved, *_ = time_updates(
        {**TINY, "network": "resnet-32", "baseline": "resnet-32", "batch_size": 16}, 0, bench
    ).saved("update")
    assert 15.0 < saved < 60.0


# Curves


def test_rates_and_law():
    found = trace(curve("survival.rates", blocks=4, survival="linear_decay(0.5)"), 0, Bench())
    assert (found.x, found.y) == ([1.0, 2.0, 3.0, 4.0], [0.875, 0.75, 0.625, 0.5])
    found = trace(curve("depth.law", blocks=2, survival="uniform(0.5)"), 0, Bench())
    assert (found.x, found.y) == ([0.0, 1.0, 2.0], [0.25, 0.5, 0.25])


def test_growth_curve_beside_its_prediction():
    setting = {"network": "stable-vanilla-10", "survival": "uniform(0.5)", "samples": 200, "width": 256}
    found = trace(curve("gradients.growth", **setting), 0, Bench())
    assert found.x == [float(level) for level in range(10)]
    assert found.predicted[0] == pytest.approx(1.05**10)
    for value, error, theory in zip(found.y, found.error, found.predicted, strict=True):
        assert abs(value - theory) < 6 * error + 0.03


def test_discrepancy_is_flat_at_its_prediction():
    found = trace(curve("discrepancy.layers", network="stable-vanilla-6", width=128, loss="quadratic"), 0, Bench())
    assert found.x == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert len(set(found.predicted)) == 1
    for value, error in zip(found.y, found.error, strict=True):
        assert abs(value - found.predicted[0]) < 5 * error


NOISE = {
    "network": "stable-vanilla-6",
    "width": 16,
    "task": "sin",
    "survival": "uniform(0.7)",
    "epochs": (0, 1),
    "size": 64,
}


def test_condition_of_theorem_2_by_epoch():
    found = trace(curve("noise.condition", **NOISE), 0, Bench())
    assert found.x == [0.0, 1.0]
    assert all(1 / 6 <= value <= 1.0 for value in found.y)


@pytest.mark.parametrize(("over", "x"), [("epoch", [0.0, 1.0]), ("layer", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])])
def test_p_values_by_epoch_and_layer(over, x):
    found = trace(curve("noise.normality", **NOISE, masks=20, over=over), 0, Bench())
    assert found.x == x
    assert all(0.0 <= value <= 1.0 for value in found.y)
    assert "0.5 if normal" in found.note


def test_training_time_of_a_curve_is_one_point(monkeypatch):
    monkeypatch.setattr("residrop.research.papers.instruments.time_updates", lambda setting, seed, bench: STEPS)
    found = trace(curve("timing.training", **TINY), 0, Bench())
    assert (found.x, found.y) == ([0.5], [5000.0])
    assert "0.625 of no dropout" in found.note
    assert trace(curve("timing.training", **{**TINY, "survival": None}), 0, Bench()).x == [1.0]


def test_what_has_no_instrument_is_refused():
    with pytest.raises(ConfigError, match=r"rows take counts"):
        measure(row("error", "depth.law"), 0, Bench())
    with pytest.raises(ConfigError, match=r"there are \['survival.rates'"):
        trace(curve("counts"), 0, Bench())
