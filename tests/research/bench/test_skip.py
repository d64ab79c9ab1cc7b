import json
import sys

import pytest
import torch

import residrop
from residrop.blocks.attach import depth_of, sampler_of
from residrop.cli import main
from residrop.common.errors import ConfigError
from residrop.research import ledger
from residrop.research.bench import Comparison, Settings, bench_skip
from residrop.research.bench.networks import has_timm, network
from residrop.research.bench.peers import draws
from residrop.research.report.measurements import summarise
from small_networks import small_found

ROOM = sys.modules["residrop.research.bench.skip"]
KEYS = [
    "model",
    "rule",
    "granularity",
    "survival",
    "variant",
    "seconds",
    "relative_to_constant",
    "relative_to_ideal",
    "saved_bytes",
]
VARIANTS = [
    ("constant depth", None),
    ("residrop", "block"),
    ("torchvision StochasticDepth", "block"),
    ("ideal", "block"),
    ("residrop", "row"),
    ("torchvision StochasticDepth", "row"),
    *([("timm DropPath", "row")] if has_timm() else []),
    ("index gather", "row"),
    ("ideal", "row"),
]
SMALL = Settings(steps=2, warmup=0, batch_size=4)


def compared(name="resnet-8", survival="0.5", settings=SMALL):
    (rows,) = bench_skip([name], [survival], settings)
    return rows


def of(rows, variant, granularity):
    return next(row for row in rows if (row["variant"], row["granularity"]) == (variant, granularity))


@pytest.fixture
def clock(monkeypatch):
    """Return a function that makes times be read from a list; the network is run all the same."""

    def install(times):
        left = iter(times)

        def seconds(step, device):
            step()
            value = next(left)
            if isinstance(value, BaseException):
                raise value
            return value

        monkeypatch.setattr(ROOM, "seconds_of", seconds)

    return install


# The draws


def test_draws_are_the_samplers_own_of_nearly_expected_depth():
    model = residrop.create("resnet-56", rule="stochastic-depth", survival=0.5)
    found = draws(model, 10)
    steps = [plan.step for plan in found]
    assert steps == sorted(set(steps))
    assert max(steps) < 40
    assert list(found) == [sampler_of(model).plan(step) for step in steps]
    off = [abs(depth_of(model, plan) - 13.5) for plan in found]
    others = [abs(depth_of(model, sampler_of(model).plan(step)) - 13.5) for step in range(40) if step not in steps]
    assert max(off) <= min(others)


def test_ours_and_the_ideal_obey_the_same_draws():
    torch.manual_seed(0)
    net = network("resnet-14/v2")
    comparison = Comparison(net, "0.5", Settings(steps=4, batch_size=6))
    by_name = {(v.name, v.granularity): v for v in comparison.variants}
    for step in range(4):
        ours, ideal = (by_name[name, "block"].at(step)(comparison.x) for name in ("residrop", "ideal"))
        torch.testing.assert_close(ours, ideal)
        gather = by_name["index gather", "row"].at(step)(comparison.x)
        torch.testing.assert_close(by_name["residrop", "row"].at(step)(comparison.x), gather)
    different = {by_name["ideal", "block"].at(step)(comparison.x).sum().item() for step in range(4)}
    assert len(different) > 1


