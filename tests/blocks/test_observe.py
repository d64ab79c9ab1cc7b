import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import residrop
from residrop import Residual, StochasticDepth, attach, branch_flops, create, observe, sampler_of, sampling, using
from residrop.common.errors import ConfigError
from residrop.functional import row_mask
from residrop.schedule.sampler import Draw, Plan

X = torch.randn(5, 3, 8, 8)


def net(**options):
    return create("resnet-8", **{"rule": "stochastic-depth", "survival": 0.5, **options})


# What is recorded


def test_block_level_survival_is_the_share_of_live_steps():
    model = net(survival=(0.9, 0.5, 0.3))
    plans = [sampler_of(model).plan(step) for step in range(30)]
    with observe(model) as seen:
        for _ in plans:
            model(X)
    alive = [[plan.draws[block].alive for plan in plans] for block in range(3)]
    assert seen.steps == 30
    assert seen.survival == tuple(sum(coins) / 30 for coins in alive)
    assert seen.effective_depth == pytest.approx(sum(map(sum, alive)) / 30)
    assert len(set(seen.survival)) == 3  # the blocks are told apart


def test_row_level_survival_is_the_mean_share_of_rows():
    model = net(survival=(0.9, 0.5, 0.3), granularity="row")
    with observe(model) as seen:
        for _ in range(20):
            model(X)
    plans = [sampler_of(model).plan(step) for step in range(20)]
    rows = [sum(plan.draws[block].rows(5).live for plan in plans) / (20 * 5) for block in range(3)]
    assert seen.survival == pytest.approx(rows)
    assert seen.survival[0] != 0.9  # 4.5 rows of 5 are never a whole number


def test_bernoulli_rows_are_counted():
    model = net(granularity="row", rows="bernoulli")
    with observe(model) as seen:
        for _ in range(6):
            model(X)
    plans = [sampler_of(model).plan(step) for step in range(6)]
    counts = [sum(int(row_mask(5, 0.5, plan.draws[block].key).sum()) for plan in plans) for block in range(3)]
    assert seen.survival == pytest.approx([count / 30 for count in counts])


def test_units_count_by_their_rate_and_skip_nothing():
    model = create("resnet-8", rule="swapout", survival=0.8, theta_2=0.6)
    with observe(model, branch_flops(model, X)) as seen:
        model(X)
    assert seen.survival == pytest.approx((0.6,) * 3)
    assert seen.skipped_flops == 0.0


def test_blocks_at_constant_depth_count_as_present():
    model = create("depth-dropout-resnet-14", rule="depth-dropout", survival=0.0)
    with observe(model) as seen:
        model(X)
    assert seen.survival == (1, 0, 1, 0, 1, 0)


def test_given_plans_count_at_the_rates_they_leave_open():
    model = net()
    with observe(model) as seen:
        for coins in ([True, False, False], [True, True, False]):
            with using(model, Plan.of(coins)):
                model(X)
    assert seen.survival == (1.0, 0.5, 0.0)
    rows = net(granularity="row", survival=0.4)
    with observe(rows) as seen, using(rows, Plan((Draw((), key=1),) * 3)):
        rows(X)
    assert seen.survival == (0.4,) * 3


def test_only_training_forwards_count():
    model = net()
    with observe(model) as seen:
        model.eval()(X)
        with sampling(model):
            model(X)
        with using(model, Plan.of([True] * 3)):
            model(X)
        assert seen.steps == 0
        model.train()(X)
    model(X)
    assert seen.steps == 1
    assert seen.survival == tuple(float(draw.alive) for draw in sampler_of(model).plan(0).draws)


def test_recomputation_in_backward_is_no_step():
    model = net()
    root = nn.Sequential(model)
    attach(root)
    with observe(root) as seen:
        torch.utils.checkpoint.checkpoint(root, X, use_reentrant=False).sum().backward()
    assert seen.steps == 1


def test_batch_size_is_found_among_named_arguments():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Residual(nn.Linear(4, 4), rule=StochasticDepth(0.5, "row"))

        def forward(self, scale, *, inputs):
            return self.block(inputs["hidden"]) * scale

    model = Named()
    attach(model)
    with observe(model) as seen:
        model(2.0, inputs={"hidden": torch.randn(6, 4)})
        model(2.0, inputs={"hidden": torch.randn(3, 4)})
    live = sampler_of(model).plan(1).draws[0].rows(3).live
    assert seen.survival == pytest.approx(((0.5 + live / 3) / 2,))


def test_draws_results_and_steps_are_not_disturbed():
    plain = net(granularity="row")
    watched = copy.deepcopy(plain)
    with observe(watched, branch_flops(watched, X)):
        outputs = [watched(X) for _ in range(4)]
    assert all(torch.equal(a, plain(X)) for a in outputs)
    assert sampler_of(watched).step == 4
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), watched.buffers(), strict=True))


