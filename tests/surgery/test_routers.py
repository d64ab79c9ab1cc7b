"""Mixtures of experts under rules: their auxiliary loss (compare huggingface/transformers#30731)."""

import copy

import pytest
import torch

import residrop
from residrop.common.errors import PlanError
from residrop.schedule.sampler import Plan

pytest.importorskip("transformers")

from transformers_models import CAUSAL, built, ids, text

MODELS = {
    "mixtral": built("MixtralForCausalLM", "MixtralConfig", **CAUSAL, num_local_experts=4),
    "qwen3": built(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        **CAUSAL,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def applied(name: str, level: str):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    residrop.apply(model, survival=0.4, granularity=level)
    return model


@every_model
def test_rows_with_a_mask_are_refused_before_anything_moves(name):
    model = applied(name, "row")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match="mask of its auxiliary loss cannot follow the live rows"):
        model(**text(), labels=ids(), output_router_logits=True)
    assert residrop.sampler_of(model).step == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model(**text(), labels=ids()).loss.backward()  # without the loss
    model.eval()(**text(), labels=ids(), output_router_logits=True)  # without coins
    residrop.remove(model)
    model.train()(**text(), labels=ids(), output_router_logits=True)
    assert not model._forward_pre_hooks
    assert not model.model._forward_hooks


@every_model
def test_rows_without_a_mask_balance_live_rows(name):
    model = applied(name, "row")
    sizes = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, out: sizes.append(len(out[0])))
    result = model(input_ids=ids(), labels=ids(), output_router_logits=True)
    assert [len(one) for one in result.router_logits] == sizes
    assert max(sizes) < ids().numel()
    result.loss.backward()


@every_model
@pytest.mark.parametrize("mask", [True, False])
def test_layers_that_are_all_absent_count_as_balanced(name, mask):
    model = applied(name, "block")
    given = text() if mask else {"input_ids": ids()}
    with residrop.using(model, Plan.of([True, False] * 3)):
        result = model(**given, labels=ids(), output_router_logits=True)
        plain = model(**given, labels=ids())
    torch.testing.assert_close(result.aux_loss, torch.tensor(2.0))  # experts per token: the least there is
    torch.testing.assert_close(result.loss, plain.loss + model.router_aux_loss_coef * 2.0)
    result.loss.backward()
    assert all(parameter.grad is None for layer in model.model.layers for parameter in layer.mlp.parameters())
