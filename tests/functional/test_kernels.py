"""Compiled unit-level randomness: the same results as without a compiler, whatever is asked for."""

import shutil
import warnings

import pytest
import torch
from torch._dynamo.utils import counters

from residrop.common.errors import ConfigError
from residrop.functional import kernels, mix, skip_forward, swapout, unit_dropout, use_compiler
from residrop.functional.units import placed

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
SHAPES = [(20000,), (64, 300), (8, 16, 16, 16), (4, 8, 16, 5, 9)]


@pytest.fixture(autouse=True)
def compiler_back():
    yield
    use_compiler("auto")


def both(function, tensors, **options):
    """Result and gradients without and with the compiler."""
    found = []
    for mode in (False, True):
        use_compiler(mode)
        leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
        y = function(*leaves, **options)
        grad = torch.linspace(-1, 1, y.numel()).to(y.dtype).view(y.shape).contiguous(memory_format=memory_format(y))
        found.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    return found


def memory_format(x):
    channels_last = x.ndim == 4 and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def assert_same(found):
    for eager, compiled in zip(*found, strict=True):
        assert eager.dtype == compiled.dtype
        assert eager.stride() == compiled.stride()
        assert torch.equal(eager, compiled)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [
        pytest.param(torch.float32, False, marks=SLOW),  # below, on fewer sizes
        pytest.param(torch.bfloat16, True, marks=SLOW),
        pytest.param(torch.float32, True, marks=SLOW),
        pytest.param(torch.bfloat16, False, marks=SLOW),
        pytest.param(torch.float16, False, marks=SLOW),
        pytest.param(torch.float16, True, marks=SLOW),
        pytest.param(torch.float64, False, marks=SLOW),
        pytest.param(torch.float64, True, marks=SLOW),
    ],
)
def test_equal_to_the_last_bit(dtype, channels_last):
    generator = torch.Generator().manual_seed(0)
    for shape in [(8, 16, 16, 16)] if channels_last else SHAPES:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        tensors = [torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in "abc"]
        assert_same(both(swapout, tensors[:2], theta_1=0.5, theta_2=0.3, key=2**63 + 5))
        assert_same(both(skip_forward, tensors[:2], theta=0.7, key=9))
        assert_same(both(unit_dropout, tensors[:1], theta=0.2, key=11))
        assert_same(both(lambda *each: mix(each, (0.5, 0.9, 0.1), 77), tensors))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=SLOW)])
def test_signed_zeros_are_equal_bits(dtype):
    """torch.equal takes -0.0 for 0.0, so bits are compared."""
    integers = {torch.float32: torch.int32, torch.float16: torch.int16}[dtype]
    zeros = torch.zeros(20000, dtype=dtype)
    numbers = torch.linspace(-2.0, 2.0, 20000).to(dtype)
    for a, b in [(zeros, -zeros), (-zeros, zeros), (-zeros, -zeros), (numbers, numbers.flip(0))]:
        for function in (lambda a, b: skip_forward(a, b, 0.4, 9), lambda a, b: swapout(a, b, 0.4, 0.7, 9)):
            eager, compiled = both(function, [a, b])
            assert torch.equal(eager[0].view(integers), compiled[0].view(integers))


def test_is_compiled_at_all(monkeypatch):
    calls = []
    monkeypatch.setattr(
        kernels,
        "_compiled",
        lambda *key: calls.append(key) or (lambda data, pixels, channels, *inputs: list(inputs)[:1]),
    )
    use_compiler(True)
    x = torch.randn(20000)
    swapout(x, x, 0.5, 0.5, 1)
    assert [call[0] for call in calls] == ["mix"]
    swapout(x[:100], x[:100], 0.5, 0.5, 1)  # not worth a call
    assert len(calls) == 1


def test_one_graph_for_all_keys_thetas_and_sizes():
    use_compiler(True)
    generator = torch.Generator().manual_seed(0)

    def step(size, key, theta):
        x = torch.randn(size, 16, 16, 16, generator=generator, requires_grad=True)
        f = torch.randn(size, 16, 16, 16, generator=generator, requires_grad=True)
        swapout(x, f, theta, 1.0 - theta, key).sum().backward()

    step(8, 1, 0.5)
    step(9, 2, 0.25)
    before = counters["stats"]["unique_graphs"]
    for number in range(2, 40):
        step(4 + number % 13, number << 40, number / 40)
    step(5, 0, 0.0)
    step(5, 1, 1.0)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("channels_last", [pytest.param(False, marks=SLOW), True])
def test_placed_rows_compile_once(channels_last):
    """Any rows of a tensor have the coins that they have there, from one graph for all numbers of rows."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    a, b = (torch.randn(64, 16, 8, 8, generator=generator).contiguous(memory_format=layout) for _ in "ab")
    use_compiler(False)
    whole = swapout(a, b, 0.7, 0.3, 99)
    use_compiler(True)
    graphs = []
    for count in (32, 64, 17, 40):
        rows = torch.randperm(64, generator=generator)[:count]
        with placed(rows, 64):
            assert torch.equal(swapout(a[rows], b[rows], 0.7, 0.3, 99), whole[rows])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1]


def test_auto_compiles_after_much_work(monkeypatch):
    calls = []
    monkeypatch.setattr(kernels, "_MANY", 50000)
    monkeypatch.setattr(kernels._State, "seen", 0)
    monkeypatch.setattr(
        kernels,
        "_compiled",
        lambda *key: calls.append(key) or (lambda data, pixels, channels, *inputs: list(inputs)[:1]),
    )
    use_compiler("auto")
    x = torch.randn(20000)
    counts = []
    for _ in range(5):
        unit_dropout(x, 0.5, 1)
        counts.append(len(calls))
    assert counts == [0, 0, 0, 1, 2]


def test_without_a_working_compiler_one_warning(monkeypatch):
    def broken(*key):
        def kernel(*inputs):
            raise RuntimeError("no compiler\nat all")

        return kernel

    x = torch.randn(20000)
    use_compiler(False)
    expected = unit_dropout(x, 0.5, 1)
    use_compiler(True)
    monkeypatch.setattr(kernels, "_compiled", broken)
    with pytest.warns(RuntimeWarning, match="without a compiler.*no compiler"):
        found = unit_dropout(x, 0.5, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = unit_dropout(x, 0.5, 1)
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)


def test_other_layouts_go_without(monkeypatch):
    monkeypatch.setattr(kernels, "_compiled", lambda *key: pytest.fail("compiled"))
    use_compiler(True)
    x = torch.randn(200, 200).t()
    assert unit_dropout(x, 0.5, 3).stride() == x.stride()


def test_mode_refused():
    with pytest.raises(ConfigError, match="choose 'auto', True or False"):
        use_compiler("always")


def test_double_backward_through_compiled_masks():
    use_compiler(True)
    x = torch.randn(20000, dtype=torch.float64, requires_grad=True)
    f = torch.randn(20000, dtype=torch.float64, requires_grad=True)
    y = swapout(x * x, f * x, 0.5, 0.5, 4)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    use_compiler(False)
    z = swapout(x * x, f * x, 0.5, 0.5, 4)
    (expected,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    (more,) = torch.autograd.grad(expected.sum(), x)
    assert torch.equal(first, expected)
    assert torch.equal(second, more)
    assert second.abs().max() > 0
