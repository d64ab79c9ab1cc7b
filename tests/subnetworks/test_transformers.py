"""Layers of transformers' models leave their list; what is saved is read back, and generates."""

import pytest
import torch

import residrop
from residrop.common.errors import ConfigError
from residrop.subnetworks.blocks import Whole, pairs_of
from residrop.subnetworks.plain import plain, reloads

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", SMALL),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**SMALL, "num_key_value_heads": 2, "head_dim": 8}),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": 96, "d_model": 32, "encoder_layers": 3, "decoder_layers": 4, **SIZES},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 96, "d_model": 32, "d_ff": 64, "num_layers": 4, "num_heads": 4, "d_kv": 8}
        | {"decoder_start_token_id": 0},
    ),
}


def built(name):
    model, config, options = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def batch_of(model):
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1]) if "Classification" in type(model).__name__ else ids
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("name", MODELS)
def test_layers_leave_their_list_and_the_result_is_saved_read_and_generates(name, tmp_path):
    model = built(name)
    before = model.config.to_dict()
    whole = Whole(model, *pairs_of([batch_of(model)], None))
    kept = tuple(number % 3 != 1 for number in range(len(whole.blocks)))
    found = plain(whole, kept)
    assert type(found) is type(model)
    wanted = whole.output(kept, batch_of(model))
    with torch.no_grad():
        assert torch.equal(found(**batch_of(model), use_cache=False).logits, wanted.logits)
    found.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch_of(model)).logits, wanted.logits)
    assert model.config.to_dict() == before
    ways = [(one, cache) for one in (found, again) for cache in (True, False) if one.can_generate()]
    ids = batch_of(model)["input_ids"]
    texts = [one.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache) for one, cache in ways]
    assert all(torch.equal(texts[0], other) for other in texts)


def test_numbers_of_layers_and_lists_of_them_follow():
    model = built("qwen3")
    whole = Whole(model, *pairs_of([batch_of(model)], None))
    found = plain(whole, (True, False, False, True))
    assert [layer.self_attn.layer_idx for layer in found.model.layers] == [0, 1]
    assert (found.config.num_hidden_layers, len(found.config.layer_types)) == (2, 2)


@pytest.mark.parametrize(
    ("name", "options", "field", "wanted"),
    [
        ("Qwen3Moe", {"mlp_only_layers": [0, 1, 3], "moe_intermediate_size": 16}, "mlp_only_layers", [0, 2]),
        (
            "DeepseekV3",
            {"first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 8}
            | {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
            | {"moe_intermediate_size": 16},
            "first_k_dense_replace",
            1,
        ),
    ],
)
def test_configurations_that_name_layers_by_number_follow(name, options, field, wanted):
    torch.manual_seed(0)
    options = {**SMALL, "num_key_value_heads": 4, "num_experts_per_tok": 2, **options}
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    whole = Whole(model, *pairs_of([batch_of(model)], None))
    kept = (True, False, True, True)
    found = plain(whole, kept)
    assert getattr(found.config, field) == wanted
    assert reloads(found, whole, kept) is True


def test_hidden_states_that_a_configuration_asks_for_are_those_of_the_layers_left():
    model = built("llama")
    model.config.output_hidden_states = True
    found = residrop.shrink(model, "2 of blocks", batches=[batch_of(model)], by="first", repeats=1)
    assert len(found.model(**batch_of(model)).hidden_states) == 3
    assert model.config.output_hidden_states is True


def test_layers_that_keep_a_state_in_their_cache_leave_their_list():
    torch.manual_seed(0)
    options = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 4}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**options)).eval()
    found = residrop.shrink(model, "2 of blocks", batches=[batch_of(model)], by="first", repeats=1)
    assert (len(found.model.backbone.layers), found.reloads) == (2, True)
    ids = batch_of(model)["input_ids"]
    texts = [found.model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*texts)


def test_a_network_that_its_configuration_would_not_build_again_is_said():
    """GPT-2 may scale attention by the number of the layer, which others have then."""
    torch.manual_seed(0)
    options = {**MODELS["gpt2"][2], "scale_attn_by_inverse_layer_idx": True}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).eval()
    with pytest.warns(UserWarning, match="from_pretrained would give another network"):
        found = residrop.shrink(model, "2 of blocks", batches=[batch_of(model)], by="every_other", repeats=1)
    assert found.reloads is False
    found = residrop.shrink(built("gpt2"), "2 of blocks", batches=[batch_of(model)], by="every_other", repeats=1)
    assert found.reloads is True


def test_one_layer_of_a_list_stays_whatever_the_budget():
    model = built("bart")
    found = residrop.shrink(model, "2 of blocks", batches=[batch_of(model)], by="first", repeats=1)
    assert [len(one.layers) for one in (found.model.model.encoder, found.model.model.decoder)] == [1, 1]


@pytest.mark.parametrize("by", ["removal", "greedy"])
def test_frontier_leaves_out_budgets_below_one_layer_of_each_list(by):
    model = built("llama")
    points = residrop.frontier(model, [batch_of(model)], unit="blocks", by=by, budgets=(1.0, 0.5, 0.2), repeats=1)
    assert [len(one.kept) for one in points] == [4, 2]


def test_without_any_layer_is_refused():
    model = built("llama")
    with pytest.raises(ConfigError, match=r"no layer of model.layers is left"):
        plain(Whole(model, *pairs_of([batch_of(model)], None)), (False,) * 4)


def test_batches_without_labels_have_no_loss():
    model = built("llama")
    with pytest.raises(ConfigError, match=r"gives no loss .* put `labels` among them"):
        Whole(model, *pairs_of([{"input_ids": torch.ones(2, 3, dtype=torch.long)}], None))
