"""Recorded blocks. Here a stand-in for CUDA graphs does the same work again, into the same tensors; see test_gpu.py."""

import itertools
import logging
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import residrop
from residrop.blocks.attach import before_root
from residrop.common.errors import ConfigError, RunError
from residrop.engines.graphs import record_blocks, record_pass
from residrop.functional.static_draws import StaticDraws
from residrop.rules.executor import EAGER
from residrop.schedule.sampler import Plan
from residrop.training import loop, measuring, run, setup, update

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")


class Again:
    """Does on the CPU what a CUDA graph does; counts."""

    def __init__(self):
        self.latest, self.replays, self.recorded = {}, 0, 0

    def warm(self, work):
        work()

    def record(self, work, *args):
        result = work(*args)
        self.recorded += 1

        def replay():
            self.replays += 1
            with torch.enable_grad():
                again = work(*[self.latest.get(id(one), one) for one in args])
            pairs = (
                [(result, again)] if isinstance(result, torch.Tensor) else zip(result or (), again or (), strict=True)
            )
            for old, new in pairs:
                self.latest[id(old)] = new
                if old is not None:
                    old.data.copy_(new.detach())

        return result, replay


def _model(**options):
    torch.manual_seed(0)
    model = residrop.create("resnet-14", classes=4, **{"rule": "stochastic-depth", "seed": 3, **options})
    return model.train()


def _pass(model, x, step):
    model.zero_grad()
    with residrop.using(model, residrop.sampler_of(model).plan(step)):
        y = model(x)
    F.cross_entropy(y, torch.arange(len(x)) % 4).backward()
    return y.detach(), [None if one.grad is None else one.grad.clone() for one in model.parameters()]


OPTIONS = [
    {},
    {"rule": "constant"},
    {"rule": "depth-dropout", "survival": 0.5},
    {"survival": 0.5, "rescale": "train"},
    {"block": "v2", "survival": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_recorded_blocks_give_the_same_outputs_and_gradients(options):
    plain, model = _model(**options), _model(**options)
    capture = Again()
    x = torch.randn(8, 3, 32, 32)
    assert record_blocks(model, x, capture=capture) == 6
    assert capture.recorded == 12
    for mine, its in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine, its)  # recording is no training
    for step in range(6):
        x = torch.randn(8, 3, 32, 32)
        expected, found = _pass(plain, x, step), _pass(model, x, step)
        torch.testing.assert_close(found[0], expected[0])
        assert [one is None for one in found[1]] == [one is None for one in expected[1]]
        for mine, its in zip(found[1], expected[1], strict=True):
            if its is not None:
                torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    alive = sum(d.alive is not False for step in range(6) for d in residrop.sampler_of(model).plan(step).draws)
    assert capture.replays == 2 * alive


def test_other_passes_run_as_before():
    plain, model = _model(), _model()
    capture = Again()
    record_blocks(model, torch.randn(8, 3, 32, 32), capture=capture)
    for size in (4, 8):
        x = torch.randn(size, 3, 32, 32)
        for one in (plain, model):
            one.train()
            with residrop.using(one, Plan.of([True] * 6)), torch.set_grad_enabled(size == 4):
                one(x)
            one.eval()
        assert torch.equal(model(x), plain(x))
    assert capture.replays == 0


def test_gradients_that_are_still_there_are_an_error():
    model = _model(rule="constant")
    x = torch.randn(8, 3, 32, 32)
    record_blocks(model, x, capture=Again())
    model(x).sum().backward()
    with pytest.raises(RunError, match="zero_grad"):
        model(x).sum().backward()


def test_gradients_that_are_there_as_tensors_of_their_own_are_added_to():
    plain, model = _model(rule="constant"), _model(rule="constant")
    x = torch.randn(8, 3, 32, 32)
    record_blocks(model, x, capture=Again())
    for one in (plain, model):
        for parameter in one.parameters():
            parameter.grad = torch.ones_like(parameter)
        one(x).sum().backward()
    for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-4)


def test_blocks_that_a_graph_would_freeze_are_left_out():
    model = _model()
    blocks = [one for one in model.modules() if isinstance(one, residrop.Residual)]
    blocks[1].branch.register_forward_hook(lambda module, args, output: None)
    blocks[3].branch = nn.Sequential(residrop.Residual(blocks[3].branch))  # the block inside is recorded by itself
    residrop.attach(model)
    assert record_blocks(model, torch.randn(8, 3, 32, 32), capture=Again()) == 5
    assert [blocks[index].rule.executor for index in (1, 3)] == [EAGER, EAGER]
    assert record_blocks(_model(rule="swapout"), torch.randn(8, 3, 32, 32), capture=Again()) == 0
    rows = _model(granularity="row", survival=0.5)
    assert record_blocks(rows, torch.randn(8, 3, 32, 32), capture=Again()) == 0


@pytest.mark.parametrize("rule", ["constant", pytest.param("swapout", marks=[pytest.mark.slow, NEEDS_COMPILER])])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it
def test_a_recorded_pass_gives_the_same_outputs_and_gradients(rule, monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    plain, model = _model(rule=rule), _model(rule=rule)
    capture = Again()
    x = torch.randn(8, 3, 32, 32)
    record_pass(model, x, compiled=rule == "swapout", capture=capture)
    for mine, its in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine, its)
    assert capture.recorded == 2
    for step in range(4):
        x = torch.randn(8, 3, 32, 32)
        expected, found = _pass(plain, x, step), _pass(model, x, step)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        for mine, its in zip(found[1], expected[1], strict=True):
            assert float((mine - its).norm()) <= 0.01 * float(its.norm())  # a ReLU may flip; a wrong mask is of order 1
    assert capture.replays == 8
    _pass(model, torch.randn(5, 3, 32, 32), 0)
    if rule == "swapout":  # no coins, no replay
        with residrop.using(model, residrop.sampler_of(model).expectation(0)):
            model(x)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert capture.replays == 8


