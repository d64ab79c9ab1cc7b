"""Activation checkpointing: what backward recomputes obeys the draw of its own forward, however many ran since.

`tests/test_rules.py` has the simple cases of every rule; here are whole networks, several forwards in flight, reentrant
checkpoints around the root, compiled graphs, and gradient accumulation.
"""

import logging
from contextlib import nullcontext
from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import residrop
from residrop import BackwardDepth, Plan, Residual, StochasticDepth, Swapout, attach, sampler_of, sampling, using

RULES = {
    "block": lambda: StochasticDepth(0.5, rescale="train"),
    "row": lambda: StochasticDepth(0.55, granularity="row", rescale="train"),
    "bernoulli": lambda: StochasticDepth(0.55, granularity="row", rows="bernoulli"),
    "unit": lambda: Swapout(0.6, 0.5),
    "backward": lambda: BackwardDepth(0.5, rescale="train"),
    "backward rows": lambda: BackwardDepth(0.55, granularity="row"),
}
every_rule = pytest.mark.parametrize("kind", RULES)
both_kinds = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])


class Net(nn.Module):
    """Three blocks, each of them checkpointed or none."""

    def __init__(self, kind, use_reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        branches = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(3)]
        self.blocks = nn.Sequential(*(Residual(branch, None, RULES[kind](), nn.Tanh()) for branch in branches))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        if self.use_reentrant is None:
            return self.blocks(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


def make(kind, use_reentrant=None, seed=3):
    model = Net(kind, use_reentrant)
    attach(model, seed=seed)
    return model


def inputs(number, count=1):
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(9, 6, generator=generator).requires_grad_() for _ in range(count)]


def gradients(model, xs, loss):
    """Of all inputs and parameters; by `backward`, as reentrant checkpoints want it."""
    model.zero_grad()
    for x in xs:
        x.grad = None
    loss.backward()
    return [x.grad for x in xs], [p.grad for p in model.parameters()]


def check_equal(got, expected, exact=True):
    """Bit-identical, with None in the same places.

    Not `exact` is for reentrant checkpoints and compiled graphs, which add the parts of a gradient in another order.
    """
    tolerance = 0.0 if exact else 1e-5
    for a, b in zip(chain.from_iterable(got), chain.from_iterable(expected), strict=True):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # pytest would keep each line of it
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Several forwards before one backward


@every_rule
@both_kinds
@pytest.mark.parametrize("given", [False, True], ids=["drawn", "using"])
def test_two_forwards_before_backward(kind, use_reentrant, given):
    """Two views of a batch: both recomputations happen after both forwards (and, given by hand, outside `using`)."""
    plain, model = make(kind), make(kind, use_reentrant)
    for number in range(4):
        results = []
        for one in (plain, model):
            xs = inputs(number, 2)
            sampler = sampler_of(one)
            ys = []
            for part, x in enumerate(xs):
                with using(one, sampler.plan(number, part=part)) if given else nullcontext():
                    ys.append(one(x))
            results.append((ys, *gradients(one, xs, (ys[0] * ys[1]).sum())))
        check_equal(*results)


@every_rule
@both_kinds
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_checkpointed_root_repeats_the_draw_of_its_own_forward(kind, use_reentrant, order):
    """The whole network is checkpointed; three forwards, then three backward passes in any order."""
    results = []
    for checkpointed in (False, True):
        model, xs = make(kind), inputs(0, 3)
        ys = [checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x) for x in xs]
        for number in order:
            ys[number].square().sum().backward()
        results.append(([x.grad for x in xs], [p.grad for p in model.parameters()]))
        assert sampler_of(model).step == 3
    check_equal(*results)


@every_rule
def test_reentrant_checkpoint_that_runs_the_root_twice(kind):
    """One checkpoint around two passes of the root, inside another one; and a second backward pass."""
    results = []
    for checkpointed in (False, True):
        model, (x,) = make(kind), inputs(0)

        def twice(x, model=model):
            return model(x) * model(x + 1.0)

        def nested(x, inner=twice):
            return checkpoint(inner, x, use_reentrant=True) + 0.5 * x

        y = checkpoint(nested, x, use_reentrant=True) if checkpointed else twice(x) + 0.5 * x
        model(x)  # another draw in between
        y.square().sum().backward(retain_graph=True)
        y.sum().backward()
        results.append(([x.grad], [p.grad for p in model.parameters()]))
    check_equal(*results, exact=False)


@every_rule
@both_kinds
def test_segments_of_a_network(kind, use_reentrant):
    """`checkpoint_sequential` inside the root's forward."""

    class Segmented(Net):
        def forward(self, x):
            return checkpoint_sequential(self.blocks, 2, x, use_reentrant=use_reentrant)

    plain, model = make(kind), Segmented(kind)
    attach(model, seed=3)
    results = []
    for one in (plain, model):
        (x,) = inputs(0)
        results.append(gradients(one, [x], (one(x) + one(x)).square().sum()))
    check_equal(*results, exact=not use_reentrant)


@both_kinds
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "stochastic-depth", "survival": 0.5},
        {"rule": "stochastic-depth", "survival": "linear_decay(0.4)", "granularity": "row"},
        {"rule": "swapout"},
    ],
    ids=["block", "row", "unit"],
)
def test_convolutional_network(options, use_reentrant):
    """Batch norm in the branches sees the live rows once more in backward, and the same ones."""
    results = []
    for checkpointed in (False, True):
        model = residrop.create("resnet-8", **options, seed=3)
        if checkpointed:
            for block in model.blocks:
                forward = block.forward
                block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=use_reentrant)
        x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = torch.cat((model(x), model(x.flip(3))))
        results.append(gradients(model, [x], y.square().mean()))
    check_equal(*results)


