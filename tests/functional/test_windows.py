"""Windows as data give what windows as slices give."""

import pytest
import torch
from torch import nn

from residrop.functional.call import BranchCall
from residrop.functional.rows import keep_rows
from residrop.functional.windows import Window, keep_window
from residrop.schedule.sampler import Rows

TOTAL = 5


def window(rows, scale=None, every=False):
    size = torch.zeros(1, dtype=torch.bool).expand(rows.live)
    return Window(size, torch.tensor(rows.start), None if scale is None else torch.tensor(scale).double(), every)


def modules(learned):
    torch.manual_seed(0)
    shortcut = nn.Linear(3, 3, dtype=torch.float64) if learned else nn.Identity()
    return shortcut, nn.Linear(3, 3, dtype=torch.float64)


@pytest.mark.parametrize("rows", [Rows(start, live) for start in range(TOTAL) for live in range(1, TOTAL + 1)])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("options", [{}, {"post": nn.ReLU()}, {"includes_input": True}], ids=["sum", "relu", "block"])
def test_equals_slices(rows, learned, options):
    shortcut, branch = modules(learned)
    inner = nn.ReLU() if "post" in options else nn.Identity()  # absent rows must be fixed points of the activation
    results = []
    for run in (
        lambda x: keep_rows(x, BranchCall(lambda x: inner(shortcut(x)), branch, **options), rows, 0.25),
        lambda x: keep_window(x, BranchCall(lambda x: inner(shortcut(x)), branch, **options), window(rows, 0.25)),
    ):
        x = torch.linspace(0.0, 1.0, TOTAL * 3, dtype=torch.float64).view(TOTAL, 3).requires_grad_()
        y = run(x)
        parameters = [*shortcut.parameters(), *branch.parameters()]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *parameters])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_identity_shortcut_equals_slices():
    _, branch = modules(False)
    x = torch.randn(TOTAL, 3, dtype=torch.float64)
    for start in range(TOTAL):
        rows = Rows(start, 3)
        expected = keep_rows(x, BranchCall(nn.Identity(), branch), rows)
        torch.testing.assert_close(
            keep_window(x, BranchCall(nn.Identity(), branch), window(rows)), expected, rtol=0, atol=1e-15
        )


def test_all_rows_are_not_gathered():
    seen = []
    x = torch.randn(TOTAL, 3)
    y = keep_window(x, BranchCall(nn.Identity(), lambda x: seen.append(x) or 2 * x), window(Rows(2, TOTAL), every=True))
    assert seen[0] is x
    assert torch.equal(y, 3 * x)


def test_arguments_are_cut_with_the_rows():
    x, mask = torch.randn(TOTAL, 3), torch.arange(TOTAL).view(TOTAL, 1)
    seen = []

    def branch(x, packed):
        seen.append(packed["mask"])
        return x

    keep_window(x, BranchCall(nn.Identity(), branch, along=[{"mask": mask, "flag": True}]), window(Rows(3, 4)))
    assert seen[0].flatten().tolist() == [3, 4, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_dtype_and_memory_format_kept(dtype, memory):
    x = torch.randn(4, 3, 2, 2).to(dtype).contiguous(memory_format=memory).requires_grad_()
    seen = []
    y = keep_window(x, BranchCall(nn.Identity(), lambda x: seen.append(x) or x), window(Rows(3, 2), 1.5))
    y.sum().backward()
    for one in (seen[0], y, x.grad):
        assert one.dtype == dtype
        assert one.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scale_is_not_rounded_to_half_precision(dtype):
    """1/0.3 in bfloat16 would be off by 0.2%, in the same direction at every step."""
    x, branch = torch.zeros(4, 3, dtype=dtype), torch.full((2, 3), 0.7, dtype=dtype)
    y = keep_window(x, BranchCall(nn.Identity(), lambda x: branch), window(Rows(0, 2), 1 / 0.3))
    assert torch.equal(y[:2], (branch.double() * (1 / 0.3)).to(dtype))
