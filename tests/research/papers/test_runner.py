"""What is planned, run, shared, recorded and judged, on trainings of a second."""

import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from residrop.common.errors import ConfigError, RunError
from residrop.data import load
from residrop.research import ledger
from residrop.research.papers import Claim, find
from residrop.research.papers.claims import Drawn, Measured, judge, judge_curves
from residrop.research.papers.estimate import Estimator, as_text
from residrop.research.papers.figures import Context, entries_of, lines_of
from residrop.research.papers.runner import Runner, default_workers, value_of
from residrop.research.papers.status import missing, overview
from residrop.research.papers.work import DATA, Settings, Source, source_of, training, variant_of
from residrop.training import Interrupted
from residrop.training.checked import read_record, write_record
from residrop.training.setup import data_digest
from toy_paper import PLAIN, RANDOM, installed, train_here


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("residrop.research.papers.runner.train_all", train_here)
    with installed() as paper:
        yield paper


@pytest.fixture
def make(tmp_path):
    def runner(**settings):
        console = Console(stderr=True)
        settings = Settings(**{"scale": 0.25, "steps": 2, "device": "cpu", **settings})
        return Runner(settings, tmp_path / "runs", tmp_path / "results", console=console, quiet=True)

    return runner


def fill(runner, name, *keys, budget=None):
    plan = runner.plan(name, keys, budget)
    runner.run(plan)
    return plan


# Trainings


def test_rows_are_trained_recorded_and_not_trained_again(make, tmp_path):
    runner = make(seeds=2)
    plan = fill(runner, "toy/table-1")
    assert [(one.recipe.rule, one.recipe.seed, one.recipe.epochs) for one in plan.trainings.values()] == [
        ("constant", 0, 1),
        ("constant", 1, 1),
        ("stochastic-depth", 0, 1),
        ("stochastic-depth", 1, 1),
    ]
    found = {(entry["id"], entry["metric"]): entry for entry in ledger.read(tmp_path / "results")}
    assert set(found) == {
        ("toy/table-1/plain", "error"),
        ("toy/table-1/random", "error"),
        ("toy/table-1/random", "sampled_error"),
        ("toy/table-3/sampled", "sampled_error"),  # of the same trainings
    }
    random = found["toy/table-1/random", "error"]
    assert (random["seeds"], random["scale"], random["epochs"], random["published"]) == ([0, 1], 0.25, 1, 10.0)
    assert random["recipe"] == RANDOM.fingerprint()  # at full scale
    assert found["toy/table-1/random", "sampled_error"]["published"] is None  # shown beside
    names = [f"{one.name}/evaluation.json" for one in plan.trainings.values()]
    wanted = [json.loads((tmp_path / "runs" / name).read_text()) for name in names]
    assert random["measured"] == [one["deterministic_error"] for one in wanted[2:]]
    assert random["wall_seconds"] == [one["train_seconds"] for one in wanted[2:]]
    assert found["toy/table-3/sampled", "sampled_error"]["measured"] == [one["sampled_error"] for one in wanted[2:]]
    assert random["command"] == "residrop reproduce toy/table-1 --scale 0.25 --seeds 2"
    assert "shortened to 0.25" in random["what"]
    assert not make(seeds=2).plan("toy/table-1").trainings
    assert not make(seeds=1).plan("toy/table-3").trainings
    assert len(make(seeds=3).plan("toy/table-1").trainings) == 2


def test_scales_and_variants_are_apart(make, tmp_path):
    fill(make(), "toy/table-1", "random")
    assert len(make(scale=0.5).plan("toy/table-1", ["random"]).trainings) == 1
    assert len(make(variant="slower").plan("toy/table-1").trainings) == 1
    runner = make(variant="slower")
    (one,) = fill(runner, "toy/table-1").trainings.values()
    assert (one.recipe.lr, one.recipe.epochs) == (0.02, 1)
    entries = [entry for entry in ledger.read(tmp_path / "results") if entry["variant"] == "slower"]
    assert {entry["id"] for entry in entries} == {"toy/table-1/random"}  # not table-3, which it does not concern
    assert entries[0]["recipe"] != RANDOM.fingerprint()
    assert len(runner.measured("toy/table-1/random").values) == 1
    assert not runner.measured("toy/table-1/plain").values
    fill(make(), "toy/table-1", "plain")
    assert len(make(variant="slower").measured("toy/table-1/plain").values) == 1  # it has but one reading
    (row,) = (one for one in overview(ledger.read(tmp_path / "results")) if one.id == "toy/table-1")
    assert (row.full, row.scaled, row.open, row.quoted) == (0, {0.25: 2}, 0, 1)
    assert row.variants == {"slower at 0.25": 1}
    assert row.shortened == ["2 at 0.25", "1 (slower at 0.25)"]


