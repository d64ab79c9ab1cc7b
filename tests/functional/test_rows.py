"""Row windows against masked products: values, gradients of both orders, formats, and what is kept for backward."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from reference import live_rows
from residrop import Plan, Residual, StochasticDepth, attach, create, sampler_of, using
from residrop.blocks.residual import Chain
from residrop.functional.call import BranchCall
from residrop.functional.cut import take_rows
from residrop.functional.rows import keep_index, keep_rows
from residrop.functional.zero_gradients import with_zero_gradients
from residrop.schedule.sampler import Draw, Rows

KEYS = st.integers(0, 2**64 - 1)
THETAS = st.floats(0.0, 1.0)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def assert_same(a, b):
    """Equal in value, dtype, shape and device."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def numbers(window, total):
    """Row numbers of a window, in its order."""
    return [(window.start + i) % total for i in range(window.live)]


WINDOWS = [Rows(start, live) for start in range(5) for live in range(6)]


class Recorder(nn.Module):
    """A row-wise linear branch that writes down what it saw."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.linear(x)


def shortcut_module():
    return nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.Tanh())


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("window", WINDOWS)
def test_keep_rows_equals_masked_product(window, scale):
    torch.manual_seed(1)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    branch, shortcut = Recorder(), shortcut_module()
    live = [(window.start + i) % 5 for i in range(window.live)]
    mask = torch.zeros(5, 1, dtype=torch.float64)
    mask[live] = 1.0
    weight = torch.randn(5, 3, dtype=torch.float64)
    inputs = [x, *branch.parameters(), *shortcut.parameters()]

    y = keep_rows(x, BranchCall(shortcut, branch), window, scale)
    rows_seen = [len(seen) for seen in branch.seen]
    expected = shortcut(x) + mask * scale * branch.linear(x)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    assert rows_seen == ([window.live] if window.live else [])
    assert y.shape == x.shape
    gradients = torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True)
    expected = torch.autograd.grad((expected * weight).sum(), inputs)
    for got, want in zip(gradients, expected, strict=True):
        if got is None:
            got = torch.zeros_like(want)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS)
def test_keep_rows_branch_sees_exactly_the_live_rows(window):
    branch = Recorder()
    x = torch.arange(15, dtype=torch.float64).view(5, 3)
    keep_rows(x, BranchCall(lambda t: t, branch), window)
    seen = torch.cat(branch.seen) if branch.seen else x[:0]
    live = sorted((window.start + i) % 5 for i in range(window.live))
    assert len(branch.seen) == (1 if window.live else 0)  # one sub-batch
    assert sorted(seen[:, 0].tolist()) == x[live, 0].tolist()


@pytest.mark.parametrize("window", WINDOWS)
def test_keep_rows_absent_rows_are_the_shortcut_bit_for_bit(window):
    x = torch.randn(5, 3)
    y = keep_rows(x, BranchCall(lambda t: t, lambda t: t * float("nan")), window)
    dead = [row for row in range(5) if row not in {(window.start + i) % 5 for i in range(window.live)}]
    assert_same(y[dead], x[dead])
    assert torch.isnan(y).sum() == 3 * window.live


@pytest.mark.parametrize("window", [Rows(0, 0), Rows(0, 2), Rows(1, 2), Rows(3, 2), Rows(4, 3), Rows(0, 5), Rows(3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keep_rows_keeps_dtype_and_shape(dtype, window):
    x = torch.randn(5, 2, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    y = keep_rows(x, BranchCall(lambda t: t, lambda t: t * 2), window, 0.5)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(5, 1, 1, 1, dtype=dtype)
    mask[[(window.start + i) % 5 for i in range(window.live)]] = 1
    torch.testing.assert_close(y, x + mask * x)


def test_keep_rows_of_empty_batch():
    y = keep_rows(torch.empty(0, 3), BranchCall(lambda t: t, lambda t: t * 0 + 1), Rows(0, 0))
    assert y.shape == (0, 3)


@given(KEYS, THETAS, st.integers(1, 12))
def test_keep_rows_with_drawn_window(key, rate, total):
    x = torch.arange(1.0, total + 1).view(-1, 1)
    y = keep_rows(x, BranchCall(lambda t: t, lambda t: t * 100), Draw((rate,), key=key).rows(total))
    expected = x.clone()
    expected[live_rows(key, rate, total)] *= 101
    assert_same(y, expected)


# Everything that keep_rows can be asked for, against one slow formula

POSTS = {"none": None, "relu": nn.ReLU(), "tanh": nn.Tanh()}
SHORTCUTS = {"identity": nn.Identity(), "same": lambda t: t, "module": nn.Softplus(), "constant": lambda t: t.detach()}


def slow(x, shortcut, branch, window, scale, post, includes_input):
    """shortcut(x), with every live row of it replaced, row by row."""
    skip, live = shortcut(x), numbers(window, len(x))
    if not live:
        return skip
    rows = list(skip)
    out = branch(torch.stack([x[i] for i in live]))
    for i, f in zip(live, out, strict=True):
        value = rows[i] + scale * ((f - rows[i]) if includes_input else f)
        rows[i] = value if post is None else post(value)
    return torch.stack(rows)


def bump(x):
    """A branch that is twice differentiable and mixes rows, as batch norm does."""
    return torch.sin(x) * x.mean(0, keepdim=True)


@pytest.mark.parametrize("includes_input", [False, True])
@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("window", [Rows(0, 0), Rows(0, 2), Rows(2, 3), Rows(3, 4), Rows(4, 1), Rows(1, 5)])
def test_keep_rows_equals_slow_formula(window, shortcut, post, includes_input):
    torch.manual_seed(3)
    x = torch.randn(5, 4, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    options = {"post": POSTS[post], "includes_input": includes_input}
    got = keep_rows(x, BranchCall(SHORTCUTS[shortcut], bump, **options), window, 0.7)
    want = slow(x, SHORTCUTS[shortcut], bump, window, 0.7, **options)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    gradients = [
        torch.autograd.grad((y * weight).sum(), x, allow_unused=True)[0] if y.requires_grad else None
        for y in (got, want)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("includes_input", [False, True])
@pytest.mark.parametrize("post", POSTS)
def test_keep_index_equals_keep_rows(post, includes_input):
    torch.manual_seed(4)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    window, options = Rows(4, 4), {"post": POSTS[post], "includes_input": includes_input}
    index = torch.tensor(numbers(window, 6))
    got = keep_index(x, BranchCall(nn.Softplus(), bump, **options), index, 0.3)
    want = keep_rows(x, BranchCall(nn.Softplus(), bump, **options), window, 0.3)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    weight = torch.randn_like(x)
    pair = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("post", ["none", "tanh", "relu"])
@pytest.mark.parametrize("shortcut", ["identity", "module"])
@pytest.mark.parametrize("window", [Rows(1, 2), Rows(3, 3)])
def test_gradients_of_both_orders(window, shortcut, post):
    torch.manual_seed(5)
    # away from the kink of the ReLU, which finite differences cannot see
    x = (torch.rand(4, 2, dtype=torch.float64) + 0.5).requires_grad_()

    def f(x):
        return keep_rows(x, BranchCall(SHORTCUTS[shortcut], bump, post=POSTS[post]), window, 0.5)

    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(f, (x,))


@pytest.mark.parametrize("shape", [(6, 8, 4, 4), (6, 3, 3, 3), (6, 5, 7), (6, 16)])
@pytest.mark.parametrize("gradient", ["contiguous", "channels-last", "expanded"])
@pytest.mark.parametrize("window", [Rows(1, 3), Rows(4, 3)])
def test_relu_signs_survive_every_memory_format(window, gradient, shape):
    """The signs are packed in the memory order of the output, the gradient may come in another one."""
    torch.manual_seed(6)
    x, f = torch.randn(2, *shape).abs(), torch.randn(shape)
    x = x[0].requires_grad_()
    format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    start = x.contiguous(memory_format=format)
    y = keep_rows(start, BranchCall(nn.Identity(), lambda live: live * f[: len(live)], post=nn.ReLU()), window)
    weight = torch.ones(()).expand(shape) if gradient == "expanded" else torch.randn(shape)
    if gradient == "channels-last":
        weight = weight.contiguous(memory_format=format)
    live = numbers(window, 6)
    value = x[live] + x[live] * f[: len(live)]
    want = torch.autograd.grad(
        (x * weight).sum() - (x[live] * weight[live]).sum() + (value.relu() * weight[live]).sum(), x
    )
    got = torch.autograd.grad(y, x, weight)
    torch.testing.assert_close(got[0], want[0])


def test_mixed_dtypes_are_promoted_as_by_addition():
    """Under autocast a branch may give bf16 on an fp32 stream, and a bf16 stream may meet an fp32 branch."""
    for base, out in itertools.product([torch.float32, torch.bfloat16], repeat=2):
        x = torch.ones(4, 2, dtype=base, requires_grad=True)
        y = keep_rows(x, BranchCall(nn.Identity(), lambda live, out=out: live.to(out), post=nn.ReLU()), Rows(3, 2))
        y.float().sum().backward()
        assert y.dtype == torch.promote_types(base, out)
        assert_same(x.grad, torch.tensor([[2.0, 2.0], [1.0, 1.0], [1.0, 1.0], [2.0, 2.0]], dtype=base))


def test_arguments_along_are_cut_like_the_batch():
    x, mask = torch.zeros(5, 2), torch.arange(5.0).view(5, 1)
    seen = []

    def branch(live, packed, note):
        seen.append((packed["mask"], note))
        return live + packed["mask"]

    y = keep_rows(x, BranchCall(nn.Identity(), branch, along=({"mask": mask}, "as it is")), Rows(3, 4))
    assert_same(y[:, 0], torch.tensor([0.0, 1.0, 0.0, 3.0, 4.0]))
    assert_same(seen[0][0], mask[[3, 4, 0, 1]])
    assert seen[0][1] == "as it is"
    assert_same(take_rows(mask, Rows(4, 2)), mask[[4, 0]])
    assert take_rows(mask, Rows(2, 5)) is mask


def saved_bytes(function):
    """Bytes of the storages that a forward keeps for backward, parameters apart."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("window", [Rows(0, 8), Rows(12, 8)])
