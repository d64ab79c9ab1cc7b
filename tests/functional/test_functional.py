"""Unit masks against slow references, at their corners, in every format."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers import assert_binomial
from reference import unit_coin, unit_coins
from residrop.common.errors import ConfigError
from residrop.functional import mix, row_mask, skip_forward, swapout, unit_dropout, unit_mask
from residrop.functional.call import BranchCall
from residrop.functional.rows import keep_rows
from residrop.functional.units import placed
from residrop.schedule.sampler import Rows, derive_key

KEY = 0x0123456789ABCDEF
KEYS = st.integers(0, 2**64 - 1)
THETAS = st.floats(0.0, 1.0)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (17,), (0,), (3, 5), (0, 4), (4, 0), (5, 1, 3), (2, 3, 4, 5), (2, 3, 2, 3, 2)]


def pair(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, f = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), f.to(dtype)


def assert_same(a, b):
    """Equal in value, dtype, shape and device."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# Against the reference hash


def test_swapout_equals_loop_over_units():
    x, f = pair((3, 4, 2))
    expected = torch.empty_like(x)
    for unit in range(x.numel()):
        value = 0.0
        if unit_coin(KEY, unit, 0.7, coin=0):
            value += x.flatten()[unit].item()
        if unit_coin(KEY, unit, 0.4, coin=1):
            value += f.flatten()[unit].item()
        expected.view(-1)[unit] = value
    assert_same(swapout(x, f, 0.7, 0.4, KEY), expected)


@given(KEYS, THETAS, st.integers(0, 6), st.sampled_from(SHAPES))
def test_unit_mask_equals_reference(key, theta, coin, shape):
    mask = unit_mask(torch.empty(shape), theta, key, coin)
    assert mask.dtype == torch.bool
    assert_same(mask.double(), unit_coins(key, shape, theta, coin))


@pytest.mark.parametrize("key", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0x7FEB352D846CA68B])
def test_unit_mask_equals_reference_at_key_corners(key):
    assert_same(unit_mask(torch.empty(64), 0.5, key).double(), unit_coins(key, (64,), 0.5))


@given(KEYS, THETAS, THETAS, st.sampled_from(SHAPES))
def test_mix_of_two_is_swapout(key, theta_1, theta_2, shape):
    x, f = pair(shape)
    assert_same(mix((x, f), (theta_1, theta_2), key), swapout(x, f, theta_1, theta_2, key))


@given(KEYS, st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), min_size=1, max_size=7))
def test_mix_of_many_equals_reference(key, thetas):
    shape = (3, 4)
    tensors = [pair(shape, seed=i)[0] for i in range(len(thetas))]
    masks = [unit_coins(key, shape, theta, coin) for coin, theta in enumerate(thetas)]
    expected = sum(mask * x for mask, x in zip(masks, tensors, strict=True))
    torch.testing.assert_close(mix(tensors, thetas, key), expected, rtol=1e-15, atol=1e-15)


@given(KEYS, THETAS)
def test_skip_forward_equals_reference(key, theta):
    x, f = pair((3, 4))
    mask = unit_coins(key, (3, 4), theta)
    assert_same(skip_forward(x, f, theta, key), mask * f + (1 - mask) * x)


@given(KEYS, THETAS)
def test_unit_dropout_equals_reference(key, theta):
    x, _ = pair((3, 4))
    assert_same(unit_dropout(x, theta, key), unit_coins(key, (3, 4), theta) * x)


def test_row_mask_equals_reference():
    assert_same(row_mask(50, 0.3, KEY).double(), unit_coins(KEY, (50,), 0.3))
    assert row_mask(0, 0.3, KEY).shape == (0,)


def test_theta_rounds_to_2_to_the_minus_16():
    like = torch.empty(1 << 17)
    assert_same(unit_mask(like, 0.3, KEY), unit_mask(like, round(0.3 * 65536) / 65536, KEY))
    assert unit_mask(like, 0.4 / 65536, KEY).sum() == 0
    assert_binomial(int(unit_mask(like, 1 / 65536, KEY).sum()), like.numel(), 1 / 65536)


def test_masks_monotone_in_theta():
    like = torch.empty(5000)
    low, high = unit_mask(like, 0.3, KEY), unit_mask(like, 0.6, KEY)
    assert not (low & ~high).any()
    assert (high & ~low).any()