def test_a_variant_may_take_another_network(make, tmp_path):
    runner = make(variant="smaller")
    plan = fill(runner, "toy/table-1")
    assert [one.recipe.network for one in plan.trainings.values()] == ["resnet-14"] * 2
    assert {entry["variant"] for entry in ledger.read(tmp_path / "results")} == {"smaller"}
    assert len(runner.measured("toy/table-1/plain").values) == 1
    assert not make().measured("toy/table-1/plain").values
    assert len(make().plan("toy/table-1").trainings) == 2
    with pytest.raises(ConfigError, match="no reading of them"):
        make(variant="smaller").plan("toy/table-3")


def test_a_variant_concerns_only_networks_that_it_knows(toy):
    (smaller,) = (one for one in toy.variants if one.name == "smaller")
    table = toy.tables[0]
    assert [row.key for row in table.rows if smaller.applies(table, row)] == ["plain", "random"]
    row = table.row("plain")
    other = replace(row, recipe=row.recipe.replace(network="resnet-20"))
    assert not smaller.applies(table, other)


def test_networks_of_two_sizes_are_not_compared(make, toy):
    fill(make(), "toy/table-3")
    assert make().measured("toy/table-3/sampled").values
    assert not make(variant="smaller").measured("toy/table-3/sampled").values  # which it does not concern
    assert make(variant="slower").measured("toy/table-3/sampled").values  # a reading, of the same size


def recorded(row, measured, device, **changes):
    return {"kind": "paper", "id": f"toy/{row}", "metric": "error", "published": None, "measured": measured,
             "seeds": list(range(len(measured))), "scale": 0.25, "epochs": 1, "recipe": None, "variant": None,
             "wall_seconds": [1.0] * len(measured), "note": "", "device": device, **changes}  # fmt: skip


def test_times_of_two_devices_do_not_meet(make):
    runner = make()
    times = {"metric": "minutes", "scale": 1.0, "epochs": None}
    runner.entries = [
        recorded("table-2/constant", [30.0], "cuda (H200)", **times),
        recorded("table-2/minutes", [900.0], runner.device, **times),
    ]
    assert runner.measured("toy/table-2/minutes").values == [900.0]
    assert not runner.measured("toy/table-2/constant").values


def test_most_seeds_count_and_are_enough_on_one_device_only(make):
    mark = PLAIN.fingerprint()
    runner = make(seeds=3)
    here = recorded("table-1/plain", [1.0, 2.0], runner.device, recipe=mark)
    there = recorded("table-1/plain", [3.0], "cuda (H200)", recipe=mark) | {"seeds": [2]}
    runner.entries = [there, here]
    assert runner.measured("toy/table-1/plain").values == [1.0, 2.0]
    assert [one.seed for one in runner.plan("toy/table-1", ["plain"]).trainings.values()] == [2]
    runner.entries = [there | {"seeds": [0, 1, 2], "measured": [3.0, 4.0, 5.0]}, here]
    assert runner.measured("toy/table-1/plain").values == [3.0, 4.0, 5.0]
    assert runner.measured("toy/table-1/plain", anywhere=False).values == [1.0, 2.0]  # for a curve
    assert not runner.plan("toy/table-1", ["plain"]).trainings


def test_errors_over_the_images_are_recorded(make, tmp_path):
    plan = fill(make(), "toy/table-1")
    runs = {one.recipe.rule: tmp_path / "runs" / name / "evaluation.json" for name, one in plan.trainings.items()}
    details = {rule: json.loads(path.read_text())["details"] for rule, path in runs.items()}
    found = {(entry["id"], entry["metric"]): entry["standard_errors"] for entry in ledger.read(tmp_path / "results")}
    assert found["toy/table-1/plain", "error"] == [details["constant"]["deterministic"]["error_se"]]
    assert found["toy/table-1/random", "sampled_error"] == [details["stochastic-depth"]["sampled"]["error_se"]]


