"""Presence in backward only: whole forwards, and the gradients of a slow reference, on average those of the network."""

import itertools
import math

import pytest
import torch
import torchvision
from torch import nn

import residrop
from residrop import BackwardDepth, Plan, Residual, StochasticDepth, attach, branch_flops, observe, sampler_of, using
from residrop.common.errors import ConfigError
from residrop.research.bench.measure import saved_bytes

WIDTH, ROWS, DEPTH = 5, 7, 3
levels = pytest.mark.parametrize("level", ["block", "row"])
rescales = pytest.mark.parametrize("rescale", ["none", "train"])


class Step(nn.Module):
    """A block with a shortcut of its own, for the generic rule."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return self.inner(x) + x


def branch(width=WIDTH):
    return nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))


def network(level="block", rescale="none", survival=0.6, *, post=None, dtype=torch.float64, seed=0):
    """Three blocks; the one in the middle has a shortcut with parameters."""
    torch.manual_seed(1)
    shortcuts = [None, nn.Linear(WIDTH, WIDTH), None]
    blocks = [Residual(branch(), skip, BackwardDepth(survival, level, rescale), post) for skip in shortcuts]
    model = nn.Sequential(*blocks).to(dtype)
    attach(model, seed=seed)
    return model


def batch(seed=0, rows=ROWS, dtype=torch.float64):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def presence(draw, rows):
    """1 where a row of the branch is present, Tensor[rows, 1]."""
    if draw.alive is not None:
        return torch.full((rows, 1), float(draw.alive), dtype=torch.float64)
    window = draw.rows(rows)
    found = torch.zeros(rows, 1, dtype=torch.float64)
    found[[(window.start + number) % rows for number in range(window.live)]] = 1.0
    return found


def reference(blocks, x, draws, factor):
    """All branches for all rows; what is absent is a constant."""
    for (skip, f, post), draw in zip(blocks, draws, strict=True):
        value = f(x)
        weight = factor * presence(draw, len(x))
        x = post(skip(x) + value.detach() + weight * (value - value.detach()))
    return x


def gradients(y, inputs):
    return torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other, rtol=1e-10, atol=1e-12)


@levels
@rescales
@pytest.mark.parametrize("post", [None, nn.Tanh(), nn.ReLU(inplace=True)], ids=["sum", "tanh", "relu"])
def test_gradients_are_those_of_the_reference(level, rescale, post):
    model, x = network(level, rescale, post=post), batch()
    parts = [(block.shortcut, block.branch, post or nn.Identity()) for block in model]
    inputs = [x, *model.parameters()]
    for step in range(12):
        plan = sampler_of(model).plan(step)
        with using(model, plan):
            y = model(x)
        expected = reference(parts, x, plan.draws, 1 / 0.6 if rescale == "train" else 1.0)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert_same(
            gradients(y, inputs),
            [torch.zeros_like(i) if g is None else g for g, i in zip(gradients(expected, inputs), inputs, strict=True)],
        )


@levels
@rescales
def test_blocks_with_a_shortcut_of_their_own(level, rescale):
    """The gradient of F alone is weighted, although the block gives x + F(x)."""
    torch.manual_seed(0)
    plain = nn.Sequential(Step(), Step(), Step()).double()
    model, x = plain, batch()
    parts = [(nn.Identity(), step.inner, nn.Identity()) for step in model]
    residrop.apply(model, "backward-depth", 0.6, granularity=level, rescale=rescale, branches=False, blocks=Step)
    inputs = [x, *model.parameters()]
    whole = model.eval()(x)
    model.train()
    for step in range(12):
        plan = sampler_of(model).plan(step)
        with using(model, plan):
            y = model(x)
        torch.testing.assert_close(y, whole, rtol=1e-12, atol=1e-12)
        expected = reference(parts, x, plan.draws, 1 / 0.6 if rescale == "train" else 1.0)
        assert_same(
            gradients(y, inputs),
            [torch.zeros_like(i) if g is None else g for g, i in zip(gradients(expected, inputs), inputs, strict=True)],
        )


def test_forwards_are_whole_to_the_last_bit():
    model, x = network(dtype=torch.float32), batch(dtype=torch.float32)
    with torch.no_grad():
        whole = model.eval()(x)
    model.train()
    for coins in itertools.product((True, False), repeat=DEPTH):
        with using(model, Plan.of(coins)):
            assert torch.equal(model(x), whole)


@pytest.mark.parametrize("rescale", ["none", "train"])
def test_mean_gradient_over_all_draws(rescale):
    """Unbiased with 1/p; without, that of a network whose Jacobians are damped by p (the docstring's formulas)."""
    rates = (0.3, 0.6, 0.9)
    model, x = network(rescale=rescale), batch()
    residrop.set_survival(model, rates)
    inputs = [x, *model.parameters()]
    mean = [torch.zeros_like(one) for one in inputs]
    for coins in itertools.product((True, False), repeat=DEPTH):
        chance = math.prod(p if coin else 1 - p for p, coin in zip(rates, coins, strict=True))
        with using(model, Plan.of(coins)):
            found = gradients(model(x), inputs)
        for total, one in zip(mean, found, strict=True):
            total += 0.0 if one is None else chance * one
    if rescale == "train":
        expected = gradients(model.eval()(x), inputs)
    else:
        y = x
        for block, p in zip(model, rates, strict=True):
            value = block.branch(y)
            y = block.shortcut(y) + value.detach() + p * (value - value.detach())
        expected = gradients(y, inputs)
    assert_same(mean, expected)


@levels
def test_second_derivatives(level):
    """Of a fixed draw the gradient is that of a function: x + F0 + w (F(x) - F0) with constants F0."""
    model, x = network(level, "train"), batch(rows=4)
    plan = sampler_of(model).plan(1)
    constants, y = [], x.detach()
    for block in model:
        constants.append(block.branch(y).detach())
        y = block.shortcut(y) + constants[-1]

    def surrogate(x):
        for block, draw, constant in zip(model, plan.draws, constants, strict=True):
            x = block.shortcut(x) + constant + presence(draw, 4) / 0.6 * (block.branch(x) - constant)
        return x

    def run(x):
        with using(model, plan):
            return model(x)

    assert torch.autograd.gradcheck(surrogate, (x,))
    first, expected = (torch.autograd.grad(f(x).pow(2).sum(), x, create_graph=True)[0] for f in (run, surrogate))
    assert_same([first], [expected.detach()])
    assert_same(torch.autograd.grad(first.sum(), x), torch.autograd.grad(expected.sum(), x))


def kept(model, x, plan):
    with using(model, plan):
        return saved_bytes(lambda: model(x).sum(), model.parameters())


def test_absent_branches_keep_nothing():
    model, x = network(dtype=torch.float32), batch(rows=64, dtype=torch.float32)
    one, two, none = (
        kept(model, x, Plan.of(coins)) for coins in ([True, False, False], [True, False, True], [False] * 3)
    )
    skips = 4 * WIDTH * 64  # the input of the learned shortcut
    assert none == skips
    assert skips < one < two


def test_absent_rows_keep_nothing():
    """A step at survival 0.5 keeps half of what the whole network does: every branch gets a copy of its live rows."""
    model, x = network("row", survival=0.5, dtype=torch.float32), batch(rows=64, dtype=torch.float32)
    skips = 4 * WIDTH * 64
    half, whole = (kept(model, x, plan) for plan in (sampler_of(model).plan(0), sampler_of(model).expectation()))
    hidden = 4 * 64 * (WIDTH + 2 * WIDTH) * 3  # what enters each linear layer of three branches
    assert whole <= hidden + skips
    assert half <= hidden / 2 + skips


def test_optimizers_leave_absent_blocks_alone():
    """ "No effect" and parameters that move all the same (OptimalScale/LMFlow#726): decay and momentum, too."""
    model, x = network(dtype=torch.float32), batch(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for plan in (Plan.of([True] * 3), Plan.of([True, False, True])):
        before = [p.detach().clone() for p in model[1].branch.parameters()]
        others = [p.detach().clone() for block in (model[0], model[2]) for p in block.parameters()]
        optimizer.zero_grad()
        with using(model, plan):
            model(x).sum().backward()
        optimizer.step()
    assert all(p.grad is None for p in model[1].branch.parameters())
    assert all(p.grad is not None for p in model[1].shortcut.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model[1].branch.parameters(), strict=True))
    assert not any(
        torch.equal(a, b)
        for a, b in zip(others, (p for block in (model[0], model[2]) for p in block.parameters()), strict=True)
    )


def test_autocast_keeps_no_weights_without_gradient():
    """Autocast keeps the bf16 copy of a weight for all of its context. In older torch one that was made where nothing
    is recorded has no gradient, and the next step trains nothing (pytorch/pytorch#112583, mended by #165068)."""
    model, x = network(dtype=torch.float32), batch(dtype=torch.float32)
    kept = []
    model[0].branch[0].register_forward_hook(lambda *_: kept.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        for coins in ([False] * 3, [True] * 3):
            with using(model, Plan.of(coins)):
                y = model(x)
    assert kept == [False, True]
    y.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_autocast_at_row_level():
    model, x = network("row", survival=0.5, dtype=torch.float32), batch(rows=8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), using(model, sampler_of(model).plan(0)):
        y = model(x)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_batch_norm():
    """Its statistics move in every forward, and rows cannot be run apart."""
    norm = nn.BatchNorm1d(WIDTH)
    block = Residual(nn.Sequential(norm, nn.Linear(WIDTH, WIDTH)), None, BackwardDepth(0.5))
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), block)
    attach(model)
    with using(model, Plan.of([False])):
        model(batch(dtype=torch.float32)).sum().backward()
    assert int(norm.num_batches_tracked) == 1
    assert norm.weight.grad is None
    block.rule = BackwardDepth(0.5, "row")
    with pytest.raises(ConfigError, match="BatchNorm1d takes statistics of the whole batch; use granularity='block'"):
        attach(model)


