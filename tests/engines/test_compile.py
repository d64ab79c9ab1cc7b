"""Compiled models obey the draws that eager ones obey, and are compiled once."""

import copy
import logging
import pickle
import shutil
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torchvision
from torch import nn
from torch._dynamo.utils import counters

import residrop
from conformance import CASES, Affine, tower
from residrop import BackwardDepth, Plan, Residual, Rule, StochasticDepth, attach, sampler_of, sampling, using
from residrop.common.errors import ConfigError
from residrop.schedule.sampler import Draw

# Between two graphs the compiler looks at the gradient of tensors that have none.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
FOREVER = 10**9


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # pytest would keep each line of it
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # instead of a line in a log
        yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def both_coins(model):
    """Plans in which all blocks are present, and all absent, at the first and the last rates of the timing."""
    sampler = sampler_of(model)
    for step, coin in product((0, FOREVER), (True, False)):
        draws = []
        for site, rates in zip(sampler.sites, sampler.rates_at(step), strict=True):
            draws.append(Draw(rates, alive=coin if site.rates else True))
        yield Plan(tuple(draws))


def gradients(model):
    return [p.grad for p in model.parameters()]


def check_same(compiled, plain, tolerance):
    """Equal tensors, and None in the same places."""
    assert [one is None for one in compiled] == [one is None for one in plain]
    for a, b in zip(compiled, plain, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def batch(number, rows=6, shape=(3, 8, 8)):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(number))


def check_training(plain, model, call, *, warm, steps=50, shape=(3, 8, 8), rows=6, tolerance=2e-5):
    """`call` is the compiled `model`, whose twin is `plain`: the same outputs, gradients and statistics of batch norm,
    and nothing compiled after `warm` steps (and after both coins of every block, if there are any)."""
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.01) for one in (plain, model)]

    def step(number):
        results = []
        for one, run in ((plain, plain), (model, call)):
            one.zero_grad()
            y = run(batch(number, rows, shape))
            y.square().mean().backward()
            results.append([y.detach(), *gradients(one), *one.buffers()])
        check_same(*results[::-1], tolerance)

    if all(site.granularity == "block" for site in sampler_of(model).sites):
        for plan in both_coins(model):
            with using(plain, plan), using(model, plan):
                step(0)
    for number in range(steps):
        with torch.compiler.set_stance("fail_on_recompile") if number >= warm else nullcontext():
            step(number)
        for optimizer in optimizers:
            optimizer.step()
    assert sampler_of(model).step == sampler_of(plain).step == steps


def twins(name="resnet-8", **options):
    return tuple(residrop.create(name, seed=3, **options) for _ in range(2))


def compiled_by(way, model, backend):
    """The thing to call."""
    if way == "torch.compile":
        return torch.compile(model, backend=backend)
    if way == "branch.compile":
        for block in model.modules():
            if isinstance(block, Residual):
                block.branch.compile(backend=backend)
        return model
    if way == "compile_branches":
        residrop.compile_branches(model, backend=backend)
        return model
    return residrop.compile(model, backend=backend)


BLOCK = {"rule": "stochastic-depth", "survival": 0.5}
UNIT = {"rule": "swapout"}
ROW = {"rule": "stochastic-depth", "survival": "linear_decay(0.4)", "granularity": "row"}
BACKWARD = {"rule": "backward-depth", "survival": 0.5}
KINDS = {"block": BLOCK, "row": ROW, "unit": UNIT, "backward": BACKWARD}


# Training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["torch.compile", "compile_branches", "branch.compile"])
def test_training_equals_eager_and_is_compiled_once(way, kind):
    """50 draws. A coin that the compiler froze (pytorch/pytorch#95425, #107587) would show at once."""
    plain, model = twins(**KINDS[kind])
    check_training(plain, model, compiled_by(way, model, "eager"), warm=6)


@pytest.mark.parametrize("options", [BLOCK, ROW, BACKWARD], ids=["block", "row", "backward"])
@pytest.mark.parametrize("way", ["torch.compile", "residrop.compile"])
def test_moving_rates_are_not_compiled_in(way, options):
    """With rates and the factors 1/p that change at every step; batches of 6 are down to 3 rows, and back at 6."""
    plain, model = twins(**options, rescale="train", timing="points(0:0.1, 25:1, 50:0)")
    check_training(plain, model, compiled_by(way, model, "eager"), warm=6)