def test_runs_are_named_by_recipe_scale_and_seed():
    one = training(RANDOM, 3, Settings(scale=0.5, device="cpu"), None)
    assert one.name == f"resnet-8-stochastic-depth-{RANDOM.fingerprint()}-cpu-scale0.5-seed3"
    assert (one.recipe.epochs, one.recipe.seed, one.recipe.data) == (2, 3, "digits")
    assert training(RANDOM, 3, Settings(scale=0.01), None).recipe.epochs == 1
    names = {
        training(recipe, seed, Settings(scale=scale, device="cpu"), None).name
        for recipe in (RANDOM, PLAIN)
        for seed in (0, 1)
        for scale in (0.5, 1.0)
    }
    assert len(names) == 8


def test_ctrl_c_loses_nothing_that_is_finished(make, monkeypatch, tmp_path):
    count = []

    def interrupted(recipes, out, *, on_finished, **more):
        def finished(name, found):
            on_finished(name, found)
            count.append(name)
            raise KeyboardInterrupt

        train_here(recipes, out, on_finished=finished)

    monkeypatch.setattr("residrop.research.papers.runner.train_all", interrupted)
    with pytest.raises(Interrupted, match="the same command continues"):
        fill(make(), "toy/table-1")
    assert [entry["id"] for entry in ledger.read(tmp_path / "results")] == ["toy/table-1/plain"]
    monkeypatch.setattr("residrop.research.papers.runner.train_all", train_here)
    every = {training(recipe, 0, make().settings, None).name for recipe in (PLAIN, RANDOM)}
    assert len(count) == 1
    assert set(fill(make(), "toy/table-1").trainings) == every - set(count)


@pytest.mark.parametrize(
    ("settings", "name", "keys", "message"),
    [
        ({}, "toy/tabel-1", (), "did you mean toy/table-1"),
        ({}, "toy/table-1", ("randon",), "no row 'randon'; did you mean random"),
        ({"variant": "slow"}, "toy/table-1", (), "no variant 'slow'; did you mean slower"),
        ({"variant": "slower"}, "toy/table-2", (), "'slower' is no reading of them"),
        ({}, "toy/table-1", ("quoted",), "quoted from other work"),
        ({}, "toy/figure-1", ("plain",), "curves, no rows"),
        ({}, "toy/figure-5", (), "a drawing"),
        ({"variant": "slower"}, "toy/figure-1", (), "leave --variant out"),
        ({"points": (0.3,)}, "toy/figure-6", (), "no point at 0.3; it has 0.5, 0.8, 1"),
        ({"points": (0.5,)}, "toy/figure-1", (), "it has none"),
        ({"points": (0.5,)}, "toy/table-1", (), "leave --points out"),
        ({"scale": 0.0}, "toy/table-1", (), "scale is 0.0"),
        ({"scale": 1.1}, "toy/table-1", (), "scale is 1.1"),
        ({"seeds": 0}, "toy/table-1", (), "seeds"),
    ],
)
def test_bad_requests_are_refused(make, settings, name, keys, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings).plan(name, keys)


# Data


def test_the_papers_data_are_recognised():
    assert source_of("digits").kind == "digits"
    assert {name: one.classes for name, one in DATA.items()}["cifar100"] == 100


def test_other_data_are_shown_and_not_recorded(make, monkeypatch, tmp_path):
    monkeypatch.setitem(DATA, "digits", DATA["cifar10"])
    runner = make(data="digits")
    assert runner.source.kind is None
    assert runner.source.found == "1442 + 355 images of 10 classes, 1 x 8 x 8"
    fill(runner, "toy/table-1", "plain")
    assert len(runner.measured("toy/table-1/plain").values) == 1
    assert not (tmp_path / "results").exists()
    digest = data_digest(load("digits"))
    assert all(path.name.endswith(f"-data-{digest[:8]}") for path in (tmp_path / "runs").iterdir())
    assert make(data="digits").plan("toy/table-1", ["plain"]).trainings


def test_two_sets_of_other_data_have_runs_of_their_own():
    one, other = (Source(None, "images", 10, digest) for digest in ("0123456789", "9876543210"))
    assert training(RANDOM, 0, Settings(), one).name != training(RANDOM, 0, Settings(), other).name


