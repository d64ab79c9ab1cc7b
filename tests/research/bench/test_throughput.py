"""The benchmark of training in images per second: its rows, what it times, and its command."""

import importlib
import json
import sys
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import residrop
from residrop.blocks.attach import using
from residrop.cli import main
from residrop.cli.bench.gather import gather
from residrop.common.errors import ConfigError, RunError
from residrop.research import ledger
from residrop.research.bench import plain
from residrop.research.bench.ours import Ours
from residrop.research.bench.throughput import RULES, ThroughputSettings, bench_throughput
from residrop.training import loop, run

ROOM = sys.modules["residrop.research.bench.throughput"]
SMALL = ThroughputSettings(steps=2, warmup=0, batch_size=4, images=8, plain_steps=1, workers=0, precision="fp32")
TASK = plain.Task("resnet-8", 1, 8, 4, 2, 0, "cpu", 1, 0)


@pytest.fixture
def no_process(monkeypatch):
    """A plain loop that takes 0.4 seconds a step and starts nothing."""

    class Instant:
        def __init__(self, task):
            self.task = task

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def seconds(self):
            return 0.4

    monkeypatch.setattr(ROOM, "PlainLoop", Instant)


@pytest.fixture
def clock(monkeypatch):
    """Every part takes a time of its own, and is run all the same."""
    times = {"_network": 0.15, "run": 0.1}

    def seconds(self, part, device):
        part()
        return times.get(part.func.__name__, 0.2)

    monkeypatch.setattr(Ours, "seconds", seconds)


def test_rows(no_process, clock):
    (rows,) = bench_throughput(["resnet-8"], [1], list(RULES), SMALL)
    assert [(row["variant"], row["rule"]) for row in rows] == [
        ("plain loop", "constant"),
        *(("residrop", rule) for rule in RULES),
    ]
    first, constant = rows[:2]
    assert first["images_per_second"] == pytest.approx(4 / 0.4)
    assert constant["images_per_second"] == pytest.approx(4 / 0.2)
    assert constant["relative_to_plain"] == pytest.approx(2.0)
    assert constant["share_of_bare"] == pytest.approx(0.5)
    assert constant["network_share_of_bare"] == pytest.approx(0.1 / 0.15)
    assert constant["share_outside"] == pytest.approx(0.25)
    model = residrop.create("resnet-8")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(4, 3, 32, 32))
    assert constant["model_flops_per_second"] == pytest.approx(3 * counter.get_total_flops() / 0.2)
    assert first["model_flops_per_second"] == pytest.approx(3 * counter.get_total_flops() / 0.4)
    assert constant["bare_flops_per_second"] == pytest.approx(3 * counter.get_total_flops() / 0.1)
    ledger.check(ledger.of_rows("a test", "residrop bench throughput", rows))


@pytest.mark.parametrize("rule", RULES)
def test_flops_are_those_of_the_live_convolutions(rule, monkeypatch):
    ours = Ours(8, 2, rule, SMALL)
    called = []
    monkeypatch.setattr(
        F, "conv2d", lambda *args, **options: called.append(args[1].shape) or torch.conv2d(*args, **options)
    )
    for number, plan in enumerate(ours.plans):
        assert ours.flops[number] == 3 * ours.bare.flops(plan)
        called.clear()
        ours.bare.run(plan)
        dead = sum(draw.alive is False for draw in plan.draws)
        assert len(called) == len(ours.bare.layers) - 2 * dead
        with FlopCounterMode(display=False) as counter, using(ours.state.model, plan):
            ours.state.model(ours.x)
        assert counter.get_total_flops() == ours.bare.flops(plan)
    layers = sum(isinstance(part, nn.Conv2d | nn.Linear) for part in ours.state.model.modules())
    assert len(ours.bare.layers) == layers
    assert [layer.inner for layer in ours.bare.layers] == [False] + [True] * (layers - 1)


def test_some_draws_leave_out_a_block():
    plans = Ours(8, 1, "depth-dropout", SMALL).plans + Ours(20, 1, "stochastic-depth", SMALL).plans
    assert any(draw.alive is False for plan in plans for draw in plan.draws)


def test_step_is_an_update_of_a_training_and_the_network_alone_changes_no_weight():
    ours = Ours(8, 1, "stochastic-depth", SMALL)
    recipe, state = ours.recipe, ours.state
    twin = run.start(recipe, run.Prepared(ours.x.device, ours.loader._normalization, {}, _dataset(recipe)))
    for number in range(2):
        parts = ours.parts(number)
        before = [p.clone() for p in state.model.parameters()]
        parts["network"]()
        parts["bare"]()
        assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
        ours.clear()
        parts["step"]()
        assert state.update == ours.plans[number].step + 1
    expected = loop.updates(recipe, twin, ours.loader, 0)
    for plan in ours.plans:
        twin.update = plan.step
        next(expected)
    for name, value in twin.model.named_parameters():
        assert torch.equal(value, state.model.get_parameter(name)), name


def _dataset(recipe):
    return {"classes": [""] * 10, "channels": 3, "size": 32, "steps": recipe.epochs * SMALL.images}