def test_half_of_the_rows_keep_half_of_the_activations(window):
    """A branch saves its live rows only, and the ReLU after the sum one bit a unit."""
    branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    x = torch.randn(16, 8, 8, 8, requires_grad=True)

    def run(window):
        start = x.abs()
        return keep_rows(start * 1, BranchCall(nn.Identity(), branch, post=nn.ReLU()), window)

    rest = saved_bytes(lambda: x.abs() * 1)
    whole = saved_bytes(lambda: run(Rows(0, 16))) - rest
    assert saved_bytes(lambda: run(window)) - rest <= 0.55 * whole


def test_dead_branch_keeps_nothing():
    block = Residual(nn.Linear(4, 4), rule=StochasticDepth(0.5), post=nn.ReLU(), settled=True).eval()
    block.rule.rates = (0.0,)
    x = torch.rand(3, 4, requires_grad=True)
    start = x * 1
    assert block(start) is start


def test_settled_block_equals_the_unsettled_one():
    """Where the shortcut is not negative, leaving the ReLU out where the branch is absent changes nothing."""
    torch.manual_seed(7)
    branch = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
    x = torch.rand(6, 3, 4, 4)
    for granularity, draw in (
        ("block", Draw((), alive=False)),
        ("block", Draw((), alive=True)),
        ("row", Draw((), key=9)),
    ):
        outputs = []
        for settled in (False, True):
            rule = StochasticDepth(0.5, granularity=granularity)
            block = Residual(branch, rule=rule, post=nn.ReLU(), settled=settled)
            attach(block)
            branch[1].reset_running_stats()
            with using(block, Plan((draw,))):
                outputs.append(block(x))
        torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)