def test_rows_of_other_data_than_the_given_are_left_out(make, toy):
    row = toy.tables[0].rows[1]
    object.__setattr__(row, "recipe", PLAIN.replace(data="cifar10"))
    try:
        plan = make(data="digits").plan("toy/table-1")
        assert [one.recipe.rule for one in plan.trainings.values()] == ["stochastic-depth"]
        assert [(one.name, one.why) for one in plan.left_out] == [("toy/table-1/plain", "its data are not digits")]
    finally:
        object.__setattr__(row, "recipe", PLAIN)


# Budget and value


def test_value_counts_claims():
    assert value_of("toy/table-1/plain") == 2
    assert value_of("toy/table-3/sampled") == 1


def test_budget_takes_the_best_value_per_minute(make, monkeypatch):
    seconds = {"constant": 100.0, "stochastic-depth": 100.0}
    monkeypatch.setattr(Estimator, "left", lambda self, one, runs: seconds[one.recipe.rule])
    plan = make().plan("toy/table-1", (), 150.0)
    assert [one.recipe.rule for one in plan.trainings.values()] == [
        "stochastic-depth"
    ]  # it fills a row of table 3, too
    (left,) = plan.left_out
    assert (left.rows, left.why, left.seconds) == (("toy/table-1/plain",), "does not fit into the budget", 100.0)
    seconds["stochastic-depth"] = 1000.0
    plan = make().plan("toy/table-1", (), 150.0)
    assert [one.recipe.rule for one in plan.trainings.values()] == ["constant"]
    assert len(make().plan("toy/table-1", (), 2000.0).trainings) == 2


def test_budget_holds_for_timings(make, monkeypatch):
    monkeypatch.setattr(Estimator, "timing", lambda self, setting, steps: 60.0)
    plan = make().plan("toy/table-2", (), 90.0)
    assert [wanted.row.key for wanted, _ in plan.measured] == ["minutes", "saved", "forward", "blocks"]
    assert [one.rows for one in plan.left_out] == [("toy/table-2/constant",)]


def test_estimates_scale_with_the_work():
    estimator = Estimator("cpu")
    plain, random = (recipe.replace(data="cifar10", limit=None, network="resnet-20") for recipe in (PLAIN, RANDOM))
    full = estimator.seconds(plain)
    deep = estimator.seconds(plain.replace(network="resnet-110"))
    dropped = estimator.seconds(random.replace(network="resnet-110", survival="uniform(0.5)", samples=0))
    assert 4.5 < deep / full < 6.5  # 254 MFLOP against 41
    assert 0.45 < dropped / deep < 0.6
    long = estimator.seconds(plain, epochs=40)
    assert long / full == pytest.approx(10.0, rel=0.1)
    assert estimator.seconds(plain.replace(width=2)) > 1.2 * full


def test_estimate_knows_what_is_done(make, tmp_path):
    estimator = Estimator("cpu")
    one = training(RANDOM, 0, Settings(device="cpu"), None)
    before = estimator.left(one, tmp_path)
    (tmp_path / one.name).mkdir()
    (tmp_path / one.name / "metrics.jsonl").write_text("{}\n{}\n{}\n")
    assert estimator.left(one, tmp_path) == pytest.approx(before / 4)


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (600, "10 min"), (7200, "2.0 h"), (360_000, "4.2 days"), (89, "89 s")]
)
def test_times_as_text(seconds, text):
    assert as_text(seconds) == text


def test_missing_is_ordered_and_shares_runs(make, tmp_path):
    class Fixed:
        def seconds(self, recipe):
            return 60.0 if recipe.rule == "constant" else 600.0

        def timing(self, setting, steps):
            return 30.0

    def ids(entries):
        return {one.rows: (one.value, one.seconds, one.command) for one in missing(entries, Fixed())}

    found = ids([])
    assert found["toy/table-1/random", "toy/table-3/sampled"] == (
        3,
        600.0,
        "residrop reproduce toy/table-1 --rows random",
    )
    assert list(found)[-1] == ("toy/table-1/random", "toy/table-3/sampled")
    times = tuple(f"toy/table-2/{key}" for key in ("constant", "minutes", "saved", "forward", "blocks"))
    assert found[times] == (7, 61.0, "residrop reproduce toy/table-2")
    fill(make(scale=0.25), "toy/table-1", "plain")
    assert ("toy/table-1/plain",) in ids(ledger.read(tmp_path / "results"))  # scaled is not full
    fill(make(scale=1.0), "toy/table-1", "plain")
    assert ("toy/table-1/plain",) not in ids(ledger.read(tmp_path / "results"))


