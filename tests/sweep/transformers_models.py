"""Every model type of transformers that can be built small: default configurations, shrunk by the names of fields."""

import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sweep.sources import ROWS, Built, NotBuilt
from sweep.transformers_special import GIVEN, INPUTS, SPECIAL

# whole numbers by the names that configurations have for them
NUMBERS: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), 96),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "encoder_hidden_size"), 32
    ),
    **dict.fromkeys(("embed_dim", "emb_dim", "decoder_hidden_size", "projection_dim", "proj_dim", "output_dim"), 32),
    **dict.fromkeys(("cross_attention_hidden_size", "audio_embed_dim", "text_dim", "entity_emb_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 3),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_hidden_layers", "num_block", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "encoder_num_key_value_heads"), 2),
    "decoder_num_key_value_heads": 2,
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "d_ff", "ffn_dim", "hidden_dim", "n_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dim_feedforward", "decoder_intermediate_size"), 48),
    **dict.fromkeys(("mlp_dim", "encoder_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 96),
    **dict.fromkeys(("max_seq_len", "max_sequence_length"), 96),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "global_head_dim"), 8),
    "rotary_dim": 8,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "expert_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "qk_head_dim": 16,
    "first_k_dense_replace": 1,
    "type_vocab_size": 2,
    **dict.fromkeys(("image_size", "img_size"), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    **dict.fromkeys(("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel"), 16),
    **dict.fromkeys(("num_codevectors_per_group", "codebook_size"), 32),
    **dict.fromkeys(("codevector_dim", "proj_codevector_dim", "codebook_dim", "classifier_proj_size"), 16),
    **dict.fromkeys(("num_conv_pos_embeddings",), 16),
    "num_conv_pos_embedding_groups": 2,
    "num_buckets": 16,
    "num_hash_buckets": 64,
    "num_queries": 6,
    **dict.fromkeys(("num_query_tokens", "encoder_seq_length"), 6),
    **dict.fromkeys(("out_hidden_size", "output_hidden_size", "projector_hidden_size"), 32),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 8),
    "index_n_heads": 2,
    "index_topk": 4,
    "lru_width": 32,
    "mm_hidden_size": 32,
    "num_position_embeddings": 16,
    "sliding_window": 8,
    "attention_window_size": 8,
    "neck_hidden_sizes": 32,
    "fusion_hidden_size": 32,
    "reassemble_hidden_size": 32,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# tokens that stand for something are put at the end of the small vocabulary
_LISTS: dict[str, Any] = {
    "depths": lambda old: [min(one, 2) for one in old],
    "layers": lambda old: [min(one, 2) for one in old],
    "num_blocks": lambda old: [min(one, 2) for one in old],
    "stage_num_blocks": lambda old: [min(one, 2) for one in old],
    "blocks_per_stage": lambda old: [min(one, 2) for one in old],
    "encoder_layers": lambda old: [min(one, 2) for one in old],
    "depth": lambda old: [min(one, 2) for one in old],
    "layer_depths": lambda old: [min(one, 2) for one in old],
    "hidden_sizes": lambda old: [16 * 2 ** min(i, 2) for i in range(len(old))],
    "embed_dims": lambda old: [16 * 2 ** min(i, 2) for i in range(len(old))],
    "embed_dim": lambda old: [16 * 2 ** min(i, 2) for i in range(len(old))],
    "num_attention_heads": lambda old: [2 ** min(i, 2) for i in range(len(old))],
    "num_heads": lambda old: [2 ** min(i, 2) for i in range(len(old))],
    "conv_dim": lambda old: [16] * 2,
    "conv_stride": lambda old: [4, 2],
    "conv_kernel": lambda old: [8, 4],
    "neck_hidden_sizes": lambda old: [16] * len(old),
}
LARGEST = 2e7


def names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


def build(name: str) -> Built:
    import transformers

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            config_class, model_class = _classes(transformers, name)
            config = small(config_class)
            _tokens(config)
            with torch.device("meta"):
                size = sum(one.numel() for one in model_class(config).parameters())
        except NotBuilt:
            raise
        except Exception as error:
            raise NotBuilt(f"small configuration: {type(error).__name__} {error}") from error
        if size > LARGEST:
            raise NotBuilt(f"small configuration: {size / 1e6:.0f} million parameters")
        try:
            model = model_class(config).eval().float()
        except Exception as error:
            raise NotBuilt(f"small configuration: {type(error).__name__} {error}") from error
        return Built(model, (), inputs(name, model), family=_family(name))


def _family(name: str) -> str:
    return name


