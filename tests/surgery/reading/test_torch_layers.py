"""The layers of torch itself, with masks, against their parts called by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import residrop
from residrop.schedule.sampler import Draw, Plan

ROWS, TOKENS, D = 5, 5, 8  # as many tokens as rows: sizes do not tell a mask [tokens, tokens] from one of every row


def factor(draw: Draw) -> Any:
    if draw.key is None:
        return float(bool(draw.alive))
    window, live = draw.rows(ROWS), torch.zeros(ROWS, 1, 1, dtype=torch.float64)
    live[[(window.start + row) % ROWS for row in range(window.live)]] = 1.0
    return live


def encoded(layer: Any, x: Tensor, m: list[Any], **masks: Any) -> Tensor:
    def attention(x: Tensor) -> Tensor:
        return layer.self_attn(
            x, x, x, attn_mask=masks.get("src_mask"), key_padding_mask=masks.get("src_key_padding_mask")
        )[0]

    def feed_forward(x: Tensor) -> Tensor:
        return layer.linear2(layer.linear1(x).relu())

    if layer.norm_first:
        x = x + m[0] * attention(layer.norm1(x))
        return x + m[1] * feed_forward(layer.norm2(x))
    x = layer.norm1(x + m[0] * attention(x))
    return layer.norm2(x + m[1] * feed_forward(x))


def causal() -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(TOKENS, dtype=torch.float64)


def padding() -> Tensor:
    mask = torch.zeros(ROWS, TOKENS, dtype=torch.float64)
    mask[torch.arange(ROWS), [4, 3, 4, 2, 3]] = -torch.inf
    return mask


@pytest.mark.parametrize("masks", [{}, {"src_mask": causal()}, {"src_key_padding_mask": padding()}], ids=str)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("level", ["block", "row"])
def test_encoder_layers(level, norm_first, masks):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(layer).double().train()
    plain = copy.deepcopy(model[0])
    (entry,) = residrop.apply(model, survival=0.5, granularity=level, rescale="none", seed=1).blocks
    assert (entry.kind, entry.rates) == ("torch TransformerEncoderLayer", (0.5, 0.5))
    x = torch.randn(ROWS, TOKENS, D, dtype=torch.float64)
    for step in range(4):
        plan = residrop.sampler_of(model).plan(step)
        for training in (True, False):  # in eval mode torch has a way of its own through the whole layer
            with residrop.using(model.train(training), plan), torch.set_grad_enabled(training):
                found = model[0](x, **masks)
            torch.testing.assert_close(found, encoded(plain, x, [factor(draw) for draw in plan.draws], **masks))
    torch.testing.assert_close(model.eval()[0](x, **masks), plain.eval()(x, **masks), rtol=0, atol=0)


@pytest.mark.parametrize("level", ["block", "row"])
def test_decoder_layers(level):
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerDecoderLayer(D, 2, 16, dropout=0.0, batch_first=True)).double().train()
    layer: Any = copy.deepcopy(model[0])
    residrop.apply(model, survival=0.5, granularity=level, rescale="none", seed=1)
    x, memory = torch.randn(2, ROWS, TOKENS, D, dtype=torch.float64)
    for step in range(4):
        plan = residrop.sampler_of(model).plan(step)
        with residrop.using(model, plan):
            found = model[0](x, memory, tgt_mask=causal())
        m = [factor(draw) for draw in plan.draws]
        y = layer.norm1(x + m[0] * layer.self_attn(x, x, x, attn_mask=causal())[0])
        y = layer.norm2(y + m[1] * layer.multihead_attn(y, memory, memory)[0])
        y = layer.norm3(y + m[2] * layer.linear2(layer.linear1(y).relu()))
        torch.testing.assert_close(found, y)


def test_absent_encoder_layers_are_absent_in_sampled_predictions():
    model = nn.Sequential(nn.TransformerEncoderLayer(D, 2, 16, batch_first=True, norm_first=True)).eval()
    residrop.apply(model, survival=0.5)
    x = torch.randn(ROWS, TOKENS, D)
    with torch.no_grad(), residrop.using(model, Plan.of([False, False])):
        assert torch.equal(model(x), x)
