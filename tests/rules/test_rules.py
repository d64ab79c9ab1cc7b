"""Every rule through one conformance suite, then what is particular to some of them."""

import copy
import io
import math
import pickle
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import residrop
from conformance import CASES, RANDOM, Affine, Counted, naive_tower, tower
from helpers import assert_mean
from residrop import (
    ConstantDepth,
    DepthDropout,
    GaussianDepth,
    Mix,
    Plan,
    Residual,
    Rule,
    SkipForward,
    StochasticDepth,
    Swapout,
    UnitDropout,
    attach,
    sampler_of,
    sampling,
    using,
)
from residrop.blocks.attach import depth_of, expected_depth_of, rules_of
from residrop.common.errors import ConfigError, PlanError
from residrop.schedule.sampler import DepthSampler, Draw
from residrop.schedule.survival import linear_decay

SHAPES = [(4,), (2, 3, 2), ()]
BATCH = 5
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 1e-2}
rules = pytest.mark.parametrize("case", CASES, ids=repr)
random_rules = pytest.mark.parametrize("case", RANDOM, ids=repr)


def batch(shape=(4,), dtype=torch.float32, seed=0, rows=BATCH):
    return torch.randn((rows, *shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# The conformance suite


@rules
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", range(4))
def test_forward_and_gradients_equal_reference(case, shape, step):
    model = tower(case, shape).double()
    plan = sampler_of(model).plan(step)
    x = batch(shape, torch.float64).requires_grad_()
    with using(model, plan):
        y = model(x)
    x2 = x.detach().clone().requires_grad_()
    expected, parameters = naive_tower(model, [case.weights(draw, x.shape) for draw in plan.draws], x2)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-11, atol=1e-12)
    for name, parameter in model.named_parameters():
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, parameters[name].grad, rtol=1e-11, atol=1e-12)


@rules
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_dtypes_kept(case, dtype):
    model = tower(case).to(dtype)
    plan = sampler_of(model).plan(1)
    x = batch((4,), dtype)
    with using(model, plan):
        y = model(x)
    expected, _ = naive_tower(model, [case.weights(draw, x.shape) for draw in plan.draws], x.double(), dtype)
    assert y.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert model.eval()(x).dtype == dtype


@rules
def test_training_root_obeys_its_sampler(case):
    model, x = tower(case, seed=7), batch()
    sampler = sampler_of(model)
    for step in range(4):
        assert sampler.step == step
        y = model(x)
        with using(model, sampler.plan(step)):
            assert_same(model(x), y)
    assert sampler.step == 4


@rules
def test_eval_equals_expectation_formula(case):
    model, x = tower(case).double().eval(), batch(dtype=torch.float64)
    expected, _ = naive_tower(model, [case.eval_weights] * 3, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert sampler_of(model).step == 0


@rules
def test_expectation_plan_in_training_equals_eval(case):
    model, x = tower(case), batch()
    with using(model, sampler_of(model).expectation()):
        y = model(x)
    assert_same(y, model.eval()(x))


@rules
def test_eval_needs_no_attach(case):
    block = Residual(Affine((4,), 0), rule=case.build()).eval()
    x = batch()
    a, b = case.eval_weights
    torch.testing.assert_close(block(x), a * x + b * block.branch(x))


@rules
def test_no_generator_read_or_advanced(case):
    model, x = tower(case), batch()
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global generator must not matter
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        sampler_of(model).step = 0
        model.train()
        drawn = model(x)
        drawn.sum().backward()
        with sampling(model):
            sampled = model(x)
        outputs.append((drawn, sampled, model.eval()(x)))
        assert_same(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
    for a, b in zip(*outputs, strict=True):
        assert_same(a, b)


@rules
def test_deepcopy_is_independent_and_equal(case):
    model, x = tower(case, seed=3), batch()
    model(x)
    twin = copy.deepcopy(model)
    assert sampler_of(twin) is not sampler_of(model)
    assert sampler_of(twin).step == 1
    for _ in range(3):
        assert_same(twin(x), model(x))
    twin(x)
    assert (sampler_of(model).step, sampler_of(twin).step) == (4, 5)
    assert_same(copy.deepcopy(model).eval()(x), model.eval()(x))


@rules
def test_pickle_is_independent_and_equal(case):
    model, x = tower(case, seed=3), batch()
    model(x)
    twin = pickle.loads(pickle.dumps(model))
    assert_same(twin(x), model(x))
    assert sampler_of(twin).step == sampler_of(model).step == 2
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False)(x), model(x))


@rules
def test_state_dict_knows_nothing_of_rules(case):
    model, plain = tower(case), tower(CASES[0])
    assert CASES[0].name == "constant"
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(".rule" in key for key in model.state_dict())
    model(batch())
    assert plain.load_state_dict(model.state_dict()).missing_keys == []
    assert not list(case.build().parameters())
    assert not list(case.build().buffers())


@rules
def test_repr_tells_the_law(case):
    rule = case.build()
    assert repr(rule) == f"{type(rule).__name__}({case.text})"
    assert repr(rule) in repr(tower(case))


@random_rules
def test_modes(case):
    model, x = tower(case), batch(rows=16)
    drawn = [model(x) for _ in range(6)]
    model.eval()
    fixed = [model(x) for _ in range(3)]
    with sampling(model):
        sampled = [model(x) for _ in range(6)]
    assert any(not torch.equal(drawn[0], y) for y in drawn)
    assert any(not torch.equal(sampled[0], y) for y in sampled)
    assert_same(fixed[0], fixed[1])
    assert_same(fixed[0], model(x))
    assert_same(fixed[0], fixed[2])


