"""What the compiler is given on the CPU in place of its own forms: the numbers of torch's kernels, in faster code."""

import shutil
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn import functional as F

import residrop
from residrop.engines import decompositions
from residrop.engines.decompositions import inductor

aten = torch.ops.aten
EXACT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}
SHAPES = [(2, 3, 1, 1), (1, 1, 3, 5), (4, 16, 8, 8), (3, 33, 7, 5), (128, 16, 4, 4)]
compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def batch(shape, dtype, seed=0, mean=0.0):
    x = mean + torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def vectors(channels, dtype, affine=True):
    """Weight and bias or None, running mean and variance."""
    kind = torch.promote_types(dtype, torch.float32)
    made = [batch((channels, 1, 1, 1), kind, seed).flatten() for seed in range(1, 5)]
    made[3] = made[3].abs()
    return made if affine else [None, None, *made[2:]]


def of_torch(x, weight, bias, running_mean, running_var, grad, momentum=0.1, eps=1e-5):
    """What torch's own kernels give, running statistics among it."""
    running = running_mean.clone(), running_var.clone()
    out, mean, rstd = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
    grads = aten.native_batch_norm_backward(
        grad, x, weight, *running, mean, rstd, True, eps, [True, weight is not None, bias is not None]
    )
    return out, mean, rstd, *running, *grads


def of_ours(x, weight, bias, running_mean, running_var, grad, momentum=0.1, eps=1e-5):
    out, mean, rstd, *running = decompositions._batch_norm(
        x, weight, bias, running_mean, running_var, True, momentum, eps
    )
    grads = decompositions._batch_norm_backward(
        grad, x, weight, *running, mean, rstd, True, eps, [True, weight is not None, bias is not None]
    )
    return out, mean, rstd, *running, *grads


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_equals_that_of_torch(shape, dtype, affine):
    x, grad, given = batch(shape, dtype), batch(shape, dtype, 9), vectors(shape[1], dtype, affine)
    exact = of_torch(*(one if one is None else one.double() for one in (x, *given, grad)))
    found, torchs = of_ours(x, *given, grad), of_torch(x, *given, grad)
    assert [one is None for one in found] == [one is None for one in torchs]
    for ours, theirs, true in zip(
        *([one for one in many if one is not None] for many in (found, torchs, exact)), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert ours.ndim < 4 or ours.is_contiguous(memory_format=torch.channels_last)
        error, least = ((one - true).abs().max() for one in (ours, theirs))
        assert error <= 4 * least + 4 * EXACT[dtype] * max(1.0, true.abs().max())


@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
def test_variance_far_from_zero_loses_no_digits(mean):
    """Sums of squares would leave nothing of it at 1e4, where float32 resolves 1e-3."""
    x = batch((16, 8, 16, 16), torch.float32, mean=mean)
    _, found, rstd, *_ = of_ours(x, *vectors(8, torch.float32), x)
    exact = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(found.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (exact + 1e-5).rsqrt(), rtol=1e-5, atol=0)


class _Norm(torch.autograd.Function):
    """Forward and backward of ours as autograd sees them."""

    @staticmethod
    def forward(ctx, x, weight, bias, running):
        out, mean, rstd, *_ = decompositions._batch_norm(x, weight, bias, *running, True, 0.1, 1e-5)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        made = decompositions._batch_norm_backward(grad, x, weight, None, None, mean, rstd, True, 1e-5, [True] * 3)
        return *made, None


def test_gradients_are_those_of_the_forward():
    x = batch((3, 2, 4, 4), torch.float64).requires_grad_()
    weight, bias, *running = vectors(2, torch.float64)
    given = x, weight.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: _Norm.apply(*args, running), given)


def test_batch_norm_declines_what_it_has_no_form_for():
    x = batch((4, 16, 8, 8), torch.float32)
    weight, bias, mean, var = vectors(16, torch.float32)

    def forward(x=x, weight=weight, mean=mean, var=var, training=True):
        return decompositions._batch_norm(x, weight, bias, mean, var, training, 0.1, 1e-5)

    assert forward() is not NotImplemented
    assert forward(training=False) is NotImplemented
    assert forward(x=x.contiguous()) is NotImplemented
    assert forward(x=x.flatten(2)) is NotImplemented
    assert forward(mean=None, var=None) is NotImplemented
    assert forward(weight=weight.bfloat16()) is NotImplemented
    assert forward(x=x.to("meta")) is NotImplemented
    assert decompositions._batch_norm_backward(
        x.contiguous(), x, weight, mean, var, mean, var, True, 1e-5, [True] * 3
    ) is NotImplemented  # fmt: skip


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_gradient_of_relu_bit_for_bit(dtype, threshold):
    x, grad = batch((4, 16, 8, 8), dtype).relu(), batch((4, 16, 8, 8), dtype, 1)
    for one in (grad, grad.contiguous(), grad * float("inf")):
        ours = decompositions._threshold_backward(one, x, threshold)
        assert torch.equal(ours, aten.threshold_backward(one, x, threshold))
    assert decompositions._threshold_backward(grad.to("meta"), x.to("meta"), 0.0) is NotImplemented


def test_gradient_of_relu_without_number():
    """An infinite gradient stops at a dead unit; what is no number goes on, so that a lost step is seen to be lost."""
    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    grad = torch.tensor([float("inf"), float("inf"), -float("inf"), -float("inf"), float("nan"), float("nan")])
    inf, nan = float("inf"), float("nan")
    expected = torch.tensor([0.0, inf, 0.0, -inf, nan, nan])
    torch.testing.assert_close(decompositions._threshold_backward(grad, x, 0.0), expected, equal_nan=True)


