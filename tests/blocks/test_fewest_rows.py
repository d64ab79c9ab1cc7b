"""Row level with batch norm in small batches: one row of a 1x1 map has no statistics."""

import pytest
import torch
from torch import nn

import residrop
from residrop.blocks.attach import rules_of, sampler_of
from residrop.common.errors import PlanError
from residrop.rules import StochasticDepth


def network(*norms: nn.Module, rows: str = "window") -> nn.Module:
    rule = [StochasticDepth(0.5, "row", rows=rows) for _ in norms]
    branches = [nn.Sequential(nn.Conv2d(4, 4, 1), norm) for norm in norms]
    model = nn.Sequential(*map(residrop.Residual, branches, [None] * len(norms), rule))
    residrop.attach(model, seed=2)
    return model


def test_blocks_with_batch_norm_get_no_row_or_two():
    norms = nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.GroupNorm(4, 4), nn.GroupNorm(2, 4), nn.Identity()
    model = network(*norms)
    assert [rule.fewest for rule in rules_of(model)] == [2, 2, 2, 1, 1]
    assert [draw.fewest for draw in sampler_of(model).plan().draws] == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("rows", [2, 3])
def test_maps_of_one_pixel_train_in_any_batch(rows):
    model = network(nn.BatchNorm2d(4), nn.GroupNorm(4, 4))
    seen: list[int] = []
    for block in model:
        block.branch.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for _ in range(40):
        model(torch.randn(rows, 4, 1, 1, requires_grad=True)).sum().backward()
    assert seen
    assert set(seen) == {2}


def test_compiled_blocks_draw_the_same_rows():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 1, 1)
    found = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = network(nn.BatchNorm2d(4))
        if compiled:
            torch._dynamo.reset()
            model.compile(backend="eager")
        with torch.no_grad():
            found.append([model(x) for _ in range(6)])
    torch.testing.assert_close(*found)


def passes(model: nn.Module, rows: int) -> None:
    for _ in range(40):
        model(torch.randn(rows, 4, 1, 1))


def test_one_row_of_a_coin_each_says_what_to_do():
    model = network(nn.BatchNorm2d(4), rows="bernoulli")
    with pytest.raises(PlanError, match=r"left one row to a norm that needs two .* use rows='window'"):
        passes(model, 2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):  # as of the plain network
        passes(model, 1)