@rules
def test_batch_permutation(case):
    """Blocks and expectations do not care about the order of rows; rows and units keep their places."""
    model, x = tower(case), batch(rows=8)
    order = torch.tensor([3, 1, 7, 0, 2, 4, 6, 5])
    assert_same(model.eval()(x[order]), model.eval()(x)[order])
    model.train()
    plan = sampler_of(model).plan(2)
    with using(model, plan):
        permuted, straight = model(x[order]), model(x)[order]
        twin_rows = model(x[:1].expand(8, 4))
    by_block = case.granularity in (None, "block")
    assert torch.equal(permuted, straight) == by_block
    assert (len(twin_rows.unique(dim=0)) == 1) == by_block


@rules
def test_empty_batch(case):
    model = tower(case)
    for step in range(4):
        with using(model, sampler_of(model).plan(step)):
            assert model(batch(rows=0)).shape == (0, 4)
    assert model.eval()(batch(rows=0)).shape == (0, 4)


@pytest.mark.filterwarnings("ignore::residrop.EmptyStepWarning")  # nothing but the block, which may be absent
@rules
@pytest.mark.parametrize("mode", ["train", "sampling"])
def test_expectation_equals_average_of_samples(case, mode):
    """10,000 samples of one linear block: the average is `mean_weights`, which is eval unless nothing rescales."""
    samples = 10_000
    block = Residual(Affine((3,), 0), rule=case.build())
    attach(block, seed=17)
    x = batch((3,), rows=1)
    rows = 500 if case.granularity == "unit" else 1  # units of different rows are independent samples
    with sampling(block) if mode == "sampling" else nullcontext():
        outputs = torch.cat([block(x.expand(rows, 3)).detach() for _ in range(samples // rows)])
    (a, b), (eval_a, eval_b) = case.mean_weights, case.eval_weights
    f = block.branch(x).detach()
    assert outputs.shape == (samples, 3)
    assert_mean(outputs, (a * x + b * f)[0], case.name)
    predicted = block.eval()(x).detach()
    torch.testing.assert_close(predicted, eval_a * x + eval_b * f)
    never_rescaled = case.name.endswith("-none") or case.name == "depth-dropout"
    assert torch.allclose(predicted, a * x + b * f) != never_rescaled


@rules
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(case, use_reentrant):
    class Net(nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            self.body, self.checkpointed = tower(case), checkpointed

        def forward(self, x):
            for block in self.body:
                x = checkpoint(block, x, use_reentrant=use_reentrant) if self.checkpointed else block(x)
            return x

    results = []
    for checkpointed in (False, True):
        net = Net(checkpointed)
        sampler = attach(net, seed=5)
        course = []
        for _ in range(4):
            x = batch().requires_grad_()
            net.zero_grad()
            y = net(x)
            y.square().sum().backward()
            gradients = [p.grad for p in net.parameters()]
            course.append([y, x.grad, *(torch.tensor(0.0) if g is None else g for g in gradients)])
        results.append(course)
        assert sampler.step == 4
    for plain, remade in zip(*results, strict=True):
        for a, b in zip(plain, remade, strict=True):
            assert_same(a, b)


# Activation checkpointing, harder

HARD = [case for case in CASES if case.name in ("swapout", "stochastic-depth-block-window-test")]
hard_rules = pytest.mark.parametrize("case", HARD, ids=repr)


def _gradients(model, x, y):
    gradients = torch.autograd.grad(y.square().sum(), [x, *model.parameters()], allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in gradients]


@hard_rules
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_root_repeats_its_draw(case, use_reentrant):
    """Recomputing the root in backward must not draw the next step's plan."""
    x = batch().requires_grad_()
    for step in range(4):
        plain, model = tower(case, seed=5), tower(case, seed=5)
        sampler_of(plain).step = sampler_of(model).step = step
        plain(x).square().sum().backward()
        expected, x.grad = x.grad, None
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
        got, x.grad = x.grad, None
        assert_same(got, expected)
        assert sampler_of(model).step == step + 1


class CheckpointedTower(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.body = tower(case)

    def forward(self, x):
        for block in self.body:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@hard_rules
def test_two_forwards_before_backward_with_checkpointed_blocks(case):
    """Two views of a batch, one backward: each recomputation must repeat the draw of its own forward."""
    x = batch().requires_grad_()
    plain, model = tower(case, seed=5), CheckpointedTower(case)
    attach(model, seed=5)
    expected = _gradients(plain, x, torch.cat((plain(x), plain(x))))
    for got, want in zip(_gradients(model, x, torch.cat((model(x), model(x)))), expected, strict=True):
        assert_same(got, want)


@hard_rules
def test_backward_outside_using_with_checkpointed_blocks(case):
    """`using` around the forward only is the natural way to write it; backward must repeat that plan."""
    x = batch().requires_grad_()
    plain, model = tower(case, seed=5), CheckpointedTower(case)
    attach(model, seed=5)
    plan = sampler_of(model).plan(3)
    with using(plain, plan):
        expected = _gradients(plain, x, plain(x))
    with using(model, plan):
        y = model(x)
    for got, want in zip(_gradients(model, x, y), expected, strict=True):
        assert_same(got, want)


@hard_rules
def test_backward_from_inside_with_checkpointed_blocks(case):
    """A loss on a feature taken inside the root: its backward never passes the root's output."""
    x = batch().requires_grad_()
    plain, model = tower(case, seed=5), CheckpointedTower(case)
    attach(model, seed=5)
    features = {}
    plain[1].register_forward_hook(lambda module, args, output: features.update(plain=output))
    model.body[1].register_forward_hook(lambda module, args, output: features.update(model=output))
    for step in range(6):
        y, expected = model(x), plain(x)
        inside = step % 2 == 1
        got = _gradients(model, x, features["model"] if inside else y)
        want = _gradients(plain, x, features["plain"] if inside else expected)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)


# StochasticDepth and the plain block


@pytest.mark.filterwarnings("ignore::residrop.common.errors.InactiveWarning")  # rates of 1 are meant here
@pytest.mark.parametrize("granularity", ["block", "row"])
@pytest.mark.parametrize("rescale", ["test", "train", "none"])
def test_all_coins_up_is_plain_block_and_down_is_shortcut(granularity, rescale):
    branch, shortcut = nn.Linear(4, 4), nn.Linear(4, 4)
    x = batch()
    up = Residual(branch, shortcut, StochasticDepth(1.0, granularity=granularity, rescale=rescale))
    down = Residual(branch, shortcut, StochasticDepth(0.0, granularity=granularity, rescale=rescale))
    attach(up)
    attach(down)
    for _ in range(5):
        assert_same(up(x), shortcut(x) + branch(x))
        assert_same(down(x), shortcut(x))
    assert_same(up.eval()(x), shortcut(x) + branch(x))
    expected = shortcut(x) if rescale == "test" else shortcut(x) + branch(x)
    assert_same(down.eval()(x), expected)


@pytest.mark.parametrize("rescale", ["test", "train", "none"])
def test_hand_written_coins(rescale):
    """`Plan.of` says that rates are irrelevant, so an up coin means what it means in training: 1/p under "train"."""
    branch, x = nn.Linear(4, 4), batch()
    block = Residual(branch, rule=StochasticDepth(0.5, rescale=rescale))
    attach(block)
    with using(block, Plan.of([True])):
        torch.testing.assert_close(block(x), x + (2.0 if rescale == "train" else 1.0) * branch(x))
    with using(block, Plan.of([False])):
        assert_same(block(x), x)


def test_dead_block_is_bit_exact_identity_on_nonnegative_input():
    block = Residual(nn.Linear(4, 4), rule=StochasticDepth(0.5), post=nn.ReLU())
    attach(block)
    x = batch().abs()
    with using(block, Plan.of([False])):
        assert_same(block(x), x)


def test_dead_block_hides_branch_infinities():
    block = Residual(Counted(nn.Identity()), rule=StochasticDepth(0.0, rescale="test"))
    attach(block)
    x = torch.full((3, 2), float("inf"))
    assert_same(block(x), x)
    assert_same(block.eval()(x), x)
    assert block.branch.calls == []


def test_dead_block_with_in_place_post():
    """torchvision's blocks end in ReLU(inplace=True): a dead block must not write on its own input."""
    x = batch()
    kept = x.clone()
    block = Residual(nn.Linear(4, 4), rule=StochasticDepth(0.5), post=nn.ReLU(inplace=True))
    attach(block)
    with using(block, Plan.of([False])):
        y = block(x)
    assert_same(y, kept.relu())
    assert_same(x, kept)


def test_dead_block_with_in_place_post_after_saved_activation():
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.ReLU(inplace=True),
        Residual(nn.Linear(4, 4), rule=StochasticDepth(0.5), post=nn.ReLU(inplace=True)),
    )
    attach(model)
    with using(model, Plan.of([False])):
        model(batch()).sum().backward()
    assert model[0].weight.grad is not None
    assert model[2].branch.weight.grad is None


@pytest.mark.parametrize("survival", [0.0, 0.25, 0.5, 1.0])
def test_test_scale_is_the_survival_rate(survival):
    branch, x = nn.Linear(4, 4), batch()
    scales = {"test": survival, "train": 1.0, "none": 1.0}
    for rescale, scale in scales.items():
        block = Residual(branch, rule=StochasticDepth(survival, rescale=rescale)).eval()
        torch.testing.assert_close(block(x), x + scale * branch(x))


@pytest.mark.filterwarnings("ignore::residrop.EmptyStepWarning")  # nothing but the block, which may be absent
def test_train_scale_follows_the_timing():
    block = Residual(Affine((4,), 0), rule=StochasticDepth(0.5, rescale="train"))
    sampler = attach(block, timing="warmup(4)")
    x = batch()
    for step, rate in enumerate((1.0, 0.875, 0.75, 0.625, 0.5, 0.5)):
        alive = sampler.plan().draws[0].alive
        y = block(x)
        torch.testing.assert_close(y, x + (block.branch(x) / rate if alive else 0.0))
        assert sampler.step == step + 1


@pytest.mark.parametrize("rows", ["window", "bernoulli"])
def test_row_scale_keeps_precision_in_bfloat16(rows):
    """The scale is a Python float, not a number of the tensor's dtype (1/0.99 -> 1.0078)."""
    rule = StochasticDepth(0.99, "row", "train", rows)
    block = Residual(nn.Identity(), nn.Identity(), rule)
    attach(block)
    x = torch.linspace(1.0, 2.0, 4096).to(torch.bfloat16).view(-1, 1)
    key = next(k for k in range(1000) if 0 < Draw((0.99,), key=k).rows(4096).live < 4096)
    with using(block, Plan((Draw((0.99,), key=key),))):
        y = block(x).double()
    live = y != x.double()
    ratio = ((y - x.double()) / x.double())[live].mean().item()
    assert ratio == pytest.approx(1 / 0.99, abs=1e-3)


# Dropped means not computed


def block_with_norm(rule):
    branch = Counted(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    return Residual(branch, nn.Linear(4, 4), rule)


@pytest.mark.parametrize("rule", [StochasticDepth(0.5), DepthDropout(0.5)], ids=repr)
def test_dead_branch_untouched_by_a_step(rule):
    model = nn.Sequential(block_with_norm(rule), block_with_norm(copy.deepcopy(rule)))
    attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    def step(coins):
        optimizer.zero_grad(set_to_none=True)
        with using(model, Plan.of(coins)):
            model(batch(rows=8)).square().sum().backward()
        optimizer.step()

    step([True, True])  # momentum buffers exist now
    dead, live = model[0].branch, model[1].branch
    assert dead.calls == live.calls == [8]
    dead_state = copy.deepcopy(dead.state_dict())
    live_state = copy.deepcopy(live.state_dict())
    momenta = {p: optimizer.state[p]["momentum_buffer"].clone() for p in dead.parameters()}
    assert len(momenta) == 4

    step([False, True])
    assert dead.calls == [8]
    assert live.calls == [8, 8]
    assert all(p.grad is None for p in dead.parameters())
    assert all(p.grad is not None for p in [*live.parameters(), *model[0].shortcut.parameters()])
    for name, value in dead.state_dict().items():
        assert_same(value, dead_state[name])
    assert all(not torch.equal(value, live_state[name]) for name, value in live.state_dict().items())
    for parameter, momentum in momenta.items():
        assert_same(optimizer.state[parameter]["momentum_buffer"], momentum)


@pytest.mark.parametrize("rows", ["window", "bernoulli"])
def test_live_rows_enter_the_branch_as_one_batch(rows):
    block = Residual(Counted(nn.Identity()), rule=StochasticDepth(0.5, "row", rows=rows))
    sampler = attach(block)
    x = torch.ones(10, 2)
    for step in range(30):
        live = int((block(x)[:, 0] == 2).sum())
        assert block.branch.calls == ([live] if live else [])
        assert live == 5 or rows == "bernoulli"
        block.branch.calls.clear()
        assert sampler.step == step + 1


@pytest.mark.parametrize("rows", ["window", "bernoulli"])
def test_batch_norm_sees_live_rows_only(rows):
    """Row dropping with batch norm is another law than masking the branch of the whole batch: pinned different."""
    norm = nn.BatchNorm1d(4, momentum=1.0)
    block = Residual(norm, rule=StochasticDepth(0.5, "row", rows=rows))
    attach(block)
    x = batch(rows=12)
    y = block(x)
    live = (y != x).any(1)
    assert 2 <= int(live.sum()) < 12
    torch.testing.assert_close(norm.running_mean, x[live].mean(0))
    torch.testing.assert_close(norm.running_var, x[live].var(0))
    dense = x + live[:, None] * nn.functional.batch_norm(x, None, None, training=True)
    assert not torch.allclose(y, dense)
    live_only = nn.functional.batch_norm(x[live], None, None, training=True)
    torch.testing.assert_close(y[live], x[live] + live_only)


@pytest.mark.parametrize("rows", ["window", "bernoulli"])
def test_no_live_row_means_no_call_and_no_gradient(rows):
    block = Residual(Counted(nn.Linear(4, 4)), rule=StochasticDepth(0.0, "row", rows=rows))
    attach(block)
    x = batch().requires_grad_()
    block(x).sum().backward()
    assert block.branch.calls == []
    assert block.branch.inner.weight.grad is None
    assert_same(x.grad, torch.ones_like(x))


def test_unit_rules_call_the_branch_with_the_whole_batch():
    for rule in (Swapout(0.5), SkipForward(0.5), UnitDropout(0.5), Mix((0.5, 0.5))):
        block = Residual(Counted(nn.Linear(4, 4)), rule=rule)
        attach(block)
        block(batch())
        assert block.branch.calls == [BATCH], rule


# Particular rules


@pytest.mark.filterwarnings("ignore::residrop.common.errors.InactiveWarning")  # rates of 1 are meant here
def test_swapout_special_cases():
    branch, x = Affine((4,), 0), batch()

    def run(rule):
        block = Residual(branch, rule=rule)
        attach(block, seed=4)
        return block(x)

    assert_same(run(Swapout(1.0, 1.0)), run(ConstantDepth()))
    assert_same(run(Swapout(0.0, 1.0)), branch(x))
    assert_same(run(Swapout(1.0, 0.0)), x)
    assert_same(run(Swapout(0.0, 0.0)), torch.zeros_like(x))
    assert_same(run(Mix((0.7, 0.4))), run(Swapout(0.7, 0.4)))
    assert_same(run(UnitDropout(1.0)), branch(x))
    assert_same(run(SkipForward(1.0)), branch(x))
    assert_same(run(SkipForward(1.0, of="shortcut")), x)


@pytest.mark.filterwarnings("ignore::residrop.common.errors.InactiveWarning")  # rates of 1 are meant here
def test_first_block_of_linear_schedule_is_deterministic():
    block = Residual(Affine((4,), 0), rule=Swapout(1.0))
    attach(block)
    x = batch()
    outputs = [block(x) for _ in range(5)]
    for y in outputs:
        assert_same(y, x + block.branch(x))


def test_mix_of_earlier_tensors():
    rule = Mix((0.5, 0.6, 0.7, 0.8))
    sampler = DepthSampler([rule.site], seed=3)
    rule.join(sampler, 0)
    x, early, earlier = batch(seed=0), batch(seed=1), batch(seed=2)
    branch = Affine((4,), 0)
    sampler.before_forward(True)
    y = rule(x, nn.Identity(), branch, early, earlier)
    key = sampler.plan(0).draws[0].key
    expected = residrop.functional.mix((x, branch(x), early, earlier), (0.5, 0.6, 0.7, 0.8), key)
    assert_same(y, expected)
    expected = 0.5 * x + 0.6 * branch(x) + 0.7 * early + 0.8 * earlier
    torch.testing.assert_close(rule.eval()(x, nn.Identity(), branch, early, earlier), expected)
    with pytest.raises(ConfigError, match="3 tensors and 4 thetas"):
        rule(x, nn.Identity(), branch, early)


def test_autocast_bfloat16():
    for case in CASES:
        model = nn.Sequential(nn.Linear(4, 4), Residual(nn.Linear(4, 4), rule=case.build()), nn.Linear(4, 4))
        attach(model)
        for _ in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = model(batch())
            assert y.dtype == torch.bfloat16
            y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model[0].parameters())


@pytest.mark.filterwarnings("ignore::residrop.EmptyStepWarning")  # nothing but the block, which may be absent
def test_shared_block_lives_or_dies_as_one():
    class Twice(nn.Module):
        def __init__(self, rule):
            super().__init__()
            self.block = Residual(Counted(Affine((4,), 0)), rule=rule)

        def forward(self, x):
            return self.block(self.block(x))

    model = Twice(StochasticDepth(0.5))
    sampler = attach(model, seed=1)
    counts = []
    for _ in range(40):
        alive = sampler.plan().draws[0].alive
        model(batch())
        counts.append(len(model.block.branch.calls))
        assert model.block.branch.calls == [BATCH] * (2 if alive else 0)
        model.block.branch.calls.clear()
    assert set(counts) == {0, 2}
    assert len(sampler.sites) == 1

    twice = Twice(Swapout(0.5))
    attach(twice)
    outputs = []
    twice.block.register_forward_hook(lambda module, args, output: outputs.append(output))
    twice.block.branch = nn.Identity()
    x = torch.ones(3, 4)
    twice(x)
    assert_same(outputs[1], outputs[0] * outputs[0])  # the same masks: x * m, then (x * m) * m with m = m1 + m2


def test_shared_rule_counts_once():
    rule = StochasticDepth(0.5)
    model = nn.Sequential(Residual(Affine((4,), 0), rule=rule), Residual(Affine((4,), 1), rule=rule))
    sampler = attach(model)
    assert rules_of(model) == [rule]
    assert len(sampler.plan().draws) == 1


# Constructors


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), float("inf"), True, "0.5", None])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (StochasticDepth, "survival"),
        (DepthDropout, "survival"),
        (GaussianDepth, "survival"),
        (Swapout, "theta_1"),
        (SkipForward, "theta_1"),
        (UnitDropout, "theta_1"),
        (lambda rate: Mix((0.5, rate)), "theta_2"),
    ],
)
def test_rates_refused_at_construction(build, name, rate):
    with pytest.raises(ConfigError, match=f"{name} is"):
        build(rate)