def test_neighbouring_raw_keys_are_not_permutations_of_each_other():
    """`key` is public: a user may pass 0, 1, 2, ... for the steps. Counts of present units must then vary."""
    like = torch.empty(256)
    counts = {int(unit_mask(like, 0.5, key).sum()) for key in range(100)}
    assert len(counts) > 10


# Corners


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", [KEY, None])
def test_swapout_corners(dtype, key):
    x, f = pair((4, 9), dtype)
    assert_same(swapout(x, f, 1, 1, key), x + f)
    assert_same(swapout(x, f, 0, 1, key), f)
    assert_same(swapout(x, f, 1, 0, key), x)
    assert_same(swapout(x, f, 0, 0, key), torch.zeros_like(x))


@pytest.mark.parametrize("key", [KEY, None])
def test_skip_forward_corners(key):
    x, f = pair((4, 9))
    assert_same(skip_forward(x, f, 1, key), f)
    assert_same(skip_forward(x, f, 0, key), x)


@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_unit_dropout_corners(theta):
    x, _ = pair((4, 9))
    assert_same(unit_dropout(x, theta, KEY), theta * x)


def test_expectations():
    x, f = pair((4, 9))
    torch.testing.assert_close(swapout(x, f, 0.7, 0.4, None), 0.7 * x + 0.4 * f, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(skip_forward(x, f, 0.7, None), 0.7 * f + 0.3 * x, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(unit_dropout(x, 0.7, None), 0.7 * x, rtol=1e-15, atol=1e-15)
    mixed = mix((x, f, x * f), (0.1, 0.2, 0.3), None)
    torch.testing.assert_close(mixed, 0.1 * x + 0.2 * f + 0.3 * x * f, rtol=1e-14, atol=1e-15)


def test_swapout_support_has_all_four_choices():
    x, f = torch.full((40, 50), 1.0), torch.full((40, 50), 10.0)
    values, counts = swapout(x, f, 0.7, 0.4, KEY).unique(return_counts=True)
    assert values.tolist() == [0.0, 1.0, 10.0, 11.0]
    for count, probability in zip(counts.tolist(), (0.3 * 0.6, 0.7 * 0.6, 0.3 * 0.4, 0.7 * 0.4), strict=True):
        assert_binomial(count, 2000, probability)


def test_masks_differ_across_units_and_rows():
    mask = unit_mask(torch.empty(30, 40), 0.5, KEY)
    assert len({tuple(row) for row in mask.tolist()}) == 30
    assert len({tuple(column) for column in mask.T.tolist()}) == 40


@pytest.mark.parametrize("dtype", DTYPES)
def test_skip_forward_units_are_x_or_f_and_masks_complementary(dtype):
    x, f = pair((20, 30), dtype)
    y = skip_forward(x, f, 0.3, KEY)
    assert torch.all((y == x) | (y == f))
    ones, zeros = torch.ones_like(x), torch.zeros_like(x)
    theta, rest = skip_forward(zeros, ones, 0.3, KEY), skip_forward(ones, zeros, 0.3, KEY)
    assert_same(theta + rest, ones)
    assert_binomial(int(theta.sum(dtype=torch.float64)), 600, 0.3)


# Infinities and NaN


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_values_of_absent_units_vanish(bad, dtype):
    ones = torch.ones(8, 25, dtype=dtype)
    bads = torch.full_like(ones, bad)
    keep_x, keep_f = (unit_mask(ones, 0.5, KEY, coin) for coin in (0, 1))
    assert_same(swapout(ones, bads, 0.5, 0.5, KEY)[~keep_f], keep_x[~keep_f].to(dtype))
    assert_same(swapout(bads, ones, 0.5, 0.5, KEY)[~keep_x], keep_f[~keep_x].to(dtype))
    assert_same(unit_dropout(bads, 0.5, KEY)[~keep_x], torch.zeros_like(ones)[~keep_x])
    assert_same(skip_forward(ones, bads, 0.5, KEY)[~keep_x], ones[~keep_x])
    assert_same(skip_forward(bads, ones, 0.5, KEY)[keep_x], ones[keep_x])
    assert not torch.isfinite(unit_dropout(bads, 0.5, KEY)[keep_x]).any()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("function", ["swapout", "skip_forward", "unit_dropout"])
def test_bad_gradients_of_absent_units_vanish(bad, function):
    x, f = (t.requires_grad_() for t in pair((8, 25)))
    masks = [unit_mask(x, 0.5, KEY, coin) for coin in (0, 1)]
    if function == "swapout":
        y, present = swapout(x, f, 0.5, 0.5, KEY), masks
    elif function == "skip_forward":
        y, present = skip_forward(x, f, 0.5, KEY), [~masks[0], masks[0]]
    else:
        y, present = unit_dropout(x, 0.5, KEY), masks[:1]
    y.backward(torch.full_like(y, bad))
    for tensor, mask in zip((x, f), present, strict=False):
        assert torch.all(tensor.grad[~mask] == 0)
        assert not torch.isfinite(tensor.grad[mask]).any()


# Formats


def formats(x):
    yield "contiguous", x.contiguous()
    yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x
    yield "strided", torch.stack((x, x), -1)[..., 0]
    if x.ndim == 4:
        yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    if x.ndim == 5:
        yield "channels_last_3d", x.contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_formats_kept_and_results_independent_of_them(shape, dtype):
    x, f = pair(shape, dtype)
    plain = swapout(x, f, 0.7, 0.4, KEY), skip_forward(x, f, 0.7, KEY), unit_dropout(x, 0.7, KEY)
    for name, x2 in formats(x):
        for y, expected in zip(
            (swapout(x2, f, 0.7, 0.4, KEY), skip_forward(x2, f, 0.7, KEY), unit_dropout(x2, 0.7, KEY)),
            plain,
            strict=True,
        ):
            assert_same(y, expected)
            assert y.dtype == dtype, name
        assert_same(unit_mask(x2, 0.5, KEY), unit_mask(x, 0.5, KEY))


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_kept_forward_and_backward(dtype, theta):
    x, f = (t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in pair((2, 3, 4, 5), dtype))
    for function in (
        lambda: swapout(x, f, theta, theta, KEY),
        lambda: skip_forward(f, x, theta, KEY),
        lambda: unit_dropout(x, theta, KEY),
        lambda: swapout(x, f, theta, theta, None),
    ):
        y = function()
        assert y.is_contiguous(memory_format=torch.channels_last)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert gradient.is_contiguous(memory_format=torch.channels_last)
        assert gradient.dtype == dtype


@pytest.mark.parametrize("first", ["x", "f"])
def test_unequal_formats_combine(first):
    x, f = pair((2, 3, 4, 5))
    expected = swapout(x, f, 0.5, 0.5, KEY)
    x2, f2 = x, f
    if first == "x":
        x2 = x.contiguous(memory_format=torch.channels_last)
    else:
        f2 = f.contiguous(memory_format=torch.channels_last)
    assert_same(swapout(x2, f2, 0.5, 0.5, KEY), expected)
    assert_same(skip_forward(x2, f2, 0.5, KEY), skip_forward(x, f, 0.5, KEY))


def test_expanded_input():
    x, f = pair((4, 6))
    row = x[:1].expand(4, 6)
    assert_same(swapout(row, f, 0.5, 0.5, KEY), swapout(row.clone(), f, 0.5, 0.5, KEY))
    assert_same(swapout(f, row, 0.5, 0.5, KEY), swapout(f, row.clone(), 0.5, 0.5, KEY))
    assert_same(swapout(row, f, 1, 0.5, KEY), swapout(row.clone(), f, 1, 0.5, KEY))


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
def test_inputs_are_not_changed_or_returned(theta):
    x, f = pair((4, 6))
    x0, f0 = x.clone(), f.clone()
    for y in (swapout(x, f, theta, theta, KEY), skip_forward(x, f, theta, KEY), unit_dropout(x, theta, KEY)):
        y.fill_(7.0)
        assert_same(x, x0)
        assert_same(f, f0)


def test_mask_independent_of_threads_and_generator():
    threads = torch.get_num_threads()
    like = torch.empty(64, 32, 32)
    masks = []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            torch.manual_seed(number)
            masks.append(unit_mask(like, 0.5, KEY))
    finally:
        torch.set_num_threads(threads)
    assert_same(masks[0], masks[1])
    assert_same(masks[0], masks[2])


def test_generator_untouched():
    x, f = (t.requires_grad_() for t in pair((4, 6)))
    state = torch.get_rng_state()
    (swapout(x, f, 0.5, 0.5, KEY).sum() + skip_forward(x, f, 0.5, KEY).sum()).backward()
    row_mask(9, 0.5, KEY)
    assert_same(torch.get_rng_state(), state)


def test_mask_of_rows_is_prefix_of_larger_batch():
    """Units are numbered in row-major order, so more rows do not change the earlier ones."""
    assert_same(unit_mask(torch.empty(9, 2, 3), 0.5, KEY)[:4], unit_mask(torch.empty(4, 2, 3), 0.5, KEY))
    assert_same(unit_mask(torch.empty(4, 6), 0.5, KEY).view(4, 2, 3), unit_mask(torch.empty(4, 2, 3), 0.5, KEY))


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 3, 4), (6, 0)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rows", [[3], [5, 0, 0], [], [1, 2, 3, 4, 5, 0]])
def test_placed_rows_have_the_coins_of_their_places(shape, layout, rows):
    x, f = (t.contiguous(memory_format=layout if len(shape) == 4 else torch.contiguous_format) for t in pair(shape))
    chosen = torch.tensor(rows, dtype=torch.int64)
    for whole, part in (
        (swapout(x, f, 0.7, 0.4, KEY), lambda: swapout(x[chosen], f[chosen], 0.7, 0.4, KEY)),
        (skip_forward(x, f, 0.6, KEY), lambda: skip_forward(x[chosen], f[chosen], 0.6, KEY)),
        (unit_dropout(x, 0.3, KEY), lambda: unit_dropout(x[chosen], 0.3, KEY)),
        (unit_mask(x, 0.3, KEY, 2), lambda: unit_mask(x[chosen], 0.3, KEY, 2)),
    ):
        with placed(chosen, 6):
            assert_same(part(), whole[chosen])


def test_placed_rows_of_a_large_tensor_equal_reference():
    """Several pieces (`units._PIECE`) of a tensor of which not all rows are there."""
    rows = torch.arange(0, 1 << 11, 3)
    mask = unit_mask(torch.empty(1 << 11, 1 << 10), 0.3, KEY)[rows]
    with placed(rows, 1 << 11):
        assert_same(unit_mask(torch.empty(len(rows), 1 << 10), 0.3, KEY), mask)


def test_placed_rows_refused():
    x = torch.ones(3, 4, requires_grad=True)
    with placed(torch.arange(3), 1 << 29):
        with pytest.raises(ConfigError, match="does not have the 3 rows"):
            unit_dropout(x[:2], 0.5, KEY)
        with pytest.raises(ConfigError, match="2147483648 elements"):
            unit_dropout(x, 0.5, KEY)
    with placed(torch.arange(3), 3):
        assert not unit_dropout(x, 0.5, KEY).requires_grad
    assert unit_dropout(x, 0.5, KEY).requires_grad


def test_permuting_rows_with_their_masks_permutes_results():
    x, f = pair((6, 5))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    keep_x, keep_f = (unit_mask(x, 0.5, KEY, coin) for coin in (0, 1))
    direct = swapout(x[order], f[order], 0.5, 0.5, KEY)
    assert_same(direct, keep_x * x[order] + keep_f * f[order])
    assert not torch.equal(direct, swapout(x, f, 0.5, 0.5, KEY)[order])  # masks belong to places, not to samples


# Gradients


def gradient_cases():
    x, f = (t.requires_grad_() for t in pair((3, 4)))
    third = pair((3, 4), seed=1)[0].requires_grad_()
    for key in (KEY, None):
        yield lambda a, b, key=key: swapout(a, b, 0.6, 0.5, key), (x, f)
        yield lambda a, b, key=key: swapout(a, b, 1.0, 0.5, key), (x, f)
        yield lambda a, b, key=key: swapout(a, b, 0.0, 1.0, key), (x, f)
        yield lambda a, b, key=key: skip_forward(a, b, 0.6, key), (x, f)
        yield lambda a, key=key: unit_dropout(a, 0.6, key), (x,)
        yield lambda a, b, c, key=key: mix((a, b, c), (0.6, 0.5, 0.4), key), (x, f, third)


@pytest.mark.parametrize("index", range(12))
def test_gradients_of_every_order(index):
    function, inputs = list(gradient_cases())[index]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    # masks are linear; a square on top makes the second order non-trivial
    assert torch.autograd.gradgradcheck(lambda *tensors: function(*tensors).pow(3), inputs)


def test_gradients_are_the_masks():
    x, f = (t.requires_grad_() for t in pair((5, 7)))
    swapout(x, f, 0.6, 0.3, KEY).sum().backward()
    assert_same(x.grad, unit_coins(KEY, (5, 7), 0.6, 0))
    assert_same(f.grad, unit_coins(KEY, (5, 7), 0.3, 1))
    x.grad = f.grad = None
    skip_forward(x, f, 0.6, KEY).sum().backward()
    assert_same(f.grad, unit_coins(KEY, (5, 7), 0.6))
    assert_same(x.grad + f.grad, torch.ones_like(x))


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_gradients_only_where_needed(needed):
    tensors = [pair((3, 4), seed=i)[0] for i in range(3)]
    tensors[needed].requires_grad_()
    y = mix(tensors, (0.5, 0.5, 0.5), KEY)
    (gradient,) = torch.autograd.grad(y.sum(), tensors[needed])
    assert_same(gradient, unit_coins(KEY, (3, 4), 0.5, needed))
    assert not mix([t.detach() for t in tensors], (0.5, 0.5, 0.5), KEY).requires_grad


def test_third_order_with_one_input():
    x, f = pair((3, 4))
    f.requires_grad_()
    g = (swapout(x, f, 0.7, 0.6, KEY) ** 4).sum()
    for _ in range(3):
        (g,) = torch.autograd.grad(g.sum(), f, create_graph=True)
    mask = unit_coins(KEY, (3, 4), 0.6, 1)
    torch.testing.assert_close(g, 24 * mask * swapout(x, f, 0.7, 0.6, KEY), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
def test_nothing_saved_for_backward(theta):
    saved = []

    def pack(tensor):
        saved.append(tensor.shape)
        return tensor

    x, f = (t.requires_grad_() for t in pair((4, 6)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [
            swapout(x, f, theta, 0.5, KEY),
            skip_forward(x, f, theta, KEY),
            unit_dropout(x, theta, KEY),
            mix((x, f, x, f, x), (theta,) * 5, KEY),
        ]
        assert saved == []
        (x * f).sum()
        assert len(saved) == 2  # the hook does count
    assert all(y.requires_grad for y in outputs)


# Dtypes


@pytest.mark.parametrize("key", [KEY, None])
@pytest.mark.parametrize(
    ("a", "b", "result"),
    [
        (torch.float32, torch.float64, torch.float64),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_unequal_dtypes_promote_like_addition(a, b, result, key):
    x, f = pair((4, 6))
    x, f = x.to(a).requires_grad_(), f.to(b).requires_grad_()
    assert (x + f).dtype == result
    wide = [t.detach().to(result) for t in (x, f)]
    for function in (lambda u, v: swapout(u, v, 0.5, 0.6, key), lambda u, v: skip_forward(u, v, 0.5, key)):
        y = function(x, f)
        assert y.dtype == result
        torch.testing.assert_close(y, function(*wide), rtol=1e-2, atol=1e-2)
        gradients = torch.autograd.grad(y.sum(), (x, f))
        assert [g.dtype for g in gradients] == [a, b]


def test_masks_equal_in_every_dtype():
    masks = [unit_dropout(torch.ones(40, 5, dtype=dtype), 0.3, KEY).double() for dtype in DTYPES]
    for mask in masks:
        assert_same(mask, unit_coins(KEY, (40, 5), 0.3))


def test_autocast_keeps_branch_and_shortcut_apart():
    layer, x = nn.Linear(6, 6), torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f = layer(x)
        assert f.dtype == torch.bfloat16
        y = swapout(x, f, 0.5, 0.5, KEY)
        z = keep_rows(x, BranchCall(lambda t: t, layer), Rows(1, 2))
    assert y.dtype == z.dtype == torch.float32
    assert_same(y, swapout(x, f.float(), 0.5, 0.5, KEY))
    assert_same(z, x + f.float() * torch.tensor([[0.0], [1], [1], [0]]))
    (y.sum() + z.sum()).backward()
    assert layer.weight.grad.dtype == torch.float32
    assert torch.isfinite(layer.weight.grad).all()


# Refusals


@pytest.mark.parametrize("key", [KEY, None])
@pytest.mark.parametrize("theta", [-0.1, 1.1, float("nan"), True, "0.5", None])
def test_thetas_refused_drawn_or_not(theta, key):
    x, f = pair((3, 4))
    with pytest.raises(ConfigError, match="theta_2 is"):
        swapout(x, f, 0.5, theta, key)
    with pytest.raises(ConfigError, match="theta_1 is"):
        unit_dropout(x, theta, key)
    with pytest.raises(ConfigError, match="theta is"):
        skip_forward(x, f, theta, key)


def test_mask_theta_refused():
    with pytest.raises(ConfigError, match=r"theta is 1\.5"):
        unit_mask(torch.empty(3), 1.5, KEY)
    with pytest.raises(ConfigError, match="is nan"):
        row_mask(3, float("nan"), KEY)


@pytest.mark.parametrize("key", [KEY, None])
def test_shapes_refused(key):
    x, f = pair((3, 4))
    with pytest.raises(ConfigError, match=r"tensor 2 has shape \(3, 1\), the first \(3, 4\); shapes must agree"):
        swapout(x, f[:, :1], 0.5, 0.5, key)
    with pytest.raises(ConfigError, match=r"tensor 3 has shape \(4,\)"):
        mix((x, f, f[0]), (0.5, 0.5, 0.5), key)
    with pytest.raises(ConfigError, match=r"shortcut has shape \(3, 4\), branch \(4,\); shapes must agree"):
        skip_forward(x, f[0], 0.5, key)


@pytest.mark.parametrize("key", [KEY, None])
def test_numbers_of_thetas_refused(key):
    x, f = pair((3, 4))
    with pytest.raises(ConfigError, match="0 tensors and 0 thetas were given; give one theta per tensor"):
        mix((), (), key)
    with pytest.raises(ConfigError, match="2 tensors and 1 thetas"):
        mix((x, f), (0.5,), key)
    with pytest.raises(ConfigError, match="1 tensors and 2 thetas"):
        mix((x,), (0.5, 0.5), key)


# Tensors larger than one piece of work

LARGE = [(600_001,), (5, 70_001), (3, 300_000), (300_001, 2), (7, 3, 111, 133), (1, 300_000)]


@pytest.mark.parametrize("shape", LARGE)
def test_large_tensors_equal_reference(shape):
    """Unit numbers run on across whatever pieces the work is cut into."""
    x, f = torch.full(shape, 1.0), torch.full(shape, 2.0)
    y = swapout(x, f, 0.6, 0.5, KEY).flatten()
    select = skip_forward(x, f, 0.6, KEY).flatten()
    units = [*range(0, x.numel(), 997), *range(2**18 - 3, 2**18 + 3), *range(x.numel() - 3, x.numel())]
    for unit in units:
        kept = unit_coin(KEY, unit, 0.6, 0)
        assert y[unit] == kept + 2 * unit_coin(KEY, unit, 0.5, 1)
        assert select[unit] == (2 if kept else 1)
    assert_same(unit_mask(x, 0.6, KEY), ((y == 1) | (y == 3)).view(shape))
    assert_same(unit_dropout(x, 0.6, KEY), unit_mask(x, 0.6, KEY).float())


@pytest.mark.parametrize("shape", LARGE)
def test_large_gradients_are_the_masks(shape):
    x, f = (torch.zeros(shape, requires_grad=True) for _ in range(2))
    swapout(x, f, 0.6, 0.5, KEY).sum().backward()
    assert_same(x.grad, unit_mask(x, 0.6, KEY).float())
    assert_same(f.grad, unit_mask(x, 0.5, KEY, coin=1).float())
    x.grad = f.grad = None
    skip_forward(x, f, 0.6, KEY).sum().backward()
    assert_same(f.grad, unit_mask(x, 0.6, KEY).float())
    assert_same(x.grad, 1 - f.grad)


def test_large_channels_last_equals_contiguous():
    x, f = (t.float() for t in pair((5, 8, 100, 120)))
    x2, f2 = (t.contiguous(memory_format=torch.channels_last) for t in (x, f))
    y = swapout(x2, f2, 0.5, 0.5, KEY)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_same(y, swapout(x, f, 0.5, 0.5, KEY))


def test_huge_tensor_refused():
    with pytest.raises(ConfigError, match="2147483648 elements is too large for unit masks"):
        unit_mask(torch.empty(1).expand(2**31), 0.5, KEY)


def test_derived_keys_give_unrelated_masks():
    like = torch.empty(4096)
    same = [
        (unit_mask(like, 0.5, derive_key(1, i)) == unit_mask(like, 0.5, derive_key(1, i + 1))).sum() for i in range(50)
    ]
    for count in same:
        assert_binomial(int(count), 4096, 0.5)
