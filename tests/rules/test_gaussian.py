"""`GaussianDepth`: its numbers, and what it shares with the coins it takes the place of."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import residrop
from conformance import Affine, Counted
from helpers import ALPHA, assert_chi_square, assert_mean, seed
from reference import normal_of
from residrop import GaussianDepth, Plan, Residual, StochasticDepth, attach, branch_flops, observe, sampler_of, using
from residrop.common.errors import ConfigError, PlanError
from residrop.functional import row_normal
from residrop.schedule.sampler import DepthSampler, Draw
from residrop.theory import costs_of, survival_for


def numbers(steps, blocks=20, p=0.5, **options):
    """xi of every step and block, out of the factors."""
    rules = [GaussianDepth(p, **options) for _ in range(blocks)]
    model = nn.Sequential(*(Residual(nn.Identity(), rule=rule) for rule in rules))
    sampler = attach(model, seed=seed(3))
    found = []
    for step in range(steps):
        with using(model, sampler.plan(step)):
            found.append([rule.factor(1) for rule in rules])
    return (np.asarray(found, float).reshape(steps, blocks) - p) / math.sqrt(p * (1 - p))


def assert_standard_normal(xi):
    """Mean, variance (the law of chi-square), ten equal cells, and the largest gap of distribution functions."""
    xi = np.ravel(xi)
    assert_mean(xi, 0.0)
    squares = float(np.square(xi).sum())
    assert stats.chi2(len(xi)).ppf(ALPHA / 2) < squares < stats.chi2(len(xi)).isf(ALPHA / 2)
    counts = np.histogram(stats.norm.cdf(xi), bins=10, range=(0, 1))[0]
    assert_chi_square(counts, [0.1] * 10)
    assert stats.kstest(xi, "norm").pvalue > ALPHA


def test_numbers_of_blocks_are_standard_normal():
    xi = numbers(500)
    assert_standard_normal(xi)
    assert_standard_normal((xi[:, 1:] + xi[:, :-1])[:, ::2] / math.sqrt(2))  # neighbouring blocks are independent
    assert_standard_normal((xi[1::2] - xi[::2]) / math.sqrt(2))  # and neighbouring steps


def test_numbers_of_rows_are_standard_normal():
    xi = np.stack([row_normal(1000, key) for key in range(20)])
    assert_standard_normal(xi)
    assert_standard_normal((xi[:, 1:] + xi[:, :-1])[:, ::2] / math.sqrt(2))
    assert_standard_normal((xi[1::2] - xi[::2]) / math.sqrt(2))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("rescale", ["test", "train", "none"])
def test_mean_and_variance_are_those_of_the_coin(p, rescale):
    rule, coin = GaussianDepth(p, rescale=rescale), StochasticDepth(p, rescale=rescale)
    sampler = attach(Residual(nn.Identity(), rule=rule), seed=seed(5))
    factors = []
    for step in range(4000):
        with sampler.giving(sampler.plan(step)):
            factors.append(rule.factor(1))
    factors = np.asarray(factors)
    alive = coin.scale(Draw((p,), alive=True))
    assert_mean(factors, p * alive)
    assert_mean(np.square(factors - p * alive), p * (1 - p) * alive**2)


def test_one_number_for_an_update_and_all_ranks():
    block, row = GaussianDepth(0.5).site, GaussianDepth(0.5, "row").site
    ranks = [DepthSampler([block, row], seed=1, rank=rank) for rank in (0, 1)]
    for step in range(5):
        first, second = (ranks[0].plan(step, part=part).draws for part in (0, 1))
        other = ranks[1].plan(step).draws
        assert first[0] == second[0] == other[0]
        assert len({first[1], second[1], other[1]}) == 3


def test_numbers_do_not_depend_on_the_neighbours():
    """A plan of mixed rules gives coins and numbers what they have alone."""
    gaussian, coin = GaussianDepth(0.5).site, StochasticDepth(0.5).site
    mixed, alone = DepthSampler([coin, gaussian], seed=2), DepthSampler([coin, coin], seed=2)
    numbers_only = DepthSampler([gaussian, gaussian], seed=2)
    for step in range(20):
        draws = mixed.plan(step).draws
        assert draws[0] == alone.plan(step).draws[0]
        assert draws[1] == numbers_only.plan(step).draws[1]


@pytest.mark.filterwarnings("ignore::residrop.common.errors.InactiveWarning")  # rates of 1 are meant here
@pytest.mark.parametrize("granularity", ["block", "row"])
@pytest.mark.parametrize("rescale", ["test", "train", "none"])
def test_certain_rates(granularity, rescale):
    x = torch.randn(5, 4)
    for p in (0.0, 1.0):
        block = Residual(Counted(Affine((4,), 0)), rule=GaussianDepth(p, granularity, rescale))
        attach(block)
        for _ in range(3):
            torch.testing.assert_close(block(x), x + p * block.branch.inner(x), rtol=0, atol=0)
        assert block.branch.calls == [5] * (3 if p else 0)


def test_other_ranks_get_gradients_of_zero_where_no_branch_is_computed(monkeypatch):
    block = Residual(Counted(nn.Linear(4, 4)), rule=GaussianDepth(0.0))
    attach(block)
    monkeypatch.setattr("residrop.rules.gaussian.dist.is_initialized", lambda: True)
    monkeypatch.setattr("residrop.rules.gaussian.dist.get_world_size", lambda: 2)
    x = torch.randn(3, 4)
    y = block(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert block.branch.calls == [1]
    assert not any(parameter.grad.any() for parameter in block.parameters())
    block.eval()(x)
    assert block.branch.calls == [1]


@pytest.mark.parametrize("granularity", ["block", "row"])
def test_every_branch_is_computed_and_gets_a_gradient(granularity):
    model = nn.Sequential(*(Residual(Counted(nn.Linear(4, 4)), rule=GaussianDepth(0.3, granularity)) for _ in range(4)))
    attach(model)
    for step in range(1, 6):
        model.zero_grad()
        model(torch.randn(3, 4)).square().sum().backward()
        assert all(block.branch.calls == [3] * step for block in model)
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_number_under_a_timing_is_that_of_the_rate_in_force():
    rule = GaussianDepth(0.5)
    block = Residual(Affine((4,), 0), rule=rule)
    sampler = attach(block, timing="warmup(4)")
    x = torch.randn(3, 4)
    for rate in (1.0, 0.875, 0.75, 0.625, 0.5, 0.5):
        xi = normal_of(sampler.plan().draws[0].key)
        m = rate + math.sqrt(rate * (1 - rate)) * xi
        torch.testing.assert_close(block(x), x + m * block.branch(x))


@pytest.mark.filterwarnings("ignore::residrop.common.errors.InactiveWarning")  # rates of 1 are meant here
def test_plain_passes_are_known_as_such():
    """So that an applied block runs its own class's forward there."""
    for p, rescale, trained, predicted in (
        (0.5, "train", False, True),
        (0.5, "test", False, False),
        (1.0, "test", True, True),
    ):
        for granularity in ("block", "row"):
            rule = GaussianDepth(p, granularity, rescale)
            block = Residual(nn.Identity(), rule=rule)
            with using(block, attach(block).plan(0)):
                assert rule.is_plain_sum() == trained
            assert block.eval().rule.is_plain_sum() == predicted


