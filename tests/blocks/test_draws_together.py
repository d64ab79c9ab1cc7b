"""Draws of several blocks and of several forwards: coupled, one block at least, one draw of an update."""

import itertools
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import residrop
from helpers import assert_binomial
from residrop import sampler_of
from residrop.blocks.observe import branch_flops, observe
from residrop.common.errors import ConfigError, EmptyStepWarning
from residrop.schedule.sampler import DepthSampler, Site
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
    for block in model:
        block.register_forward_hook(lambda _, x, y: seen.append((y - x[0])[:, 0]))
    for _ in range(20):
        seen.clear()
        model(torch.zeros(5, 1))
        present = torch.stack(seen)
        assert (present[1:] + present[:-1] >= 1.0).all()


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
    with pytest.raises(ConfigError, match="and coupling is 'balanced'"):
        residrop.apply(layers, survival=0.3, coupling="balanced", at_least=1, example=torch.randn(2, 5, 8))
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


# One block at least


def test_steps_without_blocks_are_drawn_again_from_the_conditional_law():
    rates, steps = (0.2, 0.05, 0.3, 0.1), 20_000
    model = counting(rates)
    sampler, free = residrop.attach(model, at_least=1), DepthSampler([Site((rate,)) for rate in rates])
    coins = [tuple(draw.alive for draw in sampler.plan(step).draws) for step in range(steps)]
    assert all(map(any, coins))
    some = 1.0 - math.prod(1.0 - rate for rate in rates)
    for outcome in itertools.product((False, True), repeat=4):
        law = math.prod(rate if alive else 1.0 - rate for rate, alive in zip(rates, outcome, strict=True)) / some
        assert_binomial(coins.count(outcome), steps, law if any(outcome) else 0.0, f"{outcome}")
    kept = [tuple(draw.alive for draw in free.plan(step).draws) for step in range(steps)]
    assert all(again == first for again, first in zip(coins, kept, strict=True) if any(first))


def test_ranks_draw_again_alike():
    sites = [Site((0.05,))] * 6
    first, other = (DepthSampler(sites, at_least=1, rank=rank) for rank in range(2))
    assert [first.plan(step) for step in range(200)] == [other.plan(step) for step in range(200)]
    own = [Site((0.05,), "block", "per_rank")] * 6
    first, other = (DepthSampler(own, at_least=1, rank=rank) for rank in range(2))
    assert [first.plan(step) for step in range(200)] != [other.plan(step) for step in range(200)]


