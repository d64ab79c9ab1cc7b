"""Swapout's general form: its limits are the other networks, and earlier outputs and repeated branches are summed."""

import pytest
import torch
from torch import nn

import residrop
from residrop import Mix, Residual, Swapout, sampler_of, using
from residrop.blocks.residual import Chain
from residrop.common.errors import ConfigError
from residrop.functional import unit_mask

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def network(rule="mix", name="resnet-14", **options):
    return residrop.create(name, rule=rule, seed=3, classes=5, **options)


def result(model, x=X):
    """Output and gradients of a training pass."""
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


def assert_same(a, b, tolerance=0.0):
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore::residrop.InactiveWarning")
@pytest.mark.parametrize("block", ["v1", "v2"])
def test_all_present_is_the_residual_network(block):
    assert_same(result(network(survival=1, theta_2=1, block=block)), result(network("constant", block=block)))


@pytest.mark.parametrize("block", ["v1", "v2"])
def test_branch_alone_is_the_feed_forward_network(block):
    model = network(survival=0, theta_2=1, block=block)
    plain = nn.Sequential(model.stem, *(nn.Sequential(b.branch, b.post) for b in model.blocks), model.tail)
    found = model(X)
    torch.testing.assert_close(found, plain(X), rtol=0, atol=0)


def test_shortcut_alone_is_the_network_without_branches():
    model = network(survival=1, theta_2=0)
    plain = nn.Sequential(model.stem, *(nn.Sequential(b.shortcut, b.post) for b in model.blocks), model.tail)
    torch.testing.assert_close(model(X), plain(X), rtol=0, atol=0)


def test_swapout_is_a_point():
    assert_same(result(network(survival="linear(1, 0.5)")), result(network("swapout", survival="linear(1, 0.5)")))


@pytest.mark.parametrize(("theta_1", "with_skip"), [(0.0, False), (1.0, True)])
def test_dropout_without_and_with_a_skip_are_points(theta_1, with_skip):
    block = Residual(nn.Linear(50, 50), rule=Mix((theta_1, 0.3)))
    residrop.attach(block, seed=1)
    x = torch.randn(20, 50)
    plan = sampler_of(block).plan(0)
    with using(block, plan):
        y = block(x)
    mask = unit_mask(x, 0.3, plan.draws[0].key, coin=1)
    torch.testing.assert_close(y, block.branch(x) * mask + (x if with_skip else 0.0))


def test_skipforward_is_mix_under_one_coin():
    """Complementary masks: every unit is F(X) or X; never both, never neither."""
    block = Residual(nn.Linear(50, 50), rule=residrop.SkipForward(0.3))
    residrop.attach(block, seed=1)
    x = torch.randn(20, 50)
    y, f = block(x), block.branch(x)
    assert torch.equal((y == x) ^ (y == f), torch.ones_like(x, dtype=torch.bool))


@pytest.mark.filterwarnings("ignore::residrop.InactiveWarning")
def test_stochastic_depth_is_mix_with_one_coin_for_all_units():
    block = Residual(nn.Linear(6, 6), rule=residrop.StochasticDepth(0.5))
    sampler = residrop.attach(block, seed=1)
    limits = [Residual(block.branch, rule=Mix((1.0, rate))) for rate in (0.0, 1.0)]
    for limit in limits:
        residrop.attach(limit, seed=2)
    x = torch.randn(3, 6)
    seen = set()
    for step in range(20):
        plan = sampler.plan(step)
        seen.add(plan.draws[0].alive)
        with using(block, plan):
            torch.testing.assert_close(block(x), limits[plan.draws[0].alive](x), rtol=0, atol=0)
    assert seen == {True, False}


# Earlier outputs