def test_apply_refuses_batch_norm_by_rows_and_changes_nothing():
    model = torchvision.models.resnet18()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match="use granularity='block'"):
        residrop.apply(model, "backward-depth", 0.5, granularity="row")
    assert [type(module) for module in model.modules()] == before


def test_refusals():
    with pytest.raises(ConfigError, match="forwards of BackwardDepth are whole"):
        BackwardDepth(0.5, rescale="test")
    with pytest.raises(ConfigError, match="takes no option 'rows'"):
        residrop.make_rule("backward-depth", 0.5, rows="bernoulli")


def test_measurements_see_branches_left_out():
    """In eval mode a given plan leaves branches out, so that costs and what a branch does can be measured."""
    model, other = network(rescale="train", dtype=torch.float32), network(dtype=torch.float32)
    for block in other:
        block.rule = StochasticDepth(0.6, rescale="none")
    attach(other)
    x = batch(dtype=torch.float32)
    for one in (model, other):
        one.eval()
    with using(model, Plan.of([False, True, False])), using(other, Plan.of([False, True, False])):
        assert torch.equal(model(x), other(x))
    assert branch_flops(model, x) == branch_flops(other, x)
    assert torch.equal(model(x), model[2](model[1](model[0](x))))


def test_sampled_passes_are_whole():
    """Random sub-networks of a network that was never trained without its branches would say nothing."""
    model, x = network(dtype=torch.float32), batch(dtype=torch.float32).detach()
    with torch.no_grad():
        whole = model.eval()(x)
        with residrop.sampling(model):
            assert all(torch.equal(model(x), whole) for _ in range(8))
    found = residrop.predict(model, x, samples=8)
    torch.testing.assert_close(found.probabilities, whole.softmax(1))
    assert float(found.standard_error.max()) < 1e-6