# The rows


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows(precision):
    rows = compared(settings=Settings(steps=2, warmup=1, batch_size=4, precision=precision))
    assert [(row["variant"], row["granularity"]) for row in rows] == VARIANTS
    assert all(list(row)[: len(KEYS)] == KEYS for row in rows)
    assert json.loads(json.dumps(rows)) == rows
    assert {row["model"] for row in rows} == {"resnet-8"}
    assert [row["rule"] for row in rows] == ["constant"] + ["stochastic-depth"] * (len(rows) - 1)
    assert all(row["seconds"] > 0 and row["saved_bytes"] > 0 and row["steps"] == 2 for row in rows)
    assert of(rows, "constant depth", None)["relative_to_constant"] == 1.0
    assert of(rows, "constant depth", None)["relative_to_ideal"] is None
    assert [of(rows, "ideal", level)["relative_to_ideal"] for level in ("block", "row")] == [1.0, 1.0]
    assert {row["precision"] for row in rows} == {precision}
    assert rows[0]["versions"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize("name", ["transformers/t5_small_encoder", "transformers/opt_6_layers"])
def test_rows_of_networks_of_tokens(name, monkeypatch):
    pytest.importorskip("transformers")
    small_found(monkeypatch)
    rows = compared(name)
    assert [(row["variant"], row["granularity"]) for row in rows] == VARIANTS
    assert {(row.get("pixels"), row["tokens"], row["memory_format"]) for row in rows} == {(None, 64, "contiguous")}
    assert "transformers" in rows[0]["versions"]
    assert "batch of 4 at 64 tokens, fp32, contiguous, 2 steps" in str(summarise([ledger.flat(row) for row in rows]))


@pytest.mark.parametrize("name", ["resnet-8", "torchvision/resnet18", "timm/vit_tiny_patch16_224"])
def test_images_of_other_sizes(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    rows = compared(name, settings=Settings(steps=1, warmup=0, batch_size=2, pixels=48))
    small = compared(name, settings=Settings(steps=1, warmup=0, batch_size=2, pixels=32))
    assert {row["pixels"] for row in rows} == {48}
    constant = [of(found, "constant depth", None)["saved_bytes"] for found in (rows, small)]
    assert constant[0] > 1.5 * constant[1]


def test_memory_at_the_peak_is_of_gpus_alone(monkeypatch):
    """Of variants that depend on the draw the mean over draws, of others the first."""
    assert all("peak_bytes" not in row for row in compared())
    net = network("resnet-8")
    comparison = Comparison(net, "0.5", Settings(steps=2, warmup=0, batch_size=2))
    taken = iter(range(1, 1000))
    monkeypatch.setattr(ROOM, "peak_bytes", lambda step, device: next(taken))
    for step in range(2):
        comparison._measure_peaks(step)
    comparison.run(lambda: None)
    rows = comparison.rows()
    varying = [variant.varies for variant in comparison.variants]
    first = list(range(1, len(varying) + 1))
    later = iter(range(len(varying) + 1, 1000))
    expected = [(one + next(later)) / 2 if varies else one for one, varies in zip(first, varying, strict=True)]
    assert [row["peak_bytes"] for row in rows] == [round(one) for one in expected]
    assert [row["peak_relative_to_constant"] for row in rows] == expected


def test_memory_is_what_is_kept_for_backward():
    rows = compared("resnet-20/v2", settings=Settings(steps=2, warmup=0, batch_size=8))
    saved = {(row["variant"], row["granularity"]): row["saved_relative_to_constant"] for row in rows}
    assert saved["residrop", "block"] == saved["ideal", "block"]
    assert saved["torchvision StochasticDepth", "block"] >= 1.0
    assert saved["ideal", "row"] <= saved["residrop", "row"] < 0.65 < saved["index gather", "row"]
    for row in rows:
        ideal = of(rows, "ideal", row["granularity"] or "block")
        assert row["granularity"] is None or row["saved_relative_to_ideal"] == pytest.approx(
            row["saved_bytes"] / ideal["saved_bytes"], rel=1e-3
        )


def test_ratios_are_medians_over_steps_of_the_same_step(clock, monkeypatch):
    names = [VARIANTS[0], VARIANTS[1], VARIANTS[3]]  # constant depth, ours and the ideal, by block
    make = ROOM.variants_of
    monkeypatch.setattr(ROOM, "variants_of", lambda *args: [v for v in make(*args) if (v.name, v.granularity) in names])
    monkeypatch.setattr(ROOM, "Random", lambda seed: InOrder())
    clock([9.0, 9.0, 9.0, 1.0, 2.0, 1.0, 10.0, 30.0, 10.0, 100.0, 100.0, 200.0])
    rows = compared(settings=Settings(steps=3, warmup=1, batch_size=4))
    ours = of(rows, "residrop", "block")
    assert ours["seconds"] == 30.0
    assert ours["relative_to_constant"] == 2.0  # of 2, 3 and 1
    assert ours["relative_to_ideal"] == 2.0  # of 2, 3 and 0.5
    assert ours["quartiles_relative_to_ideal"] == [0.5, 3.0]


class InOrder:
    def sample(self, population, k):
        return list(population)


def test_variants_take_turns_in_changing_order(clock, monkeypatch):
    order = []
    make = ROOM.variants_of

    def watched(*args):
        return [
            v._replace(at=lambda step, v=v: order.append((v.name, v.granularity)) or v.at(step)) for v in make(*args)
        ]

    monkeypatch.setattr(ROOM, "variants_of", watched)
    compared(settings=Settings(steps=3, warmup=1, batch_size=4))
    count = len(VARIANTS)
    rounds = [order[-count * (i + 1) : len(order) - count * i] for i in range(4)]
    assert all(sorted(map(str, one)) == sorted(map(str, VARIANTS)) for one in rounds)
    assert len({tuple(one) for one in rounds}) == 4


def test_interruption_leaves_complete_steps(clock):
    count = len(VARIANTS)
    clock([1.0] * (count + 3) + [KeyboardInterrupt()])
    found = bench_skip(["resnet-8"], ["0.5"], SMALL)
    rows = next(found)
    assert [row["steps"] for row in rows] == [1] * count
    with pytest.raises(KeyboardInterrupt):
        next(found)


def test_interruption_before_a_step_leaves_nothing(clock):
    clock([1.0, KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        next(bench_skip(["resnet-8"], ["0.5"], SMALL))


@pytest.mark.parametrize("given", [{"steps": 0}, {"warmup": -1}, {"batch_size": 1}])
def test_wrong_settings_are_refused(given):
    with pytest.raises(ConfigError, match="time at least 1 step of at least 2 images"):
        Settings(**given)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
def test_compiled_variants():
    rows = compared("resnet-8", settings=Settings(steps=2, batch_size=4, compile=True))
    assert [(row["variant"], row["granularity"]) for row in rows] == VARIANTS
    assert all(row["compiled"] for row in rows)


# The command


@pytest.fixture
def cli(capsys):
    def call(*arguments):
        capsys.readouterr()
        try:
            code = main(["bench", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return call


TINY = ("--models", "resnet-8", "--survival", "0.5", "--batch-size", 4, "--steps", 1)


def test_bench_alone_lists_benchmarks(cli):
    code, out, _ = cli()
    assert code == 0
    assert "skip" in out
    assert cli("--help")[1] == out


def test_help_teaches(cli):
    code, out, _ = cli("skip", "--help")
    assert code == 0
    assert all(word in out for word in ("--models", "--survival", "--steps", "--contiguous", "--compile", "DropPath"))
    assert "residrop bench skip --quick" in out


def test_table_and_json_file(cli, tmp_path):
    code, out, err = cli("skip", *TINY, "0.9", "--json", tmp_path / "skip.json")
    assert code == 2  # 0.9 is one step too many
    assert "residrop bench skip --help" in err
    code, out, _ = cli("skip", *TINY, "--contiguous", "--json", tmp_path / "skip.json")
    assert code == 0
    assert "resnet-8, 0.5: batch of 4 at 32 px, fp32, contiguous, 1 steps" in out
    assert "index gather" in out
    document = json.loads((tmp_path / "skip.json").read_text())
    ledger.check(document)
    assert (
        document["command"]
        == "residrop bench skip --models resnet-8 --survival 0.5 --batch-size 4 --steps 1 --contiguous"
    )
    rows = document["entries"]
    assert [(row["variant"], row["granularity"]) for row in rows] == VARIANTS
    assert {row["memory_format"] for row in rows} == {"contiguous"}


def test_json_on_standard_output_is_nothing_else(cli):
    code, out, _ = cli(
        "skip", *TINY[:2], "--survival", "0.5", "0.9", "--quick", "--batch-size", 4, "--steps", 1, "--json", "-"
    )
    assert code == 0
    rows = json.loads(out)["entries"]
    assert len(rows) == 2 * len(VARIANTS)
    assert {(row["survival"], row["batch_size"], row["steps"]) for row in rows} == {("0.5", 4, 1), ("0.9", 4, 1)}


def test_interrupted_command_prints_what_it_has(cli, clock, tmp_path):
    count = len(VARIANTS)
    clock([1.0] * 3 * count + [KeyboardInterrupt()])  # two steps of warm-up and one that counts, then the next
    code, out, err = cli("skip", *TINY[:2], *TINY[4:], "--survival", "0.5", "0.9", "--json", tmp_path / "skip.json")
    assert code == 130
    assert "resnet-8, 0.5" in out
    assert "resnet-8, 0.9" not in out
    assert len(json.loads((tmp_path / "skip.json").read_text())["entries"]) == count
    assert f"interrupted; {count} rows were measured" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("skap",), "benchmark 'skap' is unknown; did you mean skip?"),
        (("skip", "--models", "resnet-56", "resnat-56"), "network 'resnat-56' is unknown"),
        (("skip", "--survival", "half"), "survival 'half' is not understood"),
        (("skip", "--steps", "0"), "steps=0"),
        (("skip", "--models", "resnet-8", "--pixels", "4"), "images of 4 pixels are too small"),
        (("skip", "--models", "transformers/opt_6_layers", "--pixels", "32"), "reads tokens and has no use for pixels"),
        (("skip", "--device", "tpu"), "device 'tpu' cannot be used"),
    ],
)
def test_errors_are_one_line(cli, arguments, message):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_two_memory_formats_are_refused(cli):
    code, out, err = cli("skip", "--contiguous", "--channels-last")
    assert (code, out) == (2, "")
    assert "not allowed together" in " ".join(err.split())