def test_second_theta_refused():
    with pytest.raises(ConfigError, match=r"theta_2 is 1\.5"):
        Swapout(0.5, 1.5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StochasticDepth(0.5, granularity="unit"), "granularity is 'unit'; choose one of 'block', 'row'"),
        (lambda: StochasticDepth(0.5, granularity="rwo"), "granularity is 'rwo'"),
        (lambda: StochasticDepth(0.5, rescale="both"), "rescale is 'both'; choose one of 'test', 'train', 'none'"),
        (lambda: StochasticDepth(0.5, "row", rows="some"), "rows is 'some'; choose one of 'window', 'bernoulli'"),
        (lambda: StochasticDepth(0.5, scope="all"), "scope is 'all'; choose one of 'shared', 'per_rank'"),
        (lambda: StochasticDepth(0.5, scope=""), "scope is ''"),
        (lambda: Swapout(0.5, scope="rank"), "scope is 'rank'"),
        (lambda: GaussianDepth(0.5, "unit"), "granularity is 'unit'; choose one of 'block', 'row'"),
        (lambda: GaussianDepth(0.5, rescale="both"), "rescale is 'both'; choose one of 'test', 'train', 'none'"),
        (lambda: GaussianDepth(0.5, scope="all"), "scope is 'all'; choose one of 'shared', 'per_rank'"),
        (lambda: SkipForward(0.5, of="x"), "of is 'x'; choose one of 'branch', 'shortcut'"),
        (lambda: UnitDropout(0.5, on="x"), "on is 'x'; choose one of 'branch', 'residual', 'sum'"),
        (lambda: Mix(()), "Mix has 0 thetas; give one for the shortcut"),
        (lambda: Mix((0.5,)), "Mix has 1 thetas"),
        (lambda: StochasticDepth(0.5, rows="bernoulli"), "rows"),
    ],
)
def test_options_refused_at_construction(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_default_scopes():
    assert StochasticDepth(0.5).scope == DepthDropout(0.5).scope == GaussianDepth(0.5).scope == "shared"
    assert StochasticDepth(0.5, "row").scope == Swapout(0.5).scope == GaussianDepth(0.5, "row").scope == "per_rank"
    assert StochasticDepth(0.5, scope="per_rank").site.scope == "per_rank"
    assert Swapout(0.5, scope="shared").site.scope == "shared"
    assert UnitDropout(0.5, scope="shared").scope == SkipForward(0.5, scope="shared").scope == "shared"
    assert Mix((0.5, 0.5), scope="shared").scope == "shared"


SMALL = [0.0004, 0.123456789, 1 - 2**-40, linear_decay(54)[0]]


@pytest.mark.parametrize("rate", SMALL)
@pytest.mark.parametrize(
    "build",
    [StochasticDepth, DepthDropout, GaussianDepth, Swapout, SkipForward, UnitDropout, lambda rate: Mix((rate, 0.5))],
    ids=["StochasticDepth", "DepthDropout", "GaussianDepth", "Swapout", "SkipForward", "UnitDropout", "Mix"],
)
def test_repr_shows_the_exact_rate(build, rate):
    shown = repr(build(rate)).split("(")[1].split(")")[0].split(",")[0]
    assert float(shown) == rate


# Attaching


@random_rules
def test_training_without_attach_refused(case):
    block = Residual(nn.Linear(4, 4), rule=case.build())
    with pytest.raises(PlanError, match=r"has no coins: call residrop\.attach\(model, seed=\.\.\.\)"):
        block(batch())


def test_constant_depth_trains_without_attach():
    block = Residual(nn.Linear(4, 4))
    x = batch()
    assert_same(block(x), x + block.branch(x))


def test_part_run_before_root_refused():
    model = tower(RANDOM[0])
    with pytest.raises(
        PlanError, match="run outside of a forward of its root, so it has no draw: call the module that"
    ):
        model[0](batch())


def test_attach_refuses_model_without_rules():
    with pytest.raises(ConfigError, match=r"Linear has no rules; build its blocks with residrop\.Residual"):
        attach(nn.Linear(3, 3))


@pytest.mark.parametrize("seed", [1.5, True, "0"])
def test_attach_refuses_seed_and_leaves_model_alone(seed):
    model = tower(RANDOM[0], seed=3)
    before = sampler_of(model)
    with pytest.raises(ConfigError, match="seed is"):
        attach(model, seed=seed)
    with pytest.raises(ConfigError, match="the time -1"):
        attach(model, timing="warmup(-1)")
    assert sampler_of(model) is before
    model(batch())
    assert before.step == 1


def test_attach_again_replaces_the_sampler():
    model, x = tower(RANDOM[0], depth=12, seed=3), batch()
    old = sampler_of(model)
    model(x)
    new = attach(model, seed=4)
    assert sampler_of(model) is new
    assert (old.step, new.step) == (1, 0)
    model(x)
    assert (old.step, new.step) == (1, 1)
    assert new.plan(0) != old.plan(0)
    assert len(model._forward_pre_hooks) == 1


def test_attach_whole_after_part():
    part = tower(RANDOM[0])
    whole = nn.Sequential(part, tower(RANDOM[0]))
    sampler = attach(whole, seed=1)
    whole(batch())
    assert sampler.step == 1
    assert sampler_of(part) is sampler
    assert [rule.sampler for rule in rules_of(whole)] == [sampler] * 6
    with pytest.raises(PlanError, match="3 draws, the model 6 rules"), using(part, Plan.of([True] * 3)):
        pass


def test_parts_attached_apart_refused():
    whole = nn.Sequential(tower(RANDOM[0]), tower(RANDOM[0]))
    with pytest.raises(ConfigError, match=r"Sequential has several samplers; call residrop\.attach"):
        sampler_of(whole)
    with pytest.raises(ConfigError, match="Residual has no sampler"):
        sampler_of(Residual(nn.Linear(3, 3), rule=StochasticDepth(0.5)))
    with pytest.raises(ConfigError, match="Linear has no sampler"):
        sampler_of(nn.Linear(3, 3))


def test_attach_keeps_state_dict_and_other_hooks():
    model = nn.Sequential(Residual(nn.Linear(4, 4), rule=StochasticDepth(0.5)))
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    keys = list(model.state_dict())
    attach(model)
    attach(model)
    assert list(model.state_dict()) == keys
    model(batch())
    assert calls == [1]


def test_wrapper_finds_sampler():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    model, x = tower(RANDOM[0], depth=8), batch()
    wrapper = Wrapper(model)
    sampler = sampler_of(model)
    assert sampler_of(wrapper) is sampler
    wrapper(x)
    assert sampler.step == 1
    plan = Plan.of([True, False] * 4)
    with using(wrapper, plan):
        through = wrapper(x)
    with using(model, plan):
        assert_same(model(x), through)
    with sampling(wrapper):
        assert not model.training
        assert not wrapper.training
        through = wrapper(x)
    with sampling(model):
        assert_same(model(x), through)
    assert model.training
    assert wrapper.training


def test_frozen_part_in_training_root_uses_expectation():
    model, x = tower(RANDOM[0]).double(), batch(dtype=torch.float64)
    assert RANDOM[0].name == "stochastic-depth-block-window-test"
    model[1].eval()
    sampler = sampler_of(model)
    seen = set()
    for step in range(8):
        plan = sampler.plan(step)
        weights = [(1.0, float(draw.alive)) for draw in plan.draws]
        weights[1] = RANDOM[0].eval_weights
        seen.add(plan.draws[1].alive)
        expected, _ = naive_tower(model, weights, x)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert seen == {True, False}


def test_rank_and_seed_reach_the_draws():
    x = batch()
    units, blocks = (next(case for case in CASES if case.name == name) for name in ("swapout", "depth-dropout"))
    for case, equal in ((units, False), (blocks, True)):
        courses = []
        for rank in (0, 1):
            model = tower(case)
            attach(model, seed=5, rank=rank)
            courses.append(torch.stack([model(x) for _ in range(8)]))
        assert torch.equal(*courses) == equal, case


# Given plans


@random_rules
def test_given_plan_obeyed_in_both_modes_and_undone(case):
    model, x = tower(case, depth=6), batch()
    sampler = sampler_of(model)
    plan = sampler.plan(10)
    calm = model.eval()(x)
    with using(model, plan):
        first = model(x)
        assert_same(model.train()(x), first)
        assert_same(model.eval()(x), first)
    assert sampler.step == 0
    assert not torch.equal(first, calm)
    assert_same(model(x), calm)
    model.train()
    model(x)
    assert sampler.step == 1


def test_using_nests_and_survives_exceptions():
    model, x = tower(RANDOM[0]), batch()
    up, down = Plan.of([True] * 3), Plan.of([False] * 3)
    with using(model, up):
        high = model(x)
        with using(model, down):
            low = model(x)
        assert_same(model(x), high)
        with pytest.raises(KeyError, match="inner"), using(model, down):
            raise KeyError("inner")
        assert_same(model(x), high)
    assert not torch.equal(high, low)
    with pytest.raises(PlanError, match="run outside of a forward of its root"):
        model[0](x)


@pytest.mark.parametrize("length", [0, 2, 4])
def test_using_refuses_plan_of_other_length(length):
    model = tower(RANDOM[0])
    with (
        pytest.raises(PlanError, match=f"the plan has {length} draws, the model 3 rules"),
        using(model, Plan.of([True] * length)),
    ):
        pass
    model(batch())
    assert sampler_of(model).step == 1


@pytest.mark.parametrize(
    "rule",
    [Swapout(0.7, 0.4), Mix((0.5, 0.5)), SkipForward(0.5), UnitDropout(0.5), GaussianDepth(0.5)],
    ids=lambda rule: repr(rule),
)
def test_using_refuses_coins_for_unit_rules(rule):
    """One coin per block means nothing to a rule of units; it must not fall back to some other law silently."""
    block = Residual(nn.Linear(4, 4), rule=rule)
    attach(block)
    with pytest.raises(PlanError), using(block, Plan.of([False])):
        block(batch())


def test_using_refuses_draw_of_units_for_block_rule():
    block = Residual(nn.Linear(4, 4), rule=StochasticDepth(0.5))
    attach(block)
    with pytest.raises(PlanError), using(block, Plan((Draw((0.5, 0.5), key=7),))):
        block(batch())


# Sampling


def normed(seed=0):
    torch.manual_seed(seed)
    blocks = [Residual(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), rule=StochasticDepth(0.5)) for _ in range(6)]
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), *blocks)
    attach(model, seed=9)
    return model