def test_a_frozen_backbone_is_trained_in_every_step_or_the_warning_says_why_not():
    def frozen(**options):
        layers = encoder()
        layers.requires_grad_(False)
        for layer in layers.layers:
            layer.linear2.requires_grad_(True)
        residrop.apply(layers, survival=0.1, branches=False, **options)
        return layers

    x = torch.randn(2, 5, 8)
    with pytest.warns(EmptyStepWarning, match=r"needs no gradient .* at_least=1"):
        outputs = [frozen_model(x) for frozen_model in [frozen()] for _ in range(10)]
    with pytest.raises(RuntimeError, match="does not require grad"):
        next(one for one in outputs if not one.requires_grad).sum().backward()
    model = frozen(at_least=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            model(x).sum().backward()


@pytest.mark.parametrize(
    ("rates", "options", "message"),
    [
        ([0.0, 0.0], {"at_least": 1}, "a survival rate above 0"),
        ([0.5, 0.5], {"at_least": 2}, "at_least is 2; give 1"),
        ([0.5, 0.5], {"at_least": 1, "coupling": "systematic"}, "with independent coins, and coupling is 'systematic'"),
    ],
)
def test_what_cannot_be_had_at_least_is_refused(rates, options, message):
    with pytest.raises(ConfigError, match=message):
        residrop.attach(counting(rates), **options)
    sites = [Site((0.5,)), Site((0.5,), "block", "per_rank")]
    with pytest.raises(ConfigError, match="blocks of one scope"):
        DepthSampler(sites, at_least=1)


# One draw, and forwards that are no steps


def test_forwards_of_one_update_share_a_draw():
    model = counting([0.5] * 12)
    sampler = residrop.attach(model)
    for step in range(5):
        with residrop.one_draw(model):
            depths = {float(model(torch.zeros(1, 1))) for _ in range(3)}
            assert float(model.eval()(torch.zeros(1, 1))) == 12.0  # in expectation, without rescaling
            model.train()
        wanted = sum(draw.alive for draw in sampler.plan(step).draws)
        assert depths == {wanted}
        assert sampler.step == step + 1


def test_an_update_that_fails_is_no_step():
    model = counting([0.5] * 12)
    sampler = residrop.attach(model)

    def update():
        with residrop.one_draw(model):
            model(torch.zeros(1, 1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        update()
    assert sampler.step == 0


@pytest.mark.parametrize("optimizer", ["sam", "lbfgs"])
def test_optimizers_of_several_forwards_see_one_function(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(*[residrop.Residual(nn.Linear(4, 4), rule=residrop.StochasticDepth(0.5)) for _ in range(6)])
    sampler = residrop.attach(model.train())
    x, seen = torch.randn(8, 4), []
    model.register_forward_hook(lambda *_: seen.append(sampler.in_force.plan))
    if optimizer == "lbfgs":
        steps = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")

        def closure():
            steps.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            with residrop.one_draw(model):
                steps.step(closure)
    else:
        for _ in range(3):
            with residrop.one_draw(model):
                model(x).square().mean().backward()
                shift = [(one, 0.05 * one.grad) for one in model.parameters() if one.grad is not None]
                with torch.no_grad():
                    for one, by in shift:
                        one += by
                model.zero_grad()
                model(x).square().mean().backward()
                with torch.no_grad():
                    for one, by in shift:
                        one -= by + 0.1 * (one.grad if one.grad is not None else 0.0)
    assert sampler.step == 3
    assert [plan.step for plan in dict.fromkeys(seen)] == [0, 1, 2]
    assert len(seen) >= 6


@pytest.mark.parametrize("level", ["block", "row"])
def test_both_forwards_of_a_preference_loss_see_one_network(level):
    """The answers to be preferred and the others in two forwards, as for a DPO loss: the gradient is that of the two
    under one plan, and answers that are the same differ in nothing."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=6)).train()
    residrop.apply(model, survival=0.5, granularity=level)
    sampler = sampler_of(model)
    chosen, rejected = torch.randint(64, (2, 4, 10))

    def log_probability(tokens):
        found = model(input_ids=tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
        return found.gather(-1, tokens[:, 1:, None]).sum((1, 2))

    def gradients(other, context):
        model.zero_grad()
        with context:
            margin = log_probability(chosen) - log_probability(other)
            nn.functional.softplus(-margin).sum().backward()
        return margin.detach(), [one.grad for one in model.parameters()]

    for step in range(3):
        plan = sampler.plan(step)
        ours = gradients(rejected, residrop.one_draw(model))
        assert sampler.step == step + 1
        theirs = gradients(rejected, residrop.using(model, plan))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))
        assert torch.equal(ours[0], theirs[0])
        sampler.step = step
        same, _ = gradients(chosen, residrop.one_draw(model))
        assert not same.any()
    sampler.step = 0
    apart = [gradients(chosen, nullcontext())[0] for _ in range(3)]
    assert all(one.any() for one in apart)  # without it the two are of different networks


def test_forwards_without_gradients_are_no_steps():
    model = counting([0.5] * 12)
    sampler = residrop.attach(model)
    with observe(model) as seen:
        for _ in range(3):
            model(torch.zeros(1, 1))
            with torch.no_grad():
                for _ in range(4):
                    model(torch.zeros(1, 1))
    assert (sampler.step, seen.steps) == (3, 3)


def test_forwards_without_gradients_have_draws_of_their_own():
    """As `torch.optim.swa_utils.update_bn` makes them."""
    model, alike = counting([0.5] * 12), counting([0.5] * 12)
    x = torch.zeros(1, 1)
    for one in (model, alike):
        residrop.attach(one, seed=4)
    with torch.no_grad():
        looks = [float(model(x)) for _ in range(400)]
        assert [float(alike(x)) for _ in range(400)] == looks
    assert_binomial(int(sum(looks)), 400 * 12, 0.5, "presence")
    assert len(set(looks)) > 4
    free = counting([0.5] * 12)
    residrop.attach(free, seed=4)
    assert [float(model(x)) for _ in range(20)] == [float(free(x)) for _ in range(20)]


def test_rates_of_zero_are_refused_where_one_block_is_to_be_present():
    model = counting([0.5] * 3)
    residrop.attach(model, at_least=1)
    with pytest.raises(ConfigError, match="a survival rate above 0"):
        residrop.set_survival(model, [0.0] * 3)
    assert [block.rule.rates for block in model] == [(0.5,)] * 3


def test_one_draw_inside_of_another_is_one_step():
    model = counting([0.5] * 3)
    sampler = residrop.attach(model)
    with residrop.one_draw(model), residrop.one_draw(model):
        model(torch.zeros(1, 1))
    assert sampler.step == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_forwards_of_a_root_are_steps(use_reentrant):
    model = nn.Sequential(*[residrop.Residual(nn.Linear(4, 4), rule=residrop.StochasticDepth(0.5)) for _ in range(6)])
    sampler = residrop.attach(model.train())
    for step in range(3):
        x = torch.randn(2, 4, requires_grad=True)
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
        assert sampler.step == step + 1


def test_coins_last_and_rows_do_not():
    """Of blocks for `draw_every` steps; at every step all the same for rows, and for what is sampled."""
    sites = [Site((0.5,)), Site((0.5,)), Site((0.5,), "row"), Site((0.5,))]
    held, free = DepthSampler(sites, seed=5, draw_every=4), DepthSampler(sites, seed=5)
    for step in range(40):
        plan, first, own = held.plan(step), free.plan(step - step % 4), free.plan(step)
        assert plan.step == step
        assert [plan.draws[i] for i in (0, 1, 3)] == [first.draws[i] for i in (0, 1, 3)]
        assert plan.draws[2] == own.draws[2]
        assert held.plan(step, stream="sample") == free.plan(step, stream="sample")
    assert len({tuple(d.alive for d in held.plan(step).draws) for step in range(0, 40, 4)}) > 2


def test_coins_last_while_rates_move():
    """A block goes when its rate falls below its number, and stays away until the next draw."""
    sampler = DepthSampler([Site((0.0,))] * 20, seed=1, timing="warmup(50)", draw_every=50)
    alive = [[draw.alive for draw in sampler.plan(step).draws] for step in range(50)]
    for before, after in itertools.pairwise(alive):
        assert all(b or not a for b, a in zip(before, after, strict=True))
    assert sum(alive[0]) == 20
    assert sum(alive[-1]) < 5


def test_a_fixed_number_of_layers_is_trained_for_some_steps():
    """LISA's form (Pan et al. 2024): 2 of 6 layers for 5 steps; the others have no gradient and do not move, what lies
    outside of blocks is always trained, and with time every layer is."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6)]
    blocks = [residrop.Residual(layer, rule=residrop.BackwardDepth(2 / 6)) for layer in layers]
    model = nn.Sequential(nn.Linear(4, 4), *blocks, nn.Linear(4, 2))
    residrop.attach(model, seed=2, coupling="systematic", draw_every=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained = []
    for step in range(60):
        before = [layer[0].weight.detach().clone() for layer in layers]
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().sum().backward()
        assert model[0].weight.grad is not None
        optimizer.step()
        moved = [not torch.equal(layer[0].weight, old) for layer, old in zip(layers, before, strict=True)]
        assert moved == [layer[0].weight.grad is not None for layer in layers]
        assert sum(moved) == 2
        trained.append(moved)
        assert moved == trained[step - step % 5]
    assert all(any(column) for column in zip(*trained, strict=True))


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_draws_that_never_last_are_refused(every):
    with pytest.raises(ConfigError, match=r"draw_every is .*; give a whole number of at least 1"):
        DepthSampler([Site((0.5,))], draw_every=every)