def test_several_observers_and_wrappers():
    model = net()
    wrapped = nn.Sequential(model)
    with observe(wrapped) as outer:
        model(X)
        with observe(model) as inner:
            model(X)
        inner.stop()
    assert (outer.steps, inner.steps) == (2, 1)
    assert sampler_of(model).observers == []


# FLOPs


def test_branch_flops_are_those_of_the_convolutions():
    model = net()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = branch_flops(model, X)
    first = 2 * 5 * 8 * 8 * 16 * 16 * 9 * 2  # 2 per multiply-add, 5 images of 8 x 8 units, two 3 x 3 convolutions
    strided = first // 4 + first // 2  # twice the channels, a quarter of the units, and fewer inputs to the first
    assert found == (first, strided, strided)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sampler_of(model).step == 0


@pytest.mark.parametrize("granularity", ["block", "row"])
@pytest.mark.parametrize("rescale", ["test", "train", "none"])
def test_branch_flops_do_not_depend_on_rates(granularity, rescale):
    model = net(granularity=granularity, rescale=rescale, survival=(0.0, 0.3, 0.9))
    assert branch_flops(model, X) == branch_flops(net(), X)


def test_branches_of_applied_blocks_are_told_apart():
    vit = pytest.importorskip("timm").create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3
    )
    residrop.apply(vit, survival=0.5)
    x = torch.randn(2, 3, 32, 32)
    flops = branch_flops(vit, x)
    assert flops[:2] == flops[2:]
    mlp = 2 * 2 * 5 * 24 * 96 * 2  # two images of 5 tokens, two matrices
    assert flops[1] == mlp
    assert 0 < flops[0] < mlp
    with observe(vit, flops) as seen:
        vit(x)
    assert [block["name"] for block in seen.to_dict()["blocks"]] == [
        "blocks.0, branch 1",
        "blocks.0, branch 2",
        "blocks.1, branch 1",
        "blocks.1, branch 2",
    ]


def test_skipped_flops_are_what_the_counter_misses():
    model = net(survival=(0.2, 0.5, 0.7), granularity="row")
    seen = observe(model, branch_flops(model, X))
    with torch.no_grad(), FlopCounterMode(display=False) as all_of_them, using(model, Plan((Draw((1.0,)),) * 3)):
        model(X)
    seen.stop()
    seen = observe(model, branch_flops(model, X))
    with FlopCounterMode(display=False) as counter:
        model(X)
    missing = all_of_them.get_total_flops() - counter.get_total_flops()
    assert seen.skipped_flops == pytest.approx(missing / sum(branch_flops(model, X)))
    assert missing > 0


def test_flops_given_by_hand():
    model = net()
    with observe(model, [1, 2, 7]) as seen:
        assert seen.skipped_flops is None
        with using(model, Plan.of([True, True, False])):
            model(X)
    assert seen.skipped_flops == pytest.approx(0.7)
    with observe(model) as without:
        model(X)
    assert without.skipped_flops is None


@pytest.mark.parametrize("flops", [[1, 2], [1, 2, -1], [1, 2, float("nan")]])
def test_wrong_flops_are_refused(flops):
    with pytest.raises(ConfigError, match=r"flops has \d numbers for 3 rules; give one per rule, none below zero"):
        observe(net(), flops)


def test_unattached_models_are_refused():
    model = Residual(nn.Linear(2, 2), rule=StochasticDepth(0.5))
    with pytest.raises(ConfigError, match=r"no sampler; call residrop\.attach"):
        observe(model)
    with pytest.raises(ConfigError, match=r"no sampler; call residrop\.attach"):
        branch_flops(model, torch.randn(2, 2))


# How it is told


def test_report_as_numbers_and_as_a_table():
    model = net(survival=(0.9, 0.5, 0.25))
    with observe(model, [1, 1, 2]) as seen:
        with using(model, Plan.of([True, True, False])):
            model(X)
        with using(model, Plan.of([True, False, False])):
            model(X)
    assert seen.to_dict() == {
        "steps": 2,
        "depth": 3,
        "effective_depth": 1.5,
        "skipped_flops": 0.625,
        "blocks": [
            {"name": "blocks.block1", "granularity": "block", "rate": 0.9, "survival": 1.0},
            {"name": "blocks.block2", "granularity": "block", "rate": 0.5, "survival": 0.5},
            {"name": "blocks.block3", "granularity": "block", "rate": 0.25, "survival": 0.0},
        ],
    }
    assert str(seen).splitlines() == [
        "2 steps, effective depth 1.50 of 3, 62.5% of branch FLOPs skipped",
        "  blocks.block1  block  rate 0.900  realised 1.000",
        "  blocks.block2  block  rate 0.500  realised 0.500",
        "  blocks.block3  block  rate 0.250  realised 0.000",
    ]


def test_nothing_seen_yet():
    seen = observe(net())
    assert str(seen).startswith("0 steps, effective depth 0.00 of 3\n")
    assert seen.survival == (0.0, 0.0, 0.0)