def test_sampling_tosses_coins_with_batch_norm_in_eval():
    model, x = normed(), batch(rows=16)
    for _ in range(5):
        model(x)
    state = copy.deepcopy(model.state_dict())
    sampler = sampler_of(model)
    with sampling(model), torch.no_grad():
        outputs = [model(x) for _ in range(8)]
        assert all(not module.training for module in model.modules())
    assert sampler.step == 5
    for name, value in model.state_dict().items():
        assert_same(value, state[name])
    assert len({y.sum().item() for y in outputs}) > 1
    model.eval()
    for number, y in enumerate(outputs):  # running statistics, and the sample stream's plans
        with using(model, sampler.plan(number, stream="sample")), torch.no_grad():
            assert_same(y, model(x))


def test_sampling_repeats_and_first_continues():
    model, x = normed().eval(), batch()
    with sampling(model):
        outputs = [model(x) for _ in range(6)]
    with sampling(model):
        again = [model(x) for _ in range(6)]
    with sampling(model, first=4):
        later = [model(x) for _ in range(2)]
    for a, b in zip(outputs, again, strict=True):
        assert_same(a, b)
    assert_same(outputs[4], later[0])
    assert_same(outputs[5], later[1])


def test_sampling_does_not_depend_on_training_progress():
    model, x = normed().eval(), batch()
    with sampling(model):
        first = model(x)
    sampler_of(model).step = 1000
    with sampling(model):
        assert_same(model(x), first)


