"""`residrop reproduce` as a user meets it, on a paper of trainings of a second."""

import json
import shutil

import pytest

import residrop.cli.reproduce
from command_line import assert_refused_by_tyro
from residrop.cli.reproduce import read_duration
from residrop.common.errors import ConfigError
from residrop.research import ledger
from residrop.research.papers import PAPERS
from residrop.research.papers.estimate import Estimator
from toy_paper import installed, train_here

SCALED = ("--scale", "0.25", "--device", "cpu")


@pytest.fixture(autouse=True)
def place(place, monkeypatch):
    """An empty working directory, and the toy as the only paper."""
    monkeypatch.setattr("residrop.research.papers.runner.train_all", train_here)
    with installed():
        yield place


@pytest.fixture
def cli(cli):
    """Return a function from arguments to (exit code, standard output, standard error), spaces joined."""

    def call(*arguments):
        code, out, err = cli("reproduce", *arguments)
        return code, " ".join(out.split()), " ".join(err.split())

    return call


def read(path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_help_teaches(cli):
    code, out, _ = cli("--help")
    assert code == 0
    words = ("--rows", "--seeds", "--scale", "--variant", "--data", "--budget", "--workers", "--runs", "--ledger",
             "--json", "--quiet", "--missing", "swapout/table-2", "Ctrl-C")  # fmt: skip
    assert all(word in out for word in words)


def test_listing_says_how_far_everything_is(cli, place):
    code, out, err = cli("--json", "found.json")
    assert (code, err) == (0, "")
    assert all(f"{one.id} " in out for one in (*PAPERS["toy"].tables, *PAPERS["toy"].figures))
    assert "a drawing, no data" in out
    assert cli("toy/table-1", *SCALED, "--rows", "plain", "--quiet")[0] == 0
    assert cli("toy/table-2", "--rows", "blocks", "--quiet")[0] == 0
    assert cli("--json", "found.json")[0] == 0
    found = {one["id"]: one for one in read(place / "found.json")}
    assert [found["toy/table-1"][name] for name in ("full", "scaled", "open", "quoted")] == [0, {"0.25": 1}, 1, 1]
    assert [found["toy/table-2"][name] for name in ("full", "scaled", "open")] == [1, {}, 4]
    assert (found["toy/figure-1"]["open"], found["toy/figure-5"]["drawing"]) == (2, True)
    assert "1 at 0.25" in cli()[1]


def test_a_table_is_measured_and_printed(cli, place):
    code, out, err = cli("toy/table-1", *SCALED, "--seeds", "2", "--json", "found.json")
    assert code == 0
    assert "trainings: 4, of 1 epochs" in err
    found = read(place / "found.json")
    assert [(line["key"], line["metric"], line["status"]) for line in found["rows"]] == [
        ("quoted", "error", "quoted"),
        ("plain", "error", "measured"),
        ("random", "error", "measured"),
        ("random", "sampled_error", "measured"),
    ]
    random = found["rows"][2]
    a, b = random["measured"]
    mean, deviation = (a + b) / 2, abs(a - b) / 2**0.5
    assert f"10.00 ± 0.5 │ {mean:.2f} ± {deviation:.2f} │ {mean - 10:+.2f} │ 2 │ 0.25 │ cpu" in out
    assert "Others [quoted] │ error │ 9.00 │ quoted" in out
    assert "schedule x 0.25" in out
    (claim,) = found["claims"]
    assert claim["verdict"] in ("seen", "not seen", "open")
    assert f"claim {claim['verdict']}: random is better" in out
    assert "standard error)" in out
    assert len(list((place / "runs/reproduce").iterdir())) == 4
    assert [path.name for path in sorted((place / "results").glob("*.json"))] == [
        "toy_table-1_cpu_scale0.25.json",
        "toy_table-3_cpu_scale0.25.json",
    ]
    ledger.check(read(place / "results/toy_table-1_cpu_scale0.25.json"))


def test_the_second_time_nothing_is_trained(cli, place, monkeypatch):
    first = cli("toy/table-1", *SCALED, "--rows", "plain")
    assert "no standard error" not in first[1]  # one side of the claim is missing
    monkeypatch.setattr("residrop.training.run.run_epochs", None)
    code, out, err = cli("toy/table-1", *SCALED, "--rows", "plain")
    assert (code, out) == (0, first[1])
    assert err == ""


def test_rows_that_are_not_there_yet_are_said(cli):
    out = cli("toy/table-1", *SCALED, "--rows", "plain")[1]
    assert "Plain [plain] │ error │ 20.00 │" in out
    assert "Random" not in out
    cli("toy/table-1", *SCALED, "--rows", "random", "--quiet")
    other = cli("toy/table-1", "--scale", "0.5", "--budget", "1s", "--rows", "plain", "random", "--quiet")[1]
    assert other.count("left out: ") + other.count("│ 1 │ 0.5 │") >= 2


def test_interrupted_and_continued(cli, place, monkeypatch):
    def interrupted(recipes, out, *, on_finished, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("residrop.research.papers.runner.train_all", interrupted)
    code, out, err = cli("toy/table-1", *SCALED, "--quiet")
    assert (code, out) == (130, "")
    assert err == "residrop: stopped; what was measured is recorded, and the same command continues"
    monkeypatch.setattr("residrop.research.papers.runner.train_all", train_here)
    assert cli("toy/table-1", *SCALED, "--quiet")[0] == 0
    assert len(ledger.read(place / "results")) == 4


def test_budget_leaves_out_and_says_so(cli, place, monkeypatch):
    monkeypatch.setattr(Estimator, "left", lambda self, one, runs: 3600.0)
    code, out, _ = cli("toy/table-1", *SCALED, "--budget", "20min", "--json", "found.json")
    assert code == 0
    assert "left out: toy/table-1/plain: does not fit into the budget (estimated 60 min)" in out
    assert [one["seconds"] for one in read(place / "found.json")["left_out"]] == [3600.0, 3600.0]
    assert out.count("not yet measured") == 2


def test_timings_and_theory_need_no_data(cli, place):
    code, out, err = cli("toy/table-2", "--steps", "2", "--scale", "0.1")
    assert code == 0
    assert "measuring toy/table-2/minutes: timing.training" in err
    assert "40.00 │ │ 40.25 │ +0.25 │ 1 │ 1 │" in out  # a published number, no prediction, ours, at full scale
    assert "predicted" in out
    assert "claim" in out
    assert [path.name for path in (place / "results").glob("*.json")] == ["toy_table-2_cpu_scale1.json"]


def test_figures_are_drawn_and_recorded(cli, place):
    code, out, _ = cli("toy/figure-1", *SCALED, "--json", "found.json")
    assert code == 0
    assert "toy/figure-1: Learning, 2 of 2 curves" in out
    picture = place / "runs/reproduce/toy_figure-1_scale0.25.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert [line["curve"] for line in read(place / "found.json")["lines"]] == ["plain", "random"]
    curves = [entry for entry in ledger.read(place / "results") if entry["kind"] == "measurement"]
    assert [(one["figure"], one["curve"], one["scale"]) for one in curves] == [
        ("toy/figure-1", "plain", 0.25),
        ("toy/figure-1", "random", 0.25),
    ]
    code, out, _ = cli("toy/figure-4")
    assert "uniform: 0.0625 at 0 ... 0.0625 at 4 (exact)" in out
    assert (place / "runs/reproduce/toy_figure-4_scale1.png").exists()


def test_curves_are_recorded_with_the_versions_of_their_trainings(cli, place, monkeypatch):
    assert cli("toy/figure-1", *SCALED)[0] == 0
    measured = {str(one["versions"]) for one in ledger.read(place / "results") if one["kind"] == "measurement"}
    shutil.rmtree(place / "results")
    monkeypatch.setattr(residrop.cli.reproduce, "versions", lambda: {"torch": "of the drawing"})
    assert cli("toy/figure-1", *SCALED)[0] == 0
    drawn = {str(one["versions"]) for one in ledger.read(place / "results") if one["kind"] == "measurement"}
    assert drawn == measured


def test_missing_says_what_to_do_next(cli, place, monkeypatch):
    monkeypatch.setattr(Estimator, "seconds", lambda self, recipe, epochs=None: 600.0)
    monkeypatch.setattr(Estimator, "timing", lambda self, setting, steps: 60.0)
    code, out, _ = cli("--missing", "--json", "found.json")
    assert code == 0
    assert "3 │ 10 min │ toy/table-1/random │ residrop reproduce toy/table-1 --rows random" in out
    found = read(place / "found.json")
    order = [one["per_minute"] for one in found]
    assert order == sorted(order, reverse=True)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("toy/tabel-1",), "did you mean toy/table-1"),
        (("toy/table-1", "--rows", "plane"), "did you mean plain"),
        (("toy/table-1", "--scale", "2"), "scale is 2.0"),
        (("toy/table-1", "--budget", "soon"), "give a time such as 90s, 20min, 2h"),
        (("toy/table-1", "--workers", "0"), "workers is 0"),
        (("toy/table-1", "--missing"), "leave the name of the table out"),
        (("--rows", "plain"), "name it first"),
        (("toy/table-1", "--data", "/nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line(cli, place, arguments, message):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("residrop: error: ")
    assert message in err
    assert not list(place.iterdir())


def test_options_that_are_not_understood_are_told_by_tyro(cli, place):
    result = cli("toy/table-1", "--bugdet", "1h")
    assert_refused_by_tyro(result, place, "residrop reproduce")
    assert "Perhaps you meant: --budget" in result[2].replace("-" * 20, "")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("20min", 1200.0), ("2h", 7200.0), ("1.5 h", 5400.0), ("1d", 86400.0)]
)
def test_durations(text, seconds):
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "min", "-3h", "0h", "1e3s", "2 weeks"])
def test_durations_that_are_none(text):
    with pytest.raises(ConfigError, match="is not understood"):
        read_duration(text)