# Branches that live elsewhere


def test_touch_gives_zero_gradients_and_moves_no_statistics():
    branch = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    before = branch[0].running_mean.clone()
    x = torch.randn(4, 2, 1, 1, requires_grad=True)  # one row of one pixel, which batch norm could not train on
    y = with_zero_gradients(x, x * 3, BranchCall(nn.Identity(), branch))
    assert_same(y, x * 3)
    y.sum().backward()
    assert_same(x.grad, torch.full_like(x, 3.0))
    assert all(parameter.grad.abs().max() == 0 for parameter in branch.parameters())
    assert_same(branch[0].running_mean, before)
    assert branch[0].num_batches_tracked == 0
    assert branch[0].training


def test_touch_of_a_branch_that_overflows_is_harmless():
    weight = torch.ones(2, requires_grad=True)
    x = torch.ones(3, 2, requires_grad=True)
    y = with_zero_gradients(x, x, BranchCall(nn.Identity(), lambda live: live * weight * float("inf")))
    y.sum().backward()
    assert_same(y, torch.ones(3, 2))
    assert_same(x.grad, torch.ones(3, 2))


# Chains: batches that nobody else sees are written in place


def run(model, x, chained, plan, weight, **options):
    """Output and gradients of a training pass, with or without the lane."""
    forward = Chain.forward
    model.zero_grad()
    start = x.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch, using(model, plan):
        if not chained:
            patch.setattr(Chain, "forward", nn.Sequential.forward)
        assert (Chain.forward is forward) == chained
        y = model(start)
    y.backward(weight, **options)
    return [y.detach(), start.grad, *[parameter.grad for parameter in model.parameters()]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet-20", {}),
        ("resnet-20", {"block": "v2"}),
        ("resnet-20", {"shortcut": "project", "rescale": "train"}),
        ("resnet-20", {"survival": "linear_decay(0.05)"}),  # windows of no row, of a view, of all rows
        ("resnet-20", {"transform": True}),
        ("vanilla-12", {"in_features": 192, "width": 16}),
    ],
)
def test_chain_equals_sequence(name, options):
    """In place or not, the numbers are the same, bit for bit, for many draws."""
    options = {"survival": 0.5, "granularity": "row", "classes": 3, **options}
    model = create(name, rule="stochastic-depth", seed=3, **options)
    x = torch.randn(7, 192) if name.startswith("vanilla") else torch.randn(7, 3, 8, 8)
    x = x if x.ndim == 2 else x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(7, 3)
    for step in range(6):
        plan = sampler_of(model).plan(step)
        model.load_state_dict(create(name, rule="stochastic-depth", seed=4, **options).state_dict())  # batch norm, too
        chained = run(model, x, True, plan, weight)
        model.load_state_dict(create(name, rule="stochastic-depth", seed=4, **options).state_dict())
        sequence = run(model, x, False, plan, weight)
        for a, b in zip(chained, sequence, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("survival", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_a_chain_differentiates_each_relu_once_and_nothing_else(survival, create_graph):
    """Rows that no block of the chain made have gradients of their own where they are zero."""
    rule = {"granularity": "row"}
    blocks = [
        Residual(nn.Linear(6, 6), None, StochasticDepth(survival, **rule), nn.ReLU(), settled=True) for _ in range(4)
    ]
    blocks.insert(2, Residual(nn.Linear(6, 6), nn.ReLU(), StochasticDepth(survival, **rule), nn.ReLU(), settled=True))
    chain = Chain(*blocks)
    sampler = attach(chain, seed=5)
    x = torch.randn(9, 6).relu()
    weight = torch.randn(9, 6)
    for step in range(40):
        plan = sampler.plan(step)
        found = [run(chain, x, chained, plan, weight, create_graph=create_graph) for chained in (True, False)]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_chain_writes_in_place():
    """That the lane is used at all: of a chain's blocks only the first makes a new batch."""
    made = []
    real = torch.empty_like

    def spy(x, **options):
        made.append(x.shape)
        return real(x, **options)

    blocks = Chain(*(Residual(nn.Linear(4, 4), rule=StochasticDepth(0.5, granularity="row")) for _ in range(5)))
    sampler = attach(blocks)
    with using(blocks, sampler.plan(0)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", spy)
        x = torch.randn(8, 4)
        before = x.clone()
        blocks(x)
        assert len(made) == 1
        nn.Sequential.forward(blocks, x)
        assert len(made) == 6
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize("place", ["block", "rule", "backward", "global"])
def test_nobody_sees_a_batch_that_changes_later(place):
    """With a hook anywhere, what it saw stays as it was, and gradients it saw, too."""
    blocks = Chain(*(Residual(nn.Linear(4, 4), rule=StochasticDepth(0.5, granularity="row")) for _ in range(5)))
    sampler = attach(blocks)
    seen = []

    def look(module, inputs, output):
        if isinstance(module, (Residual, StochasticDepth)):
            seen.extend((tensor, tensor.detach().clone()) for tensor in (inputs[0], output) if tensor is not None)

    handles = []
    for block in blocks:
        if place == "block":
            handles.append(block.register_forward_hook(look))
        elif place == "rule":
            handles.append(block.rule.register_forward_hook(look))
        elif place == "backward":
            handles.append(block.register_full_backward_hook(lambda m, gi, go: look(m, gi, go[0])))
    if place == "global":
        handles.append(nn.modules.module.register_module_forward_hook(look))
    try:
        with using(blocks, sampler.plan(1)):
            y = blocks(torch.randn(8, 4, requires_grad=True))
        y.square().sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) >= 8
    for tensor, copy in seen:
        torch.testing.assert_close(tensor.detach(), copy, rtol=0, atol=0)


def test_chain_can_go_backward_twice_and_to_second_order():
    blocks = Chain(
        *(Residual(nn.Linear(3, 3), rule=StochasticDepth(0.5, granularity="row")) for _ in range(4))
    ).double()
    plan = attach(blocks).plan(2)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def f(x):
        with using(blocks, plan):
            return torch.tanh(blocks(x))

    y = f(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(f, (x,))


@pytest.mark.parametrize("block", ["v1", "v2"])
def test_network_at_half_survival_keeps_half_of_the_activations(block):
    options = {"rule": "stochastic-depth", "survival": 0.5, "block": block}
    x = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)

    def kept(**more):
        model = create("resnet-56", **{**options, **more}).to(memory_format=torch.channels_last)
        return saved_bytes(lambda: model(x))

    whole = kept(rule="constant", survival=1)
    assert kept(granularity="row") <= 0.55 * whole


def test_chain_calls_the_forward_of_a_rule_of_ones_own():
    class Louder(StochasticDepth):
        def forward(self, x, shortcut, branch, **options):
            return 2 * super().forward(x, shortcut, branch, **options)

    blocks = Chain(Residual(nn.Identity(), rule=Louder(1.0, granularity="row")))
    assert not blocks[0].unobserved()
    torch.testing.assert_close(blocks.eval()(torch.ones(3, 2)), torch.full((3, 2), 4.0))
