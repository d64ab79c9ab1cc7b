"""Layers that hand a state on to the next one: T5's position bias, which only its first layer computes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import residrop
from residrop.common.errors import PlanError
from residrop.schedule.sampler import Plan

transformers = pytest.importorskip("transformers")

REST = "encoder.block.[1-9]"  # all but the first


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=64, num_layers=4, num_heads=2, dropout_rate=0.0, num_decoder_layers=1
    )
    model = transformers.T5EncoderModel(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_(std=2.0)  # so that its loss would be seen
    return model.train()


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(1, 20, (4, 7)),
        "attention_mask": (torch.arange(7) < torch.tensor([[7], [5], [6], [3]])).long(),
    }


def without(model: nn.Module, absent: set[int]) -> Tensor:
    """The encoder with some layers taken out; the position bias of the first one goes to all others."""
    plain: Any = copy.deepcopy(model)
    plain.encoder.block = nn.ModuleList([b for n, b in enumerate(plain.encoder.block) if n not in absent])
    return plain(**inputs()).last_hidden_state


@pytest.mark.parametrize("absent", [{1}, {2}, {1, 3}, {1, 2, 3}, set()])
def test_absent_layers_hand_the_position_bias_on(absent):
    plain = t5()
    model = copy.deepcopy(plain)
    residrop.apply(model, survival=0.5, blocks=REST, branches=False, rescale="none")
    with residrop.using(model, Plan.of([number not in absent for number in (1, 2, 3)])):
        found = model(**inputs()).last_hidden_state
    torch.testing.assert_close(found, without(plain, absent))


@pytest.mark.parametrize("coin", [True, False])
def test_the_layer_that_computes_it_is_refused_with_the_reason(coin):
    model = t5()
    residrop.apply(model, survival=0.5, blocks="encoder.block.*", branches=False)
    with (
        residrop.using(model, Plan.of([coin, True, True, True])),
        pytest.raises(PlanError, match=r"T5Block returns, besides the hidden state, a tensor of shape .* at '1'"),
    ):
        model(**inputs())


def test_rows_of_whole_layers():
    plain = t5()
    model = copy.deepcopy(plain)
    residrop.apply(model, survival=0.5, blocks=REST, branches=False, granularity="row", rescale="none")
    sampler = residrop.sampler_of(model)
    found = model(**inputs()).last_hidden_state
    for row in range(4):
        absent = set()
        for number, draw in enumerate(sampler.plan(0).draws, start=1):
            start, live = draw.rows(4)
            if (row - start) % 4 >= live:
                absent.add(number)
        torch.testing.assert_close(found[row], without(plain, absent)[row])


def masked(model: nn.Module, factors: list[Any]) -> Tensor:
    """The encoder with its attentions and feed-forward layers times factors; the first attention is always present."""
    plain: Any = copy.deepcopy(model)
    layers = [layer for block in plain.encoder.block for layer in block.layer][1:]
    for layer, factor in zip(layers, factors, strict=True):
        layer.dropout.register_forward_hook(lambda module, args, out, factor=factor: out * factor)
        if hasattr(layer, "DenseReluDense"):
            layer.DenseReluDense.dropout = nn.Identity()
    return plain(**inputs()).last_hidden_state


@pytest.mark.parametrize("level", ["block", "row"])
def test_branches(level):
    """The first attention makes the bias of all others, so it has no rule."""
    plain = t5()
    model = copy.deepcopy(plain)
    report = residrop.apply(model, survival=0.5, blocks="encoder.block.*", granularity=level, rescale="none", seed=3)
    assert [len(entry.rates) for entry in report.blocks] == [1, 2, 2, 2]
    for step in range(4):
        factors = []
        for draw in residrop.sampler_of(model).plan(step).draws:
            if level == "block":
                factors.append(float(draw.alive))
            else:
                start, live = draw.rows(4)
                factors.append(torch.tensor([float((row - start) % 4 < live) for row in range(4)]).view(4, 1, 1))
        found = model(**inputs()).last_hidden_state
        torch.testing.assert_close(found, masked(plain, factors))
