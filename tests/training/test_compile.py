"""Trainings whose branches are compiled."""

import logging
import shutil

import pytest
import torch

from residrop.errors import ConfigError
from residrop.models import create
from residrop.training import loop, run, setup, train

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")


def test_a_machine_without_compiler_says_so_before_anything_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler"):
        train(tiny(compile=True), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_compile_reaches_the_branches(tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(run, "compile_branches", compiled.append)
    for recipe in (tiny(compile=True), tiny()):
        run.start(recipe, setup.prepare(recipe))
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"rule": "constant"}, "reduce-overhead"),
        ({"rule": "swapout"}, "reduce-overhead"),
        ({"rule": "skipforward", "survival": "linear(1, 0.5)"}, "reduce-overhead"),
        ({"rule": "stochastic-depth"}, None),
        ({"rule": "stochastic-depth", "granularity": "row", "survival": 0.5}, None),
        ({"rule": "depth-dropout"}, None),
    ],
)
def test_only_draws_of_one_size_are_replayed_on_a_gpu(options, mode, monkeypatch):
    told = []
    monkeypatch.setattr(run, "compile", lambda model, **options: told.append(options.get("mode")))
    assert run._compile(create("resnet-14", **options), torch.device("cuda")) is (mode is not None)
    assert told == [mode]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_are_never_outputs_of_a_graph_that_is_replayed(tiny, micro_batches):
    """They are accumulated in tensors that are there before: what a graph gives is overwritten by its next replay."""
    recipe = tiny(rule="constant", micro_batches=micro_batches)
    states = []
    for replayed in (False, True):
        ready = setup.prepare(recipe)
        state = run.start(recipe, ready)
        state.replayed = replayed
        places = [
            [parameter.grad.data_ptr() for parameter in state.model.parameters()]
            for _ in loop.updates(recipe, state, ready.loaders["train"], 0)
        ]
        states.append(state)
        assert not replayed or places[0] == places[1] == places[-1]
    plain, kept = states
    for a, b in zip(plain.model.parameters(), kept.model.parameters(), strict=True):
        assert torch.equal(a, b)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it
@pytest.mark.parametrize("rule", ["constant", "swapout"])
def test_network_compiled_as_a_whole_trains_as_the_plain_one(tiny, rule, monkeypatch):
    """As on a GPU, less the recording: the draw of every update enters the graph."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    recipe = tiny(rule=rule, micro_batches=2)
    losses = []
    for compiled in (False, True):
        ready = setup.prepare(recipe)
        state = run.start(recipe, ready)
        if compiled:
            run.compile(state.model, mode="reduce-overhead")
            state.replayed = True
        losses.append(
            [
                float(state.sums[0])
                for epoch in (0, 1)
                for _ in loop.updates(recipe, state, ready.loaders["train"], epoch)
            ]
        )
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it
def test_compiled_run_that_was_stopped_equals_the_uninterrupted(
    tiny, tmp_path, interrupt, assert_same_run, metrics, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # pytest would keep each line of it
    torch._dynamo.reset()
    recipe = tiny(compile=True, survival="0.5", augmentation="shift")
    train(recipe, tmp_path / "whole", quiet=True)
    interrupt(recipe, tmp_path / "broken", 5)
    train(recipe, tmp_path / "broken", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    train(recipe.replace(compile=False), tmp_path / "eager", quiet=True)
    eager, compiled = (metrics(tmp_path / name)[-1]["train_loss"] for name in ("eager", "whole"))
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_updates_from_the_middle_of_an_epoch_are_its_rest(tiny):
    recipe = tiny()
    seen = []
    for start in (0, 2):
        ready = setup.prepare(recipe)
        state = run.start(recipe, ready)
        state.update = start
        seen.append(sum(1 for _ in loop.updates(recipe, state, ready.loaders["train"], 0, start)))
        assert state.update == 4
    assert seen == [4, 2]