def slow_reference(model, plan):
    """Every unit's sum written out: masks as numbers, the outputs of a stage in a list."""
    x, stage, draws = model.stem(X), [], iter(plan.draws)
    for block in model.blocks:
        if not isinstance(block, Residual):  # a pool between stages
            x = block(x)
            continue
        draw = next(draws)
        uses = [block.branch(x)]
        if stage and stage[-1].shape != uses[0].shape:
            stage = []
        while len(uses) < block.rule.repeat:
            uses.append(block.branch(uses[-1]))
        terms = [block.shortcut(x), *uses, *(stage[:-1] if block.rule.earlier else [])]
        masks = [unit_mask(t, r, draw.key, coin) for coin, (t, r) in enumerate(zip(terms, draw.rates, strict=True))]
        x = block.post(sum(t * m for t, m in zip(terms, masks, strict=True)))
        stage.append(x)
    return model.tail(x)


@pytest.mark.parametrize("options", [{"earlier": 0.8}, {"repeat": 3}, {"earlier": 0.5, "repeat": 2, "theta_2": 0.4}])
@pytest.mark.parametrize("name", ["resnet-26", "resnet-ours-26"])
def test_network_equals_slow_reference(options, name):
    model = network(name=name, survival=0.6, block="v2" if "ours" in name else "v1", **options)
    plan = sampler_of(model).plan(5)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with using(model, plan):
        y = model(X)
    model.load_state_dict(state)
    torch.testing.assert_close(y, slow_reference(model, plan), rtol=1e-4, atol=1e-5)


def test_places_and_rates_of_a_stage():
    model = network(name="resnet-32", survival=0.5, earlier=0.6, repeat=2)
    rules = [block.rule for block in model.blocks]
    assert [rule.earlier for rule in rules] == [0, 0, 1, 2, 3] * 3
    assert [rule.repeat for rule in rules] == [1, 2, 2, 2, 2] * 3
    for rule in [rule for rule in rules if rule.earlier]:
        assert sum(rule.rates[-rule.earlier :]) == pytest.approx(0.6)


def test_expectation_sums_earlier_outputs():
    block = Mix((0.5, 0.25, 0.1, 0.2)).eval()
    x, f, a, b = torch.randn(4, 3, 2).unbind(0)
    torch.testing.assert_close(block(x, nn.Identity(), lambda _: f, a, b), 0.5 * x + 0.25 * f + 0.1 * a + 0.2 * b)


def test_memory_stays_linear_in_depth():
    """What is kept for backward per block does not grow with depth."""
    from residrop.research.bench.measure import saved_bytes

    kept = []
    for blocks in (8, 16, 32):
        rules = [Mix.in_stage(0.5, earlier=1.0, place=place) for place in range(blocks)]
        chain = Chain(*(Residual(nn.Linear(64, 64), rule=rule) for rule in rules))
        residrop.attach(chain, seed=0)
        x = torch.randn(128, 64, requires_grad=True)
        kept.append(saved_bytes(lambda chain=chain, x=x: chain(x), chain.parameters()) / blocks)
    assert kept[2] <= 1.05 * kept[0]


def test_trains_and_predicts():
    model = network(name="resnet-14", survival="linear(1, 0.5)", earlier=0.5, repeat=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(X), torch.tensor([0, 1, 2, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < sum(losses[:4])
    assert residrop.predict(model, X, samples=3).probabilities.shape == (4, 5)


def test_bad_settings():
    with pytest.raises(ConfigError, match="one for each of the 3 uses"):
        Mix((0.5, 0.5), repeat=3)
    with pytest.raises(ConfigError, match="earlier"):
        network(earlier=1.5)
    with pytest.raises(ConfigError, match="repeat"):
        network(repeat=0)
    with pytest.raises(ConfigError, match="earlier"):
        network("swapout", earlier=0.5)
    with pytest.raises(ConfigError, match="thetas"):
        Mix((0.5, 0.5, 0.5)).eval()(X, nn.Identity(), nn.Identity())
    assert isinstance(network("swapout").blocks[0].rule, Swapout)
