"""Trainings whose branches are compiled."""

import logging
import shutil

import pytest
import torch

from residrop.errors import ConfigError
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
