import json
import sys

import pytest
import torch

from residrop.cli import main
from residrop.common.errors import ConfigError
from residrop.research import ledger
from residrop.research.bench.inference import CASES, Case, InferenceSettings, bench_inference
from residrop.schedule.survival import parse

ROOM = sys.modules["residrop.research.bench.inference"]
VARIANTS = ["deterministic", "naive", "residrop"]
KEYS = ["model", "rule", "samples", "seconds", "relative_to_naive"]
SMALL = InferenceSettings(samples=3, batch_size=4, steps=2, warmup=0, compile=False)


@pytest.fixture(autouse=True)
def small_cases(monkeypatch):
    monkeypatch.setitem(CASES, "tiny", Case("resnet-8", "stochastic-depth", "linear_decay(0.5)", {}))
    monkeypatch.setitem(CASES, "tiny-swapout", Case("resnet-ours-8", "swapout", "linear(1, 0.5)", {"block": "v2"}))


@pytest.fixture
def clock(monkeypatch):
    """Return a function that makes times be read from a list; the network is run all the same."""

    def install(times):
        left = iter(times)

        def seconds(run, device):
            run()
            value = next(left)
            if isinstance(value, BaseException):
                raise value
            return value

        monkeypatch.setattr(ROOM, "seconds_of", seconds)

    return install


class InOrder:
    def __init__(self, seed):
        pass

    def sample(self, population, k):
        return list(population)


def test_the_cases_are_those_of_the_targets():
    first, swapout = CASES["resnet-56"], CASES["resnet-20-w2"]
    assert (first.model, first.rule, first.survival) == ("resnet-56", "stochastic-depth", "linear_decay(0.5)")
    model = swapout.build(0)
    thetas = [block.rule.rates for block in model.blocks if hasattr(block, "rule")]
    assert [pair[0] for pair in thetas] == pytest.approx(parse("linear(1, 0.5)", 9))
    assert model.blocks.block1.branch.conv1.out_channels == 32


@pytest.mark.parametrize("case", ["tiny", "tiny-swapout"])
def test_rows(case):
    (rows,) = bench_inference([case], SMALL)
    assert [row["variant"] for row in rows] == VARIANTS
    assert all(list(row)[: len(KEYS)] == KEYS for row in rows)
    assert json.loads(json.dumps(rows)) == rows
    assert all(row["seconds"] > 0 and row["samples"] == 3 and row["steps"] == 2 for row in rows)
    assert rows[1]["relative_to_naive"] == 1.0
    assert rows[0]["relative_to_deterministic"] == 1.0
    assert not rows[0]["compiled"]
    assert rows[0]["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_ratios_are_medians_over_steps_of_the_same_step(clock, monkeypatch):
    monkeypatch.setattr(ROOM, "Random", InOrder)
    clock([9.0, 9.0, 9.0, 10.0, 8.0, 4.0, 20.0, 20.0, 16.0, 100.0, 80.0, 60.0])
    settings = InferenceSettings(samples=2, batch_size=2, steps=3, warmup=1, compile=False)
    ((_, naive, ours),) = bench_inference(["tiny"], settings)
    assert (naive["seconds"], ours["seconds"]) == (20.0, 16.0)
    assert ours["relative_to_naive"] == 0.75  # of 1/2, 4/5 and 3/4
    assert ours["relative_to_deterministic"] == 0.6  # of 2/5, 4/5 and 3/5
    assert ours["quartiles_relative_to_deterministic"] == pytest.approx([0.4, 0.8])


def test_the_compiler_is_set_while_it_runs_and_put_back_to_auto(monkeypatch, clock):
    told = []
    monkeypatch.setattr(ROOM.functional, "use_compiler", told.append)
    clock([1.0] * 5 + [KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        list(bench_inference(["tiny"], SMALL))
    assert told == [False, "auto"]


def test_every_variant_makes_as_many_samples_of_the_same_draws(monkeypatch, clock):
    monkeypatch.setattr(ROOM, "Random", InOrder)
    told = []
    for name, run in list(ROOM._VARIANTS.items()):
        monkeypatch.setitem(
            ROOM._VARIANTS, name, lambda *args, name=name, run=run: told.append((name, *args[2:])) or run(*args)
        )
    clock([1.0] * 6)
    list(bench_inference(["tiny"], InferenceSettings(samples=3, batch_size=2, steps=2, warmup=0, compile=False)))
    assert told == [(name, 3, first) for first in (0, 3) for name in VARIANTS]


def test_wrong_predictions_are_not_timed(monkeypatch):
    original = ROOM._ours
    monkeypatch.setattr(ROOM, "_ours", lambda *args: original(*args) + 0.01)
    with pytest.raises(ConfigError, match="tiny: predictions are not those of single passes; nothing was timed"):
        list(bench_inference(["tiny"], SMALL))


def test_interruption_leaves_complete_steps(clock):
    clock([1.0] * 5 + [KeyboardInterrupt()])
    found = bench_inference(["tiny"], SMALL)
    assert [row["steps"] for row in next(found)] == [1, 1, 1]
    with pytest.raises(KeyboardInterrupt):
        next(found)


@pytest.mark.parametrize("given", [{"samples": 0}, {"steps": 0}, {"warmup": -1}, {"batch_size": 0}])
def test_wrong_settings_are_refused(given):
    with pytest.raises(ConfigError, match="give a whole number of at least"):
        InferenceSettings(**given)


# The command


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        capsys.readouterr()
        try:
            code = main(["bench", "inference", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return call


TINY = ("--no-compile", "--cases", "tiny", "--batch-size", 2, "--steps", 1, "--samples", 2)


def test_help_teaches(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert all(word in out for word in ("--cases", "--samples", "--batch-size", "residrop bench inference --quick"))


def test_table_and_json(cli, tmp_path):
    code, out, _ = cli(*TINY, "--json", tmp_path / "found.json")
    assert code == 0
    flat = " ".join(out.split())
    assert "resnet-8, stochastic-depth linear_decay(0.5): 2 samples, batch of 2 at 32 px, 1 steps" in flat
    assert "naive" in out
    document = json.loads((tmp_path / "found.json").read_text())
    ledger.check(document)
    rows = document["entries"]
    assert [row["variant"] for row in rows] == VARIANTS
    code, out, _ = cli(
        "--no-compile", *TINY[3:], "--cases", "tiny", "tiny-swapout", "--batch-size", 2, 1, "--quick", "--json", "-"
    )
    assert code == 0
    found = [(row["model"], row["batch_size"]) for row in json.loads(out)["entries"][::3]]
    assert found == [(model, size) for size in (2, 1) for model in ("resnet-8", "resnet-ours-8")]


def test_interrupted_command_prints_what_it_has(cli, clock, tmp_path):
    clock([1.0] * 6 + [KeyboardInterrupt()])  # a step of warm-up, one that counts, then the next case
    code, _, err = cli(*TINY, "--cases", "tiny", "tiny-swapout", "--json", tmp_path / "found.json")
    assert code == 130
    assert len(json.loads((tmp_path / "found.json").read_text())["entries"]) == 3
    assert "interrupted; 3 rows were measured" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cases", "resnet-56", "resnat-56"), "case 'resnat-56' is unknown"),
        (("--cases",), "no case or no batch size was given"),
        (("--samples", "0"), "samples is 0"),
        (("--batch-size", "0"), "batch_size is 0"),
        (("--device", "tpu"), "device 'tpu' cannot be used"),
    ],
)
def test_errors_are_one_line(cli, arguments, message):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
