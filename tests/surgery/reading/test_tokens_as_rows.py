"""A branch that sees the tokens of all sequences as rows (OPT's MLP): row level drops sequences, not tokens."""

import pytest
import torch
from torch import nn

import residrop
from residrop.blocks.attach import sampler_of, using
from residrop.common.errors import PlanError


class Block(nn.Module):
    def __init__(self, tokens_first=False):
        super().__init__()
        self.norm, self.mlp, self.tokens_first = nn.LayerNorm(6), nn.Linear(6, 6), tokens_first

    def forward(self, x):
        shape = x.shape
        if self.tokens_first:
            x = x.transpose(0, 1)
            shape = x.shape
        flat = x.reshape(-1, x.size(-1))
        flat = flat + self.mlp(self.norm(flat))
        y = flat.view(shape)
        return y.transpose(0, 1) if self.tokens_first else y


def applied(**options):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(**options) for _ in range(3)))
    residrop.apply(model, "stochastic-depth", 0.5, granularity="row", rescale="none")
    return model.train()


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_rows_are_sequences(rows):
    model = applied()
    model(torch.randn(4, 3, 6))  # the look at the blocks
    x = torch.randn(rows, 3, 6, requires_grad=True)
    for step in range(5):
        plan = sampler_of(model).plan(step)
        expected = x
        for block, draw in zip(model, plan.draws, strict=True):
            start, live = draw.rows(rows)
            mask = torch.tensor([float((row - start) % rows < live) for row in range(rows)])[:, None, None]
            expected = expected + mask * block.mlp(block.norm(expected))
        with using(model, plan):
            y = model(x)
        torch.testing.assert_close(y, expected)
        parameters = list(model.parameters())
        grads = (torch.autograd.grad(out.square().sum(), [x, *parameters], allow_unused=True) for out in (y, expected))
        for got, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(torch.zeros_like(wanted) if got is None else got, wanted)


def test_rows_that_are_tokens_of_all_sequences_in_turn_are_refused():
    with pytest.raises(PlanError, match="granularity='block'"):
        applied(tokens_first=True)(torch.randn(4, 3, 6))
