"""Trainings whose networks are compiled."""

import logging
import shutil
from dataclasses import replace

import pytest
import torch

from residrop.common.errors import ConfigError
from residrop.models import create
from residrop.training import loop, run, setup, train
from residrop.training.distributed import ALONE

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")


def test_a_machine_without_compiler_says_so_before_anything_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler"):
        train(tiny(compile=True), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_compile_reaches_the_network(tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(run, "compile", compiled.append)
    for recipe in (tiny(compile=True), tiny()):
        run.start(recipe, setup.prepare(recipe))
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rule": "constant"}, ["whole updates"]),
        ({"rule": "swapout", "compile": True}, ["whole updates"]),
        ({"rule": "constant", "graphs": "passes"}, ["pass"]),
        ({"rule": "constant", "compile": True, "graphs": "passes"}, ["compiled pass"]),
        ({"rule": "swapout", "compile": True, "graphs": "passes"}, ["compiled pass"]),
        ({"rule": "swapout"}, ["blocks"]),
        ({"rule": "stochastic-depth"}, ["blocks"]),
        ({"rule": "depth-dropout", "compile": True}, ["compile", "blocks"]),
        ({"rule": "constant", "graphs": "none"}, []),
        ({"rule": "constant", "micro_batches": 2}, []),
        ({"rule": "stochastic-depth", "watch": ("sensitivity",)}, []),
        ({"rule": "stochastic-depth", "micro_batches": 2, "compile": True}, ["compile"]),
    ],
)
def test_what_is_compiled_and_recorded_on_a_gpu(tiny, changes, expected, monkeypatch):
    done = []
    monkeypatch.setattr(run, "compile", lambda model: done.append("compile"))
    monkeypatch.setattr(run, "record_blocks", lambda model, x: done.append("blocks"))
    monkeypatch.setattr(
        run, "record_pass", lambda model, x, compiled: done.append("compiled pass" if compiled else "pass")
    )
    monkeypatch.setattr(run, "_batch", lambda recipe, ready: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    recipe = tiny(**changes)
    ready = setup.prepare(recipe.replace(compile=False))
    network = create("resnet-14", rule=recipe.rule)
    if run._hasten(recipe, network, replace(ready, device=torch.device("cuda")), ALONE):
        done.append("whole updates")
    assert done == expected


def test_what_is_recorded_has_the_form_of_all_full_batches(tiny):
    recipe = tiny()
    ready = setup.prepare(recipe)
    x, _ = next(iter(ready.loaders["train"].train_batches(0)))
    made = run._batch(recipe, ready)
    assert (made.shape, made.stride(), made.dtype) == (x.shape, x.stride(), x.dtype)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("rule", ["constant", "swapout"])
def test_network_compiled_as_a_whole_trains_as_the_plain_one(tiny, rule, mode, monkeypatch):
    """In the form of the CPU, and as on a GPU, less the recording: the draw of every update enters the graph."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    recipe = tiny(rule=rule)
    losses = []
    for compiled in (False, True):
        ready = setup.prepare(recipe)
        state = run.start(recipe, ready)
        if compiled:
            run.compile(state.model, mode=mode)
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