def test_workers():
    assert 1 <= default_workers("cpu") <= 4


# Instruments


def test_timings_are_recorded_at_full_scale_and_share_a_measurement(make, tmp_path):
    runner = make(scale=0.25)
    fill(runner, "toy/table-2")
    found = {entry["id"].rpartition("/")[2]: entry for entry in ledger.read(tmp_path / "results")}
    assert set(found) == {"constant", "minutes", "saved", "forward", "blocks"}
    assert {(entry["scale"], entry["epochs"], entry["recipe"]) for entry in found.values()} == {(1.0, None, None)}
    assert len(runner.bench.found) == 1  # constant depth was measured beside the rule
    assert found["blocks"]["measured"] == [40.25]
    assert "6000" in found["minutes"]["note"]
    assert found["saved"]["wall_seconds"][0] >= 0.0
    assert not make().plan("toy/table-2").measured
    elsewhere = make()
    elsewhere.device = "cpu (another)"
    keys = {wanted.row.key for wanted, _ in elsewhere.plan("toy/table-2").measured}
    assert keys == {"constant", "minutes", "saved", "forward"}  # times are of one machine, counts are not


# Claims


def test_claims():
    claim = Claim(text="", where="t", pairs=(("t/a", "t/b"), ("t/b", "t/c")))

    def verdicts(**values):
        found = judge(claim, lambda name: Measured(*values.get(name[2:], ([],))))
        return [pair.verdict for pair in found.pairs], found.verdict

    assert verdicts(a=([1.0],), b=([2.0],), c=([3.0],)) == (["seen", "seen"], "seen")
    assert verdicts(a=([1.0],), b=([2.0],)) == (["seen", "open"], "open")
    assert verdicts(a=([3.0],), b=([2.0],)) == (["not seen", "open"], "not seen")
    assert verdicts(a=([1.0, 1.2],), b=([2.0, 2.2],), c=([2.1, 2.3],)) == (["seen", "open"], "open")
    assert verdicts(a=([1.0], [0.3]), b=([2.0], [0.3]), c=([2.8], [0.3])) == (["seen", "open"], "open")
    pair = judge(claim, lambda name: Measured({"a": [1.0, 2.0], "b": [2.0, 4.0]}.get(name[2:], []))).pairs[0]
    assert pair.difference == -1.5
    assert pair.error == pytest.approx((0.5 / 2 + 2.0 / 2) ** 0.5)
    assert judge(Claim(text="", where="f"), lambda name: Measured()).verdict == "open"


def test_claims_about_curves():
    claim = Claim(text="", where="f", curves=(("low", "high"), ("low", "missing")))

    def found(low, high):
        judged = judge_curves(claim, {"low": Drawn(*low), "high": Drawn(*high)})
        return [(pair.smaller, pair.difference, pair.verdict) for pair in judged.pairs]

    both = ([1.0, 2.0], [0.1, 0.4]), ([2.0, 3.0], [0.2, 0.1])
    assert found(*both) == [("low at 2", pytest.approx(0.2), "not seen")]
    assert found(([1.0, 2.0], [0.1, None]), ([1.0, 2.0], [0.1, 0.5])) == []  # equal, and no value
    assert found(([1.0], [0.1], [0.1]), ([1.0], [0.4], [0.2]))[0][2] == "open"
    assert found(([0.5], [0.1]), ([1.0], [0.4])) == [("low at 0.5", pytest.approx(-0.3), "seen")]  # points
    assert judge_curves(claim, {}).verdict == "open"


@pytest.mark.parametrize(
    ("values", "errors", "error"),
    [
        ([], [], None),
        ([3.0], [], None),
        ([3.0], [0.4], 0.4),
        ([3.0, 3.0], [0.3, 0.4], 0.25),  # equal seeds: what the images leave open
        ([3.0, 5.0], [0.3, 0.4], 1.0),  # of the seeds, being larger
        ([3.0, 5.0], [0.3], 1.0),  # not of both known
    ],
)
def test_standard_errors_are_over_seeds_or_images(values, errors, error):
    found = Measured(values, errors).error
    assert found == (None if error is None else pytest.approx(error))


# Figures


def context(runner):
    def measured(name):
        return runner.measured(f"toy/{name}")

    variant = variant_of("toy", runner.settings.variant)
    return Context(runner.settings, runner.source, runner.runs, runner.bench, measured, variant)