@every_rule
@both_kinds
def test_sampled_passes_repeat_their_coins(kind, use_reentrant):
    """Gradients of sampled passes, taken after the context has ended and training went on."""
    results = []
    for one in (make(kind), make(kind, use_reentrant)):
        (x,) = inputs(0)
        with sampling(one):
            ys = [one(x), one(x)]
        one(x)
        results.append(gradients(one, [x], (ys[0] * ys[1]).sum()))
    check_equal(*results, exact=not use_reentrant)


# The trap


class PrivateRows(nn.Module):
    """Row skipping with a generator of its own, as it is often written: a random half of the rows enter the branch."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        rows = torch.randperm(len(x), generator=self.generator)[: len(x) // 2]
        return x.index_add(0, rows, self.branch(x[rows]))


@both_kinds
def test_private_generators_are_wrong_without_an_error(use_reentrant):
    """Checkpoints put back the global random state only: recomputation drew other rows. Here it cannot."""

    def error(build):
        found = []
        for checkpointed in (False, True):
            torch.manual_seed(0)
            block = build(nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 6)))
            (x,) = inputs(0)
            y = checkpoint(block, x, use_reentrant=use_reentrant) if checkpointed else block(x)
            (_, grads) = gradients(block, [x], F.mse_loss(y, torch.zeros(9, 6)))
            found.append(torch.cat([grad.flatten() for grad in grads]))
        return float((found[1] - found[0]).norm() / found[0].norm())

    def ours(branch):
        block = Residual(branch, None, StochasticDepth(0.5, granularity="row"))
        attach(block, seed=0)
        return block

    assert error(PrivateRows) > 0.1
    assert error(ours) == 0.0


# Compiled


quick = pytest.mark.parametrize(
    ("kind", "use_reentrant"),
    [
        pytest.param(kind, way, marks=() if kind in ("block", "row", "unit") and not way else pytest.mark.slow)
        for kind in RULES
        for way in (False, True)
    ],
)


@quick
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("way", [residrop.compile, residrop.compile_branches])
def test_compiled_with_checkpointed_blocks(kind, use_reentrant, way, compiler):
    """The partitioner recomputes in the backward graph, where it has the same window as data; Python repeats coins, and
    unit masks are made again from their key."""
    plain, model = make(kind), make(kind, use_reentrant)
    way(model, backend="aot_eager")
    for number in range(3):
        results = []
        for one in (plain, model):
            xs = inputs(number, 2)
            ys = [one(x) for x in xs]
            results.append((ys, *gradients(one, xs, (ys[0] * ys[1]).sum())))
        check_equal(*results, exact=False)


@quick
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_checkpointed_compiled_root(kind, use_reentrant, compiler):
    plain, model = make(kind), make(kind)
    compiled = torch.compile(model, backend="aot_eager")
    for number in range(3):
        results = []
        for one, run in ((plain, plain), (model, lambda x: checkpoint(compiled, x, use_reentrant=use_reentrant))):
            xs = inputs(number, 2)
            ys = [run(x) for x in xs]
            results.append((ys, *gradients(one, xs, (ys[0] * ys[1]).sum())))
        check_equal(*results, exact=False)


# Gradient accumulation


def test_micro_batches_under_one_plan_equal_the_whole_batch():
    """How a loop of one's own accumulates: one step of the sampler per update, and each micro-batch under its plan.

    Coins of blocks are the same for all parts of a step, so a network without batch norm gets the gradients of the
    whole batch. Rows and units of each part are drawn afresh.
    """
    whole, model = make("block"), make("block")
    sampler = sampler_of(model)
    for update in range(6):
        (x,) = inputs(update)
        expected = gradients(whole, [x], whole(x).square().mean())[1]

        model.zero_grad()
        for part, rows in enumerate(x.chunk(3)):
            with using(model, sampler.plan(update, part=part)):
                loss = model(rows).square().mean() / 3
            loss.backward()

        for p, grad in zip(model.parameters(), expected, strict=True):
            assert (p.grad is None) == (grad is None)
            torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-5)
    assert sampler.step == 0  # which the loop is to save: it counts its updates itself
    assert any(grad is None for grad in expected)


def test_accumulation_with_checkpoints_under_one_plan():
    plain, model = make("row"), make("row", use_reentrant=False)
    results = []
    for one in (plain, model):
        (x,) = inputs(0)
        one.zero_grad()
        losses = []
        for part, rows in enumerate(x.chunk(3)):
            with using(one, sampler_of(one).plan(7, part=part)):
                losses.append(one(rows).square().mean())
        for loss in losses:
            loss.backward(retain_graph=True)
        results.append(([x.grad], [p.grad for p in one.parameters()]))
    check_equal(*results)


def test_parts_of_a_step_share_block_coins_only():
    block, row = make("block"), make("row")
    plans = [sampler_of(block).plan(5, part=part) for part in range(3)]
    assert len({tuple(draw.alive for draw in plan.draws) for plan in plans}) == 1
    keys = {tuple(draw.key for draw in sampler_of(row).plan(5, part=part).draws) for part in range(3)}
    assert len(keys) == 3
    assert isinstance(plans[0], Plan)