def _classes(transformers: Any, name: str) -> tuple[Any, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    model = MODEL_MAPPING_NAMES[name]
    model = model if isinstance(model, str) else model[0]
    return getattr(transformers, CONFIG_MAPPING_NAMES[name]), getattr(transformers, model)


def small(kind: Any, outer: str = "") -> Any:
    """A small configuration of a class."""
    special = SPECIAL.get(getattr(kind, "model_type", ""), {})
    required = {name: value for name, value in special.items() if name in special.get("first", ())}
    base = kind(**required)
    options: dict[str, Any] = {}
    known = {*vars(base), *getattr(base, "attribute_map", {})}
    for name in known:
        try:
            value = getattr(base, name)
        except Exception:
            continue
        fitting = _fitting(name, value)
        if fitting is not None:
            options[name] = fitting
        elif _is_config(value):
            options[name] = small(type(value), name)
    target = getattr(base, "attribute_map", {})
    options = {target.get(name, name): value for name, value in options.items()}
    options |= {name: value for name, value in special.items() if name not in ("first", "without")}
    for name in special.get("without", ()):
        options.pop(name, None)
    return kind(**options)


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def _fitting(name: str, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        if name in TOKENS:
            return TOKENS[name]
        if name in NUMBERS:
            return min(NUMBERS[name], value) if name in ("num_experts_per_tok",) else NUMBERS[name]
        return None
    if isinstance(value, float) and ("drop" in name):
        return 0.0
    if isinstance(value, (list, tuple)) and value and name in _LISTS and all(isinstance(one, int) for one in value):
        return type(value)(_LISTS[name](value))
    if isinstance(value, (list, tuple)) and len(value) == 2 and name in ("image_size", "img_size"):
        return type(value)((32, 32))
    return None


def _tokens(config: Any, taken: list[int] | None = None) -> None:
    """Numbers of tokens that stand for something, inside of the small vocabulary."""
    taken = [95] if taken is None else taken
    parts = [config, *(value for value in vars(config).values() if _is_config(value))]
    given: dict[str, int] = {}
    for part in parts:
        vocabulary = getattr(part, "vocab_size", None)
        for name, value in list(vars(part).items()):
            token = name.endswith(("_token_id", "_token_index")) and name not in TOKENS
            if token and isinstance(value, int) and isinstance(vocabulary or 96, int):
                if name not in given:
                    given[name] = taken[0]
                    taken[0] -= 1
                if value >= 60:
                    setattr(part, name, given[name])


# inputs


def _ids(length: int = 9) -> torch.Tensor:
    return torch.randint(3, 60, (ROWS, length))


def _mask(length: int = 9) -> torch.Tensor:
    return (torch.arange(length) < torch.tensor([[length], [length - 3], [length - 2]])).long()


def inputs(name: str, model: nn.Module) -> dict[str, Any]:
    """A batch: what the forward of a model has to be given, and whatever makes it a fuller test."""
    if name in INPUTS:
        given = INPUTS[name](model)
    else:
        parameters = inspect.signature(model.forward).parameters
        given = {}
        main = getattr(model, "main_input_name", "input_ids")
        required = [one.name for one in parameters.values() if one.default is one.empty and one.kind not in (2, 4)]
        wanted = dict.fromkeys([main, *required])
        if (
            "input_ids" in parameters
            and main in ("pixel_values", "input_values", "input_features")
            and "pixel_values" in parameters
        ):
            wanted["input_ids"] = None
        for one in wanted:
            if one in parameters or any(each.kind == 4 for each in parameters.values()):
                given |= _given(one, model)
        if "input_ids" in given and "attention_mask" in parameters:
            given["attention_mask"] = _mask(given["input_ids"].shape[1])
        if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
            given["decoder_input_ids"] = _ids(5)
    with torch.no_grad():
        for _ in range(2):
            try:
                model(**given)
            except ValueError as error:  # "... tokens: 0, features 12": as many tokens for images as there are features
                numbers = re.search(r"tokens:? (\d+).*?features:? (\d+)", str(error))
                token = getattr(model.config, "image_token_id", getattr(model.config, "image_token_index", None))
                if not numbers or token is None:
                    break
                each = int(numbers[2]) // ROWS
                ids = torch.cat([_ids(2), torch.full((ROWS, each), token), _ids(5)], 1)
                given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            except Exception:
                break
    return given


def _side(config: Any) -> int:
    for part in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        size = getattr(part, "image_size", None) or getattr(part, "img_size", None)
        if isinstance(size, int):
            return size
        if isinstance(size, (list, tuple)):
            return size[0]
    return 64


def _given(name: str, model: nn.Module) -> dict[str, Any]:
    config = model.config
    if name in GIVEN:
        return {name: GIVEN[name](model)}
    if name in ("input_ids", "decoder_input_ids"):
        return {name: _ids(9 if name == "input_ids" else 5)}
    if name == "attention_mask":
        return {name: _mask()}
    if name == "pixel_values":
        channels = getattr(config, "num_channels", 3)
        side = _side(config)
        return {name: torch.randn(ROWS, channels if isinstance(channels, int) else 3, side, side)}
    if name == "input_values":
        return {name: torch.randn(ROWS, 400)}
    if name == "input_features":
        bins = next(
            (
                v
                for n in (
                    "num_mel_bins",
                    "n_mels",
                    "feature_size",
                    "input_feat_per_channel",
                    "feature_projection_input_dim",
                )
                if isinstance(v := getattr(config, n, None), int)
            ),
            16,
        )
        return {name: torch.randn(ROWS, 40, bins)}
    if name in ("inputs_embeds", "hidden_states"):
        return {name: torch.randn(ROWS, 9, config.hidden_size)}
    if name == "pixel_values_videos":
        side = _side(config)
        return {name: torch.randn(ROWS, getattr(config, "num_frames", 4), 3, side, side)}
    return {}


Inputs = Mapping[str, Any]