def test_sampling_restores_every_training_flag():
    model = normed()
    model[3].eval()
    model[4].branch[1].eval()
    flags = [module.training for module in model.modules()]
    assert True in flags
    assert False in flags
    with sampling(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(KeyError, match="inside"), sampling(model):
        raise KeyError("inside")
    assert [module.training for module in model.modules()] == flags
    x = batch()
    model.eval()
    assert_same(model(x), model(x))  # sampling is over


def test_sampling_refuses_negative_first():
    model = normed()
    with pytest.raises(PlanError, match="first is -1; sampled passes are numbered from 0"), sampling(model, first=-1):
        pass
    assert model.training


def test_sampling_nests():
    model, x = normed().eval(), batch()
    with sampling(model):
        outputs = [model(x) for _ in range(4)]
    with sampling(model):
        assert_same(model(x), outputs[0])
        with sampling(model, first=3):
            assert_same(model(x), outputs[3])
        assert_same(model(x), outputs[1])
    assert_same(model(x), model(x))


def test_training_goes_on_after_sampling():
    plain, model, x = normed(), normed(), batch(rows=16)
    for step in range(6):
        with sampling(model):
            model(x)
        plain.train()
        plain(x)
        model(x)
        assert sampler_of(model).step == step + 1
    for name, value in plain.state_dict().items():
        assert_same(model.state_dict()[name], value)


def test_using_inside_sampling_obeys_the_plan():
    model, x = normed().eval(), batch()
    plan = Plan.of([True] * 6)
    with using(model, plan):
        expected = model(x)
    with sampling(model):
        first = model(x)
        with using(model, plan):
            assert_same(model(x), expected)
        model(x)
    with sampling(model):
        assert_same(model(x), first)


def test_sampling_inside_using_tosses_coins():
    """The innermost context wins, as with `using` inside `sampling`; else thirty samples are one sample silently."""
    model, x = normed().eval(), batch()
    with sampling(model):
        expected = [model(x) for _ in range(3)]
    with using(model, Plan.of([True] * 6)), sampling(model):
        outputs = [model(x) for _ in range(3)]
    for a, b in zip(outputs, expected, strict=True):
        assert_same(a, b)


def test_sampling_a_part_before_its_root_refused():
    """Otherwise the part would silently obey the plan of the last training step."""
    model, x = normed(), batch()
    model(x)
    with sampling(model), pytest.raises(PlanError, match="outside of a forward of its root"):
        model[2](x)


def test_sampling_mean_approaches_average_of_all_subnetworks():
    """Two blocks, four subnetworks: the average of sampled passes is their weighted average."""
    rates = (0.75, 0.5)
    model = nn.Sequential(
        *(Residual(Affine((3,), i), rule=StochasticDepth(p), post=nn.Tanh()) for i, p in enumerate(rates))
    )
    attach(model, seed=2)
    x = batch((3,), rows=1)
    mean = torch.zeros(1, 3)
    with torch.no_grad():
        for coins in ((a, b) for a in (0, 1) for b in (0, 1)):
            weight = math.prod(p if coin else 1 - p for coin, p in zip(coins, rates, strict=True))
            with using(model, Plan.of(coins)):
                mean += weight * model(x)
        with sampling(model):
            outputs = torch.cat([model(x) for _ in range(4000)])
    assert_mean(outputs, mean[0])


# Depth


def test_depth_of_counts_branches():
    model = nn.Sequential(
        Residual(Affine((4,), 0)),
        Residual(Affine((4,), 1), rule=StochasticDepth(0.5)),
        Residual(Affine((4,), 2), rule=StochasticDepth(0.25, "row")),
        Residual(Affine((4,), 3), rule=Swapout(0.9, 0.4)),
        Residual(Affine((4,), 4), rule=SkipForward(0.7, of="shortcut")),
        Residual(Affine((4,), 5), rule=UnitDropout(0.8)),
    )
    sampler = attach(model)
    total = 1 + 0.5 + 0.25 + 0.4 + 0.3 + 0.8
    assert expected_depth_of(model) == pytest.approx(total)
    for step in range(10):
        plan = sampler.plan(step)
        assert depth_of(model, plan) == pytest.approx(total - 0.5 + plan.draws[1].alive)
    assert depth_of(model, sampler.expectation()) == pytest.approx(total)
    assert expected_depth_of(nn.Linear(3, 3)) == 0


def test_depth_of_plan_at_the_rules_own_rates():
    """A draw without rates means the rule's own."""
    model = nn.Sequential(
        Residual(Affine((4,), 0), rule=Swapout(0.9, 0.4)), Residual(Affine((4,), 1), rule=StochasticDepth(0.3, "row"))
    )
    sampler = attach(model)
    plan = Plan(tuple(draw._replace(rates=()) for draw in sampler.plan(0).draws))
    x = batch()
    with using(model, plan):
        y = model(x)
    with using(model, sampler.plan(0)):
        assert_same(model(x), y)
    assert depth_of(model, plan) == pytest.approx(0.7)


def test_depth_of_refuses_plan_of_other_length():
    with pytest.raises(PlanError, match="2 draws"):
        depth_of(tower(RANDOM[0]), Plan.of([True, False]))


# Residual


def test_residual_defaults():
    block = Residual(nn.Linear(4, 4))
    assert isinstance(block.rule, ConstantDepth)
    assert isinstance(block.shortcut, nn.Identity)
    assert isinstance(block.post, nn.Identity)
    assert isinstance(block.rule, Rule)


def test_rule_base_needs_a_forward():
    with pytest.raises((TypeError, NotImplementedError)):
        Rule((0.5,))(batch(), nn.Identity(), nn.Identity())