def test_passes_whose_draws_decide_kernels_are_not_recorded_whole():
    x = torch.randn(8, 3, 32, 32)
    for options in ({}, {"granularity": "row", "survival": 0.5}, {"rule": "swapout"}):
        with pytest.raises(ConfigError, match="use record_blocks"):
            record_pass(_model(**options), x, capture=Again())


def test_what_cannot_be_recorded_is_said():
    x = torch.randn(8, 3, 32, 32)
    with pytest.raises(ConfigError, match="to a GPU"):
        record_blocks(_model(), x)
    with pytest.raises(ConfigError, match="eval mode"):
        record_blocks(_model().eval(), x, capture=Again())


@pytest.mark.parametrize("changes", [{}, {"decay_dropped": True}, {"survival_timing": "warmup(0.5)"}])
def test_a_training_with_recorded_blocks_is_the_same(tiny_recipe, changes):
    sums = []
    for recorded in (False, True):
        recipe = tiny_recipe.replace(rule="stochastic-depth", survival="0.5", **changes)
        ready = setup.prepare(recipe)
        state = run.start(recipe, ready)
        capture = Again()
        if recorded:
            x, _ = next(iter(ready.loaders["train"].train_batches(0)))
            record_blocks(state.model, x, capture=capture)
        for _ in loop.updates(recipe, state, ready.loaders["train"], 0):
            pass
        assert (capture.replays > 0) is recorded
        sums.append(state.sums.tolist())
    assert sums[1] == pytest.approx(sums[0], rel=1e-4)


@pytest.fixture
def tiny_recipe():
    from residrop.training import Recipe

    return Recipe(network="resnet-8", data="digits", epochs=2, batch_size=32, limit=200, precision="fp32", lr=0.02)


@pytest.mark.parametrize("changes", [{}, pytest.param({"rule": "swapout"}, marks=[pytest.mark.slow, NEEDS_COMPILER])])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it
def test_recorded_updates_train_as_those_that_are_not(tiny_recipe, changes, monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    recipe = tiny_recipe.replace(**{"rule": "constant", "lr_drops": (0.3, 0.6), **changes})
    found = []
    for recorded in (False, True):
        ready = setup.prepare(recipe)
        state = run.start(recipe, ready)
        capture = _recorded(recipe, ready, state) if recorded else Again()
        for epoch in range(recipe.epochs):
            for _ in loop.updates(recipe, state, ready.loaders["train"], epoch):
                pass
        assert capture.replays == (12 if recorded else 0)  # and two smaller batches
        assert state.update == 14
        found.append((state.sums.tolist(), state.gradient.tolist(), state.model.eval()(run._batch(recipe, ready))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def _recorded(recipe, ready, state):
    """Record a training's updates; a graph would read the learning rate, which the stand-in has to be told."""
    capture = Again()
    before = {name: one.clone() for name, one in state.model.state_dict().items()}
    state.recorded = made = update.RecordedUpdate(
        state.model,
        state.optimizer,
        run._batch(recipe, ready),
        compiled=recipe.rule == "swapout",
        sums=state.sums,
        gradient=state.gradient,
        first=measuring.first_weights(state.model),
        autocast=setup.precision_context(recipe, ready.device, cached=False),
        capture=capture,
    )
    torch.testing.assert_close(state.model.state_dict(), before, rtol=0, atol=0)
    assert state.sums.tolist() == [0.0] * 3
    replay = made._replay

    def told():
        state.optimizer.param_groups[0]["lr"] = float(made._lr)
        replay()

    made._replay = told
    return capture


def test_draws_of_units_stay_at_one_place():
    """A graph reads them there; what it finds is what a pass without a place of its own is told."""
    model = _model(rule="swapout")
    sampler, hook = residrop.sampler_of(model), before_root(model)
    x = torch.randn(4, 3, 32, 32)
    places = []
    for step in range(3):
        found = []
        for kept in (None, StaticDraws() if step == 0 else hook.static_draws):
            hook.static_draws = kept
            with residrop.using(model, sampler.plan(step)):
                hook.begin(model, ((x,), {}), True)
            found.append([coins.tolist() for coins in sampler.graph_draws.coins])
        places.append([coins.data_ptr() for coins in sampler.graph_draws.coins])
        assert found[0] == found[1]
        assert len({tuple(coins) for coins in found[0]}) == 6
    assert places[0] == places[1] == places[2]
    assert all(place % 16 == 0 for place in places[0])


class Forked(nn.Module):
    """One block, the output of which two others read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(
            residrop.Residual(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), rule=residrop.StochasticDepth(0.5))
            for _ in range(3)
        )

    def forward(self, x):
        y = self.blocks[0](self.stem(x))
        return self.blocks[1](y.sin() if self.fork == 1 else y) * self.blocks[2](y.sin() if self.fork == 2 else y)

    fork = 0


@pytest.mark.parametrize("fork", [0, 1, 2])
def test_outputs_that_several_blocks_read_are_not_overwritten(fork):
    plain, model = Forked().train(), Forked().train()
    for one in (plain, model):
        residrop.attach(one, seed=0)
    record_blocks(model, torch.randn(4, 6), capture=Again())
    plain.fork = model.fork = fork  # what comes to a block may change without its form
    for alive in itertools.product((False, True), repeat=3):
        x, found = torch.randn(4, 6), []
        for one in (plain, model):
            one.zero_grad()
            with residrop.using(one, Plan.of(alive)):
                y = one(x)
            y.square().sum().backward()
            found.append((y.detach().clone(), one.stem.weight.grad.clone()))
        torch.testing.assert_close(found[1], found[0])