def by_rows(rescale):
    """Blocks without batch norm, of which rows are differentiated or not."""
    blocks = [Residual(Affine((4,), i), None, BackwardDepth(0.45, "row", rescale), nn.Tanh()) for i in range(3)]
    model = nn.Sequential(*blocks)
    attach(model, seed=4)
    return model


@pytest.mark.parametrize("rescale", ["none", "train"])
@pytest.mark.parametrize("way", ["torch.compile", "residrop.compile"])
def test_rows_present_in_backward_only(way, rescale):
    plain, model = by_rows(rescale), by_rows(rescale)
    check_training(plain, model, compiled_by(way, model, "eager"), warm=12, shape=(4,), rows=9)


def test_backward_only_is_not_one_graph():
    with pytest.raises(ConfigError, match="leave out fullgraph=True"):
        residrop.compile(by_rows("none"), fullgraph=True)


ONE_OF_EACH = (
    "stochastic-depth-block-window-test",
    "stochastic-depth-row-window-train",
    "stochastic-depth-row-bernoulli-train",
    "swapout",
    "skipforward-shortcut",
    "dropout-branch",
    "mix",
)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.name in ONE_OF_EACH else pytest.mark.slow, id=repr(case)) for case in CASES],
)
def test_every_rule_equals_eager(case):
    plain, model = tower(case, seed=5), tower(case, seed=5)
    compiled = torch.compile(model, backend="aot_eager")
    for number in range(8):
        for one, run in ((plain, plain), (model, compiled)):
            one.zero_grad()
            run(batch(number, 7, (4,))).square().sum().backward()
        # a graph gives zeros, where eager gives None, to a learned shortcut that "dropout-branch" computes and ignores
        check_same(*([torch.zeros(4) if g is None else g for g in gradients(one)] for one in (model, plain)), 1e-6)
    x = batch(0, 7, (4,))
    check_same([compiled.eval()(x)], [plain.eval()(x)], 1e-6)
    assert sampler_of(model).step == 8


@pytest.mark.filterwarnings("ignore::residrop.EmptyStepWarning")  # nothing but the block, which may be absent
def test_coin_is_not_frozen():
    """pytorch/pytorch#95425, #107587: a traced coin is tossed once, when the graph is made."""
    block = Residual(Affine((4,), 0), None, StochasticDepth(0.5, rescale="none"))
    model = nn.Sequential(block)
    sampler = attach(model, seed=1)
    coins = [sampler.plan(step).draws[0].alive for step in range(50)]
    compiled = torch.compile(model, backend="eager")
    x = batch(0, 5, (4,))
    for plan in both_coins(model):
        with using(model, plan):
            compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert [not torch.equal(compiled(x), x) for _ in coins] == coins
    assert len(set(coins)) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize(
    "options", [BLOCK, ROW, {**ROW, "survival": 0.5}, UNIT], ids=["block", "row", "row-fixed", "unit"]
)
def test_training_with_inductor(options):
    plain, model = twins(**options, **({} if options is UNIT else {"rescale": "train"}))
    check_training(plain, model, residrop.compile(model), warm=6, tolerance=1e-4)


# One graph


@pytest.mark.parametrize("survival", [0.5, "linear_decay(0.4)"])
def test_row_level_is_one_full_graph(survival):
    """Whether p * n is whole (3 of 6 rows) or is rounded up or down at random."""
    plain, model = twins(**{**ROW, "survival": survival})
    residrop.compile(model, backend="eager", fullgraph=True)
    check_training(plain, model, model, warm=1, steps=50)
    assert graphs() == 1


@pytest.mark.parametrize("rule", ["swapout", "skipforward", "dropout"])
@pytest.mark.parametrize("timing", ["constant", "warmup(20)"])
def test_unit_level_is_one_full_graph(rule, timing):
    """Keys and thetas are data; the numbers are those of the uncompiled model."""
    plain, model = twins(rule=rule, survival="linear(0.9, 0.4)", timing=timing)
    residrop.compile(model, backend="aot_eager", fullgraph=True)
    check_training(plain, model, model, warm=2, steps=30)
    assert graphs() <= 2  # the first rates of a warm-up are all 1, which no coin decides