def test_coins_are_refused():
    block = Residual(nn.Identity(), rule=GaussianDepth(0.5))
    attach(block)
    with pytest.raises(PlanError), using(block, Plan.of([True])):
        block(torch.ones(2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_factors_keep_precision_in_half(dtype):
    """The factor is no number of the tensor's dtype: rounding the product only is at most half a unit."""
    rule = GaussianDepth(0.9, "row")
    block = Residual(nn.Identity(), rule=rule)
    f = torch.linspace(1.0, 2.0, 64).to(dtype).view(-1, 1)
    with using(block, attach(block).plan(0)):
        y = rule(f, torch.zeros_like, nn.Identity())
        factors = rule.factor(64)
    exact = f.double().squeeze(1) * factors
    torch.testing.assert_close(y.squeeze(1), exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    wrong = (f * factors.to(dtype).view(-1, 1)).squeeze(1)
    assert (y.squeeze(1).double() - exact).abs().mean() < (wrong.double() - exact).abs().mean()


# Compiled, applied, predicted with


compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@compiles
@pytest.mark.parametrize("granularity", ["block", "row"])
def test_compiled_numbers_are_drawn_at_every_pass(granularity):
    torch._dynamo.reset()

    def network():
        blocks = (Residual(Affine((4,), i), rule=GaussianDepth(0.5, granularity), post=nn.Tanh()) for i in range(3))
        model = nn.Sequential(*blocks)
        attach(model, seed=1)
        return model

    plain, model, x = network(), network(), torch.randn(6, 4)
    graphs, made = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    for step in range(12):
        torch.testing.assert_close(compiled(x), plain(x), msg=f"step {step}")
        made.append(len(graphs))
    assert made[0] == made[-1]


@compiles
@pytest.mark.parametrize("granularity", ["block", "row"])
def test_compiled_branches(granularity):
    plain, model = (
        residrop.create("resnet-8", rule="gaussian-depth", granularity=granularity, seed=1) for _ in range(2)
    )
    residrop.compile(model, backend="eager")
    x = torch.randn(4, 3, 8, 8)
    for _ in range(3):
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("granularity", ["block", "row"])
def test_applied_to_a_foreign_model(granularity):
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).eval()
    x = torch.randn(4, 3, 32, 32)
    before = model(x)
    residrop.apply(model, "gaussian-depth", survival=0.5, granularity=granularity, seed=2)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)  # rescaled in training: it predicts as before
    model.train()
    assert not torch.equal(model(x), model(x))
    residrop.remove(model)
    with torch.no_grad():
        model.eval()(x)


def test_samples_fold_and_export():
    model = residrop.create("resnet-8", rule="gaussian-depth", survival=0.5, seed=1)
    x = torch.randn(4, 3, 16, 16)
    for _ in range(3):
        model(x)
    one, again = residrop.predict(model, x, 5), residrop.predict(model, x, 5)
    assert torch.equal(one.probabilities, again.probabilities)
    assert float(one.standard_error.max()) > 0.0
    singly = []
    with residrop.sampling(model), torch.no_grad():
        singly = [model(x).softmax(dim=1) for _ in range(5)]
    torch.testing.assert_close(one.probabilities, torch.stack(singly).mean(dim=0), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(residrop.fold(model, x)(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    from residrop.inference.deploy.sampled_graph import SampledGraph

    with pytest.raises(ConfigError, match="has a GaussianDepth, whose numbers are no coins"):
        SampledGraph.of(model)


def test_nothing_is_counted_as_skipped():
    for granularity in ("block", "row"):
        model = residrop.create("resnet-8", rule="gaussian-depth", survival=0.3, granularity=granularity)
        x = torch.randn(4, 3, 8, 8)
        assert branch_flops(model, x) == (0, 0, 0)
        with observe(model, flops=[1, 2, 3]) as seen:
            for _ in range(4):
                model(x)
        assert seen.skipped_flops == 0.0
        assert seen.survival == pytest.approx((0.3, 0.3, 0.3))


def test_time_per_block_is_refused_and_rates_are_not():
    model = residrop.create("resnet-8", rule="gaussian-depth", survival=0.5)
    with pytest.raises(ConfigError, match="by leaving blocks out"):
        costs_of(model, "time", torch.randn(2, 3, 8, 8))
    assert survival_for(model, 0.6) == pytest.approx((0.6, 0.6, 0.6))
    assert sampler_of(model).step == 0