def test_curves_are_those_of_the_runs(make, tmp_path):
    runner = make(scale=0.5, seeds=2)
    plan = fill(runner, "toy/figure-1")
    lines = lines_of(plan.target, context(runner))
    assert [(line.label, line.x, line.seeds) for line in lines] == [("plain", [1, 2], 2), ("random", [1, 2], 2)]
    runs = [tmp_path / "runs" / name / "metrics.jsonl" for name in plan.trainings]
    every = [[json.loads(line)["test_error"] for line in path.read_text().splitlines()] for path in runs]
    assert lines[0].y == pytest.approx([(a + b) / 2 for a, b in zip(every[0], every[1], strict=True)])
    assert lines[0].error[1] == pytest.approx(abs(every[0][1] - every[1][1]) / 2)
    assert lines[0].recipe == PLAIN.fingerprint()
    assert len(ledger.read(tmp_path / "results")) == 4  # its rows, on the way


def test_points_are_rows(make):
    runner = make()
    plan = fill(runner, "toy/figure-2")
    (line,) = lines_of(plan.target, context(runner))
    plain, random = (runner.measured(f"toy/table-1/{key}").values[0] for key in ("plain", "random"))
    assert line.y == pytest.approx([0.0, 100.0 * (random / plain - 1.0)])
    assert line.x == [0.0, 0.5]


def test_relative_errors_have_those_of_the_baseline(make):
    known = {"table-1/plain": Measured([10.0], [0.3]), "table-1/random": Measured([9.0], [0.3])}
    runner = make()
    (line,) = lines_of(find("toy/figure-2"), context(runner)._replace(measured=known.__getitem__))
    assert line.y == pytest.approx([0.0, -10.0])
    # of the ratio a / b: da / b and a db / b^2
    assert line.error == pytest.approx([0.0, 100.0 * math.hypot(0.3 / 10.0, 9.0 * 0.3 / 100.0)])


def test_figures_under_a_variant_are_those_of_its_runs(make):
    runner = make(variant="smaller")
    plan = fill(runner, "toy/figure-1")
    assert {one.recipe.network for one in plan.trainings.values()} == {"resnet-14"}
    lines = lines_of(plan.target, context(runner))
    assert [line.recipe for line in lines] == [one.full.fingerprint() for one in plan.trainings.values()]
    assert {entry["variant"] for entry in entries_of(plan.target, lines, 0.25, "smaller")} == {"smaller"}
    assert lines_of(plan.target, context(make())) == []  # the paper's own network is not trained
    (line,) = lines_of(find("toy/figure-2"), context(runner))  # of the same rows
    assert line.y[0] == 0.0
    assert not runner.plan("toy/figure-2").trainings


def test_points_may_be_chosen(make):
    runner = make(points=(0.8, 1.0))
    plan = fill(runner, "toy/figure-6")
    assert [(one.recipe.rule, one.recipe.survival) for one in plan.trainings.values()] == [
        ("stochastic-depth", "uniform(0.8)"),
        ("constant", None),
    ]
    (line,) = lines_of(plan.target, context(runner))
    assert line.x == [0.8, 1.0]
    assert len(line.error) == 2  # over the test images, having one seed
    runner.keep(plan.target, entries_of(plan.target, [line], 0.25), {})
    assert "--points 0.8 1 --seeds 1" in ledger.read(runner.folder)[-1]["command"]
    assert len(make().plan("toy/figure-6").trainings) == 3


def test_nothing_is_drawn_before_it_is_trained(make):
    assert lines_of(find("toy/figure-1"), context(make())) == []
    assert lines_of(find("toy/figure-2"), context(make())) == []


def test_error_by_samples_is_kept(make, tmp_path):
    runner = make()
    plan = fill(runner, "toy/figure-3")
    (line,) = lines_of(plan.target, context(runner))
    assert line.x == [1.0, 2.0, 3.0]
    assert "2 repetitions on 355 test images" in line.note
    (kept,) = (tmp_path / "runs").glob("*/samples.json")
    assert json.loads(kept.read_text())["error"] == line.y
    write_record(kept, {**read_record(kept), "images": 354})
    assert "354" in lines_of(plan.target, context(runner))[0].note  # read, not measured again


def test_a_damaged_ledger_is_named(make, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x.json").write_text("[]")
    with pytest.raises(RunError, match=r"x\.json"):
        make()