def test_no_graph_of_sampled_passes(tmp_path):
    with pytest.raises(ConfigError, match="no rule that draws"):
        residrop.export(network(dtype=torch.float32), tmp_path / "model.pt2", batch(dtype=torch.float32), sampled=True)


def test_skipped_flops_are_those_of_backward():
    model, x = network(dtype=torch.float32), batch(dtype=torch.float32)
    with observe(model, branch_flops(model, x)) as seen:
        for coins in ([True] * 3, [False] * 3):
            with using(model, Plan.of(coins)):
                model(x)
    assert seen.survival == (0.5, 0.5, 0.5)
    assert seen.skipped_flops == pytest.approx(1 / 3)


def test_a_budget_of_flops_counts_the_forward_of_absent_branches():
    """A third of a branch's work in training is its forward, which is never saved."""
    model, x = network(dtype=torch.float32), batch(dtype=torch.float32)
    costs = residrop.theory.costs_of(model, "flops", x)
    share = 0.7
    rates = residrop.survival_for(model, f"{share} of flops", batches=[(x, x)])
    work = costs.fixed + sum(cost * (1 / 3 + 2 / 3 * rate) for cost, rate in zip(costs.branches, rates, strict=True))
    assert work == pytest.approx(share * costs.total)
    with pytest.raises(ConfigError, match="cannot be met"):
        residrop.survival_for(model, "0.3 of flops", batches=[(x, x)])


def test_theory_of_forwards_that_leave_branches_out_refuses_whole_ones():
    model, x = network(dtype=torch.float32), batch(dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"are whole \(BackwardDepth\), and this is derived for those that leave"):
        residrop.theory.gradient_growth(model, [(x, x)], loss=torch.nn.functional.mse_loss)


def test_at_least_one_block_is_differentiated():
    """A frozen backbone at a low rate: without `at_least` most steps would have no gradient at all."""
    model, x = network(survival=0.1, dtype=torch.float32), batch(dtype=torch.float32).detach()
    model[1].shortcut.requires_grad_(False)
    attach(model, at_least=1)
    for _ in range(50):
        assert model(x).requires_grad


def test_a_step_that_trains_nothing_is_told():
    model, x = network(dtype=torch.float32), batch(dtype=torch.float32).detach()
    model[1].shortcut.requires_grad_(False)
    residrop.set_survival(model, (0.0, 0.0, 0.0))
    with pytest.warns(residrop.EmptyStepWarning, match="at_least=1"):
        model(x)