@pytest.mark.parametrize("window", [(2, 2), (1, 3), (4, 2)])
@pytest.mark.parametrize("dtype", EXACT)
def test_gradient_of_pooling(dtype, window):
    x = batch((3, 5, 8, 6), dtype)
    grad = batch(F.avg_pool2d(x, window).shape, dtype, 1)
    for stride in (list(window), []):
        given = grad, x, list(window), stride, [0, 0], False, True, None
        ours, theirs = decompositions._avg_pool_backward(*given), aten.avg_pool2d_backward(*given)
        torch.testing.assert_close(ours, theirs, rtol=EXACT[dtype], atol=0)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize(
    ("window", "stride", "padding", "divisor"),
    [([2, 2], [1, 1], [0, 0], None), ([3, 3], [3, 3], [0, 0], None), ([2, 2], [2, 2], [1, 1], None),
     ([2, 2], [2, 2], [0, 0], 3), ([2, 3], [2], [0, 0], None)],
)  # fmt: skip
def test_pooling_declines_other_windows(window, stride, padding, divisor):
    x = batch((3, 5, 8, 6), torch.float32)
    grad = batch(F.avg_pool2d(x, window, stride, padding, divisor_override=divisor).shape, torch.float32)
    given = grad, x, window, stride, padding, False, True, divisor
    assert decompositions._avg_pool_backward(*given) is NotImplemented


@pytest.mark.parametrize("pad", [[0, 0, 0, 0, 0, -2], [-1, 0], [-1, -2, 0, -1], [0, 0]])
def test_cropping(pad):
    x = batch((2, 5, 6, 4), torch.float32)
    ours = decompositions._crop(x, pad)
    assert torch.equal(ours, aten.constant_pad_nd(x, pad))
    assert ours.data_ptr() != x.data_ptr()  # an operation that is no view must not return one
    assert decompositions._crop(x, [0, 1]) is NotImplemented


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2), nn.BatchNorm2d(16),
        nn.ReLU(),
    ).to(memory_format=torch.channels_last)  # fmt: skip


def code_with(backend, autocast=True):
    """The C++ of a training step."""
    model, x = network(), batch((16, 3, 32, 32), torch.float32)
    if backend is None:
        model = nn.Sequential(residrop.Residual(model, shortcut=nn.Conv2d(3, 16, 2, 2)))
        residrop.attach(model, seed=0)
        step = residrop.compile(model)
    else:
        step = torch.compile(model, backend=backend)

    def work():
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            step(x).float().square().sum().backward()

    torch._dynamo.reset()
    return "".join(run_and_get_code(work)[1])


@compiled
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_code_has_no_long_chains_and_keeps_no_bools():
    """And is not taken from what plain Inductor has left in its cache for the same graph, nor the other way round."""
    with fresh_cache():
        before = code_with("inductor")
        assert "welford" in before.lower()
        assert "bool*" in before
        for backend in (inductor, None):
            ours = code_with(backend)
            assert "kernel(" in ours
            assert "welford" not in ours.lower()
            assert "bool*" not in ours
        counters.clear()
        code_with("inductor")
        assert counters["inductor"]["fxgraph_cache_hit"] > 0
        code_with(inductor)
        assert counters["inductor"]["fxgraph_cache_bypass"] == 0  # a training starts sooner the second time


@compiled
@pytest.mark.parametrize("autocast", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_with_it_equals_eager(autocast):
    torch.manual_seed(0)
    plain = network()
    fast = network()
    fast.load_state_dict(plain.state_dict())
    step = torch.compile(fast, backend=inductor)
    for seed in range(3):
        x = batch((8, 3, 16, 16), torch.float32, seed)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            a, b = plain(x), step(x)
        weight = batch(a.shape, torch.float32, seed)  # of every unit its own: what is normalised has one sum of squares
        (a * weight).sum().backward()
        (b * weight).sum().backward()
        tolerance = 3e-2 if autocast else 1e-4
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    largest = max(one.grad.abs().max().item() for one in plain.parameters())
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        tolerance = (2e-2 if autocast else 1e-5) * largest
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=tolerance)
    for one, other in zip(plain.buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if autocast else 1e-5, atol=1e-3 if autocast else 1e-6)
    plain.eval(), fast.eval()
    torch.testing.assert_close(plain(x), step(x), rtol=1e-2, atol=1e-2)


VIEWS = {
    "rows": lambda x, norm: norm(x[2:]),
    "rows of what is computed": lambda x, norm: norm(x.sigmoid()[1:4]).relu(),
    "both halves": lambda x, norm: norm(x.chunk(2)[1]) + norm(x.chunk(2)[0]).relu(),
    "pixels": lambda x, norm: norm(torch.cat([x, x], 2)[:, :, 4:]),
    "permuted": lambda x, norm: norm(x.sin().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
    "transposed": lambda x, norm: norm(x.transpose(2, 3).sin()),
}


@compiled
@pytest.mark.parametrize("name", VIEWS)
def test_views_are_read_where_they_are(name):
    """Strides are set by hand; they must be those of the part that a view shows."""
    torch._dynamo.reset()
    x = batch((6, 8, 4, 4), torch.float32)
    found = []
    for backend in ("eager", inductor):
        norm, one = nn.BatchNorm2d(8), x.clone(memory_format=torch.preserve_format).requires_grad_()
        step = torch.compile(lambda x, norm=norm: VIEWS[name](x, norm), backend=backend)
        y = step(one)
        (y * batch(y.shape, torch.float32, 1)).sum().backward()
        found.append((y, one.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var))
    for eager, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