def test_row_level_is_one_graph_under_torch_compile():
    """Only the root's hooks, which draw, are run outside."""
    _, model = twins(**ROW)
    compiled = torch.compile(model, backend="eager")
    for number in range(10):
        compiled(batch(number)).sum().backward()
    assert graphs() == 1
    assert sum(counters["graph_break"].values()) == 2


def test_fullgraph_of_torch_compile_says_what_to_do():
    _, model = twins(**ROW)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"residrop\.compile\(model, fullgraph=True\)"):
        torch.compile(model, backend="eager", fullgraph=True)(batch(0))


def test_eval_is_one_full_graph():
    plain, model = twins(rule="stochastic-depth", survival=0.6)
    compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
    check_same([compiled(batch(0))], [plain.eval()(batch(0))], 1e-6)
    assert graphs() == 1


@pytest.mark.parametrize("options", [BLOCK, {**ROW, "rows": "bernoulli"}])
def test_fullgraph_refused_where_python_decides(options):
    _, model = twins(**options)
    with pytest.raises(ConfigError, match="leave out fullgraph=True"):
        residrop.compile(model, fullgraph=True)


def test_only_attached_roots_are_compiled():
    with pytest.raises(ConfigError, match="is not attached"):
        residrop.compile(nn.Sequential(residrop.create("resnet-8")))
    with pytest.raises(ConfigError, match="no blocks with rules"):
        residrop.compile_branches(nn.Linear(2, 2))


# Blocks share code


def test_blocks_of_one_structure_share_code():
    """resnet-20 has nine blocks: three widths, and one block from each to the next."""
    _, model = twins("resnet-20", **BLOCK)
    assert residrop.compile_branches(model, backend="eager") == 5
    with using(model, Plan.of([True] * 9)):
        model(batch(0)).sum().backward()
    assert graphs() == 5


@pytest.mark.parametrize("survival", [0.5, "linear_decay(0.5)"])
@pytest.mark.parametrize("name", ["resnet-56", pytest.param("imagenet-resnet-50", marks=pytest.mark.slow)])
def test_many_blocks_stay_below_the_recompile_limit(name, survival):
    """27 blocks in a loop, and 16 of eight structures; the fixture turns the compiler's warning into an error."""
    model = residrop.create(name, rule="stochastic-depth", survival=survival, seed=3)
    compiled = torch.compile(model, backend="eager")
    x = batch(0, 2, (3, 32, 32))
    for plan in both_coins(model):
        with using(model, plan):
            compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            compiled(x)
    assert sampler_of(model).step == 3