def test_updates_in_a_row_are_of_one_draw_and_share_their_time(monkeypatch):
    monkeypatch.setattr(sys.modules[Ours.__module__], "seconds_of", lambda work, device: work() and 6.0)
    ours = Ours(8, 1, "stochastic-depth", SMALL)
    ours._repeat = 3
    seen = []
    monkeypatch.setattr(loop, "depth_of", lambda model, plan: float(seen.append(plan.step) or 0))
    assert ours.seconds(ours.parts(1)["step"], torch.device("cpu")) == 2.0
    assert seen == [ours.plans[1].step] * 3
    assert ours.seconds(ours.parts(1)["network"], torch.device("cpu")) == 2.0


def test_interrupted_rows_are_those_of_whole_rounds(no_process, clock):
    calls = []

    def on_step():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    found = bench_throughput(["resnet-8"], [1], ["constant"], SMALL, on_step)
    rows = next(found)
    assert {row["steps"] for row in rows} == {1}
    with pytest.raises(KeyboardInterrupt):
        next(found)


# The plain loop


@pytest.mark.slow
def test_plain_loop_takes_turns():
    with plain.PlainLoop(TASK) as one:
        times = [one.seconds() for _ in range(2)]
        process = one._process
    assert all(0.0 < seconds < 60.0 for seconds in times)
    assert process.exitcode == 0


def test_plain_loop_that_ends_says_so(capfd):
    with plain.PlainLoop(TASK._replace(network="resnet-9")) as one, pytest.raises(RunError, match="ended with code 1"):
        one.seconds()
    assert "it must be 6n + 2" in capfd.readouterr().err


def test_plain_epoch_trains_as_the_textbook():
    torch.manual_seed(0)
    model = residrop.create("resnet-8")
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    weight = model.stem.conv.weight.detach().clone()
    F.cross_entropy(model(x), y).backward()
    expected = weight - 0.1 * model.stem.conv.weight.grad
    plain._epoch(model, torch.optim.SGD(model.parameters(), lr=0.1), [(x, y)], torch.device("cpu"))
    assert torch.allclose(model.stem.conv.weight, expected, atol=1e-6)


def test_plain_pictures_are_the_images_normalised_and_moved():
    torch.manual_seed(0)
    pictures = plain._Pictures(3, seed=1)
    pixels, labels = plain.images_of(3, 1)
    x, label = pictures[2]
    assert (x.shape, x.dtype, label) == (torch.Size([3, 32, 32]), torch.float32, int(labels[2]))
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (plain._MEAN, plain._STD))
    padded = F.pad(pixels[2] / 255, (4, 4, 4, 4))
    crops = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    back = x * std + mean
    assert any(torch.allclose(back, crop, atol=1e-5) or torch.allclose(back, crop.flip(2), atol=1e-5) for crop in crops)


# The command


def test_command(no_process, capsys, tmp_path):
    target = tmp_path / "rows.json"
    options = ["--quick", "--rules", "constant", "swapout", "--batch-size", "4", "--steps", "1", "--json", str(target)]
    assert main(["bench", "throughput", *options]) == 0
    out = capsys.readouterr().out
    assert "resnet-8, W x1, batches of 4, 1 rounds" in out
    assert "residrop, swapout" in out
    document = json.loads(target.read_text())
    ledger.check(document)
    assert [entry["rule"] for entry in document["entries"]] == ["constant", "constant", "swapout"]
    assert document["command"] == (
        "residrop bench throughput --rules constant swapout --batch-size 4 --steps 1 --quick"
    )


def test_all_is_what_was_not_chosen(monkeypatch):
    asked = []
    command = importlib.import_module("residrop.cli.bench.throughput")
    monkeypatch.setattr(command, "bench_throughput", lambda *args: asked.append(args) or iter(()))
    main(["bench", "throughput", "--all"])
    main(["bench", "throughput", "--all", "--widths", "4"])
    assert [one[:2] for one in asked] == [
        (("resnet-20", "resnet-56", "resnet-110"), (1, 2, 4)),
        (("resnet-20", "resnet-56", "resnet-110"), (4,)),
    ]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: list(bench_throughput(["resnet-9"], [1], ["constant"], SMALL)), "depth is 9"),
        (lambda: list(bench_throughput(["resnet-ours-20"], [1], ["constant"], SMALL)), "has no form for every rule"),
        (lambda: list(bench_throughput(["resnet-8"], [1], ["mix"], SMALL)), "rule 'mix' is not measured"),
        (lambda: ThroughputSettings(batch_size=1), "batch_size"),
    ],
)
def test_bad_arguments_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RunError("ended")])
def test_what_was_measured_before_an_error_is_kept(tmp_path, error):
    def parts():
        yield [{"model": "resnet-20", "seconds": 1.0}]
        raise error

    with suppress(RunError):
        gather(str(tmp_path / "rows.json"), parts(), "what", "command")
    (entry,) = json.loads((tmp_path / "rows.json").read_text())["entries"]
    assert entry["seconds"] == 1.0
