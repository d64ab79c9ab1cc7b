"""Coupled draws on models: what blocks compute, through `attach`, `apply`, `create` and recipes."""

import pytest
import torch
from torch import nn

import residrop
from residrop import sampler_of
from residrop.blocks.observe import branch_flops
from residrop.common.errors import ConfigError
from residrop.theory import depth_law, gradient_growth
from residrop.training import Recipe
from residrop.training.networks import build_network


class Counted(nn.Module):
    """A branch that adds 1 to every row that it is given, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def forward(self, x):
        self.rows += len(x)
        return torch.ones_like(x)


def counting(rates, **options):
    """A network whose output less its input is the number of blocks that were present in each row."""
    blocks = [
        residrop.Residual(Counted(), rule=residrop.StochasticDepth(rate, rescale="none", **options)) for rate in rates
    ]
    return nn.Sequential(*blocks).train()


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).train()


@pytest.mark.parametrize("granularity", ["block", "row"])
def test_every_row_has_the_same_number_of_blocks(granularity):
    model = counting([0.7] * 10, granularity=granularity)
    residrop.attach(model, coupling="systematic")
    for _ in range(20):
        assert model(torch.zeros(6, 1)).tolist() == [[7.0]] * 6
    assert sum(block.branch.rows for block in model) == 20 * 7 * 6  # and no more was computed


def test_neighbours_are_not_absent_at_once():
    model = counting([0.5] * 8, granularity="row")
    residrop.attach(model, coupling="apart")
    seen = []
    handles = [block.register_forward_hook(lambda _, x, y: seen.append((y - x[0])[:, 0])) for block in model]
    for _ in range(20):
        seen.clear()
        model(torch.zeros(5, 1))
        present = torch.stack(seen)
        assert (present[1:] + present[:-1] >= 1.0).all()
    assert len(handles) == 8


def test_a_compiled_model_obeys_coupled_rows():
    model = counting([0.5, 0.75, 0.75], granularity="row")
    residrop.attach(model, coupling="systematic", seed=2)
    wanted = [model(torch.zeros(4, 1)) for _ in range(6)]
    residrop.attach(model, coupling="systematic", seed=2)
    compiled = torch.compile(model, backend="eager")
    assert all(torch.equal(compiled(torch.zeros(4, 1)), one) for one in wanted)
    assert {float(depth) for one in wanted for depth in one.flatten()} == {2.0}


def test_work_is_balanced_by_flops_of_an_example():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    costs = branch_flops(residrop.create("resnet-14", rule="stochastic-depth"), x)
    ours = residrop.create("resnet-14", rule="stochastic-depth", survival=0.6, coupling="balanced", costs=costs)
    layers = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4, enable_nested_tensor=False
    )
    theirs, example = layers.train(), torch.randn(2, 5, 8)
    residrop.apply(theirs, survival=0.6, coupling="balanced", example=example)
    assert sampler_of(theirs).costs == branch_flops(theirs, example)
    for model in (ours, theirs):
        sampler = sampler_of(model)
        draws = [sampler.plan(step).draws for step in range(300)]
        work = [sum(cost for cost, one in zip(sampler.costs, each, strict=True) if one.alive) for each in draws]
        assert max(work) - min(work) <= max(sampler.costs)
        assert len({tuple(one.alive for one in each) for each in draws}) > 10


def test_a_model_stays_as_it_was_where_blocks_cannot_be_coupled():
    layers = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4, enable_nested_tensor=False
    )
    with pytest.raises(ConfigError, match="give costs="):
        residrop.apply(layers, survival=0.6, coupling="balanced")
    with pytest.raises(ConfigError, match="add up to 1 at least"):
        residrop.apply(layers, survival=0.3, coupling="apart")
    residrop.apply(layers, survival=0.5, coupling="apart")


def test_rates_that_would_break_the_coupling_change_nothing():
    model = counting([0.5] * 4)
    sampler = residrop.attach(model, coupling="apart")
    before = sampler.plan(3)
    with pytest.raises(ConfigError, match="add up to 1 at least"):
        residrop.set_survival(model, [0.5, 0.4, 0.5, 0.5])
    assert [block.rule.rates for block in model] == [(0.5,)] * 4
    assert sampler.plan(3) == before
    residrop.set_survival(model, [0.5, 0.6, 0.4, 0.9])
    assert sampler.rates_at(0) == [(0.5,), (0.6,), (0.4,), (0.9,)]


def test_rows_with_coins_of_their_own_are_refused():
    model = counting([0.5] * 4, granularity="row", rows="bernoulli")
    with pytest.raises(ConfigError, match="every row has a coin of its own"):
        residrop.attach(model, coupling="systematic")
    residrop.attach(model)


def test_recipes_couple_networks_of_ours_and_of_others():
    images = {"channels": 3, "size": 32, "classes": ["a", "b"]}
    for network in ("resnet-14", "torchvision:resnet18"):
        model = build_network(Recipe(network=network, survival="0.6", coupling="balanced"), images)
        sampler = sampler_of(model)
        assert sampler.coupling == "balanced"
        assert sampler.costs == branch_flops(model, torch.zeros(2, 3, 32, 32))
    with pytest.raises(ConfigError, match="draws of granularity 'unit' are independent"):
        build_network(Recipe(network="resnet-14", rule="swapout", coupling="systematic"), images)


def test_instruments_of_independent_coins_refuse_others():
    assert depth_law([0.5, 0.75, 0.5], "systematic").values.tolist() == [1.0, 2.0]
    assert depth_law([0.5, 0.75, 0.5], "systematic").probabilities.tolist() == [0.25, 0.75]
    assert depth_law([0.5, 0.5], "systematic").variance == 0.0
    with pytest.raises(ConfigError, match="has no law that follows from the rates alone"):
        depth_law([0.5, 0.75], "apart")
    model = residrop.create("stable-vanilla-4", rule="stochastic-depth", survival=0.5, coupling="systematic")
    batches = [(torch.randn(4, 256), torch.randn(4, 1))]
    with pytest.raises(ConfigError, match=r"coupled \(systematic\), and this is derived for independent coins"):
        gradient_growth(model, batches, nn.functional.mse_loss)
    assert len(gradient_growth(model, batches, nn.functional.mse_loss, rates=0.5).levels) == 4