# Passes of other kinds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["torch.compile", "residrop.compile"])
@torch._dynamo.config.patch(recompile_limit=64)  # each mode has graphs of its own
def test_given_plans_sampling_and_eval(way, kind):
    """Expectation and plans of other steps in training, coins in eval, and the way back."""
    case = {
        "block": "stochastic-depth-block-window-train",
        "row": "stochastic-depth-row-window-train",
        "unit": "swapout",
    }
    case = next(one for one in CASES if one.name == case[kind])
    plain, model = tower(case, seed=5), tower(case, seed=5)
    call = compiled_by(way, model, "eager")
    sampler = sampler_of(plain)
    x = batch(0, 7, (4,))

    def compare():
        check_same([call(x)], [plain(x)], 1e-6)

    for training in (True, False, True):
        model.train(training), plain.train(training)
        compare()
        for plan in (sampler.plan(17), sampler.expectation(), sampler.plan(18)):
            with using(model, plan), using(plain, plan):
                compare()
        with sampling(model), sampling(plain):
            compare(), compare()
        compare()
    assert sampler_of(model).step == sampler.step == 4


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torch.compile", "residrop.compile"])
@torch._dynamo.config.patch(recompile_limit=64)  # none, one, some and all rows are graphs apart
def test_batches_of_any_size(way):
    """With so few rows that none or one may live; the number is symbolic only from two on."""
    case = next(one for one in CASES if one.name == "stochastic-depth-row-window-train")
    plain, model = tower(case, seed=5), tower(case, seed=5)
    call = compiled_by(way, model, "eager")
    for number in range(4):
        for rows in (7, 3, 2, 1):
            x = batch(number, rows, (4,))
            check_same([call(x)], [plain(x)], 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_in_an_eager_root(kind):
    plain, model = twins(**KINDS[kind])
    for block in model.blocks:
        block.compile(backend="eager")
    check_training(plain, model, model, warm=12, steps=20)


class Halved(Rule):
    """A rule that knows nothing of compilers: half of the branch where its coin falls."""

    def forward(self, x, shortcut, branch, *, post=None, along=()):
        return shortcut(x) + (0.5 * branch(x) if self.draw().alive else 0.0)


@pytest.mark.filterwarnings("ignore::residrop.EmptyStepWarning")  # nothing but the block, which may be absent
def test_rules_of_others_are_not_frozen_either():
    model = nn.Sequential(Residual(Affine((4,), 0), None, Halved((0.5,))))
    sampler = attach(model, seed=1)
    coins = [sampler.plan(step).draws[0].alive for step in range(20)]
    compiled = torch.compile(model, backend="eager")
    x = batch(0, 5, (4,))
    assert [not torch.equal(compiled(x), x) for _ in coins] == coins


# The model stays what it is


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_copies(kind):
    """Copies and pickles are not compiled, as those of any module that was compiled in place."""
    plain, model = twins(**KINDS[kind])
    names = list(model.state_dict())
    residrop.compile(model, backend="eager")
    model(batch(0))
    assert list(model.state_dict()) == names
    made = graphs()
    assert made > 0
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sampler_of(other) is not sampler_of(model)
        assert sampler_of(other).step == 1
        other.load_state_dict(plain.state_dict())
        sampler_of(other).step = 0
        check_same([other(batch(5, 5))], [copy.deepcopy(plain)(batch(5, 5))], 1e-6)
    assert graphs() == made


def test_hooks_of_the_root_see_every_pass():
    _, model = twins(**ROW)
    residrop.compile(model, backend="eager", fullgraph=True)
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(float(output.detach().sum())))
    outputs = [float(model(batch(0)).detach().sum()) for _ in range(3)]
    assert seen == outputs
    assert "forward" not in model.__dict__


# Models of others


def vision_transformer(granularity):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=5, depth=2, embed_dim=12, num_heads=2, global_pool="avg"
    )
    residrop.apply(model, survival=0.6, granularity=granularity, seed=3)
    return model


def torchvision_resnet(granularity):
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    residrop.apply(model, survival=0.6, granularity=granularity, seed=3)
    return model


def unknown_blocks(granularity):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU()) for _ in range(3)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 6), *blocks)
    residrop.apply(model, survival=0.6, granularity=granularity, blocks=["2", "3", "4"], seed=3)
    return model


FOREIGN = [vision_transformer, pytest.param(torchvision_resnet, marks=pytest.mark.slow), unknown_blocks]


@pytest.mark.parametrize("build", FOREIGN)
@pytest.mark.parametrize("granularity", ["block", "row"])
@pytest.mark.parametrize("way", ["torch.compile", "compile_branches"])
def test_applied_models(build, granularity, way):
    plain, model = build(granularity), build(granularity)
    check_training(plain, model, compiled_by(way, model, "eager"), warm=12, steps=25, shape=(3, 32, 32), tolerance=1e-4)


@pytest.mark.parametrize("build", FOREIGN)
def test_applied_models_are_one_full_graph_at_row_level(build):
    plain, model = build("row"), build("row")
    residrop.compile(model, backend="eager", fullgraph=True)
    check_training(plain, model, model, warm=3, steps=20, shape=(3, 32, 32), tolerance=1e-4)


def test_removed_rules_leave_nothing_compiled():
    model = unknown_blocks("block")
    residrop.compile_branches(model, backend="eager")
    residrop.remove(model)
    model(batch(0, 2, (3, 32, 32)))
    assert graphs() == 0


@pytest.mark.parametrize("compile", [residrop.compile, residrop.compile_branches])
def test_the_sampler_that_attach_returns_is_no_model(compile):
    sampler = residrop.attach(residrop.create("resnet-8", rule="swapout"))
    with pytest.raises(ConfigError, match=r"DepthSampler is no model .* compile the model itself"):
        compile(sampler)
