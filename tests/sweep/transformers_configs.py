"""Small configurations of transformers' models: the default ones, shrunk by the names of their fields."""

from collections.abc import Sequence
from typing import Any

from sweep.transformers_special import SPECIAL

__all__ = ["is_config", "parts", "place_tokens", "small"]

# whole numbers by the names that configurations have for them
NUMBERS: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), 96),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "encoder_hidden_size"), 64
    ),
    **dict.fromkeys(("embed_dim", "emb_dim", "decoder_hidden_size", "projection_dim", "proj_dim", "output_dim"), 64),
    **dict.fromkeys(("cross_attention_hidden_size", "audio_embed_dim", "text_dim", "entity_emb_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 3),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_hidden_layers", "num_block", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "encoder_num_key_value_heads"), 2),
    "decoder_num_key_value_heads": 2,
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "d_ff", "ffn_dim", "hidden_dim", "n_inner"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dim_feedforward", "decoder_intermediate_size"), 96),
    **dict.fromkeys(("mlp_dim", "encoder_intermediate_size", "shared_expert_intermediate_size"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 96),
    **dict.fromkeys(("max_seq_len", "max_sequence_length"), 96),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "global_head_dim"), 16),
    "rotary_dim": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "expert_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "qk_head_dim": 16,
    "first_k_dense_replace": 1,
    "type_vocab_size": 2,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 16,
    "entity_vocab_size": 32,
    "pred_hidden_size": 64,
    "pred_num_attention_heads": 4,
    "pred_num_hidden_layers": 2,
    "upsample_groups": 64,
    **dict.fromkeys(("text_hidden_size", "audio_hidden_size", "condition_dim", "adapter_in_dim"), 64),
    **dict.fromkeys(
        ("t2u_vocab_size", "char_vocab_size", "unit_hifi_gan_vocab_size", "encoder_hash_byte_group_vocab"), 96
    ),
    **dict.fromkeys(("speech_encoder_layers", "t2u_encoder_layers", "t2u_decoder_layers"), 2),
    **dict.fromkeys(
        ("speech_encoder_attention_heads", "t2u_encoder_attention_heads", "t2u_decoder_attention_heads"), 4
    ),
    **dict.fromkeys(("t2u_encoder_ffn_dim", "t2u_decoder_ffn_dim", "speech_encoder_intermediate_size"), 96),
    **dict.fromkeys(("upsample_initial_channel", "unit_embed_dim", "spkr_embed_dim", "lang_embed_dim"), 32),
    **dict.fromkeys(("image_size", "img_size"), 32),
    "patch_size": 8,
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    **dict.fromkeys(("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel"), 16),
    **dict.fromkeys(("num_codevectors_per_group", "codebook_size"), 32),
    **dict.fromkeys(("codevector_dim", "proj_codevector_dim", "codebook_dim", "classifier_proj_size"), 16),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_buckets": 16,
    "num_hash_buckets": 64,
    "num_queries": 6,
    **dict.fromkeys(("num_query_tokens", "encoder_seq_length"), 6),
    **dict.fromkeys(("out_hidden_size", "output_hidden_size", "projector_hidden_size"), 64),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 8),
    "index_n_heads": 2,
    "index_topk": 4,
    "lru_width": 64,
    "mm_hidden_size": 64,
    "num_position_embeddings": 16,
    "sliding_window": 8,
    "attention_window_size": 8,
    "neck_hidden_sizes": 32,
    "fusion_hidden_size": 32,
    "reassemble_hidden_size": 32,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# fields that are None by default and cannot be so
ABSENT = {
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
    "vocab_size": 96,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
}
LAYERS = 4  # at most, where layers differ


def _at_most(most: int) -> Any:
    return lambda old: [min(one, most) for one in old]


def _doubling(first: int) -> Any:
    return lambda old: [first * 2 ** min(i, 2) for i in range(len(old))]


# lists of whole numbers, one for every stage of a network
LISTS: dict[str, Any] = {
    **dict.fromkeys(("depths", "layers", "num_blocks", "stage_num_blocks", "blocks_per_stage"), _at_most(2)),
    **dict.fromkeys(("encoder_layers", "depth", "layer_depths", "encoder_depths", "num_hidden_layers"), _at_most(2)),
    **dict.fromkeys(
        ("hidden_sizes", "embed_dims", "embed_dim", "encoder_hidden_sizes", "hidden_channels"), _doubling(16)
    ),
    **dict.fromkeys(("embed_dim_per_stage",), _doubling(16)),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_attention_heads_per_stage"), _doubling(1)),
    "conv_dim": lambda old: [16] * 2,
    "conv_stride": lambda old: [4, 2],
    "conv_kernel": lambda old: [8, 4],
    "neck_hidden_sizes": lambda old: [16] * len(old),
    "image_size": lambda old: [32] * len(old),
    "img_size": lambda old: [32] * len(old),
}


def is_config(value: Any) -> bool:
    """Whether something is a configuration."""
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def parts(config: Any) -> list[Any]:
    """A configuration and those inside of it."""
    inner = [value for value in vars(config).values() if is_config(value)]
    return [config, *(part for one in inner for part in parts(one))]


def small(kind: Any, base: Any = None) -> Any:
    """A small configuration of a class, like `base` (default: the class's own default)."""
    if kind.model_type == "timm_backbone":
        return _backbone()
    special = SPECIAL.get(kind.model_type, {})
    usual = kind(**{name: special[name] for name in special.get("first", ())})
    base = usual if base is None else base
    aliases = getattr(base, "attribute_map", {})
    chosen = _layers(base)
    options: dict[str, Any] = {}
    for name in {**vars(base), **aliases}:
        try:
            value = getattr(base, name)
        except Exception:
            continue  # it differs from layer to layer
        fitting = small(type(value), value) if is_config(value) else _fitting(base, name, value, chosen)
        if fitting is None and name in vars(usual) and _differs(value, vars(usual)[name]):
            fitting = value  # as the model around it has it
        if fitting is not None:
            options[aliases.get(name, name)] = fitting
    if wanted := getattr(base, "_out_features", None):
        options["out_features"] = list(wanted)
        if _number_of_layers(base):  # of the last ones
            options["num_hidden_layers"] = max(3, len(wanted))
            options["out_features"] = [f"stage{3 + i - min(len(wanted), 3) + 1}" for i in range(len(wanted))]
    for name, value in special.items():
        if name not in ("first", "without"):
            options[name] = value(options, base) if callable(value) else value
    for name in special.get("without", ()):
        options.pop(name, None)
    return kind(**options)


def _differs(value: Any, other: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and type(value) is type(other) and value != other


def _backbone() -> Any:
    """In place of one of timm's, which are built from their names alone."""
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 64],
        depths=[1, 2, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def _number_of_layers(base: Any) -> int:
    number = getattr(base, "num_hidden_layers", None) if "num_hidden_layers" in _known(base) else None
    return number if isinstance(number, int) else 0


def _known(base: Any) -> set[str]:
    return {*vars(base), *getattr(base, "attribute_map", {})}


def _by_layer(base: Any) -> dict[str, Sequence[Any]]:
    """Fields that hold one value for every layer."""
    number = _number_of_layers(base)
    return {
        name: value
        for name, value in vars(base).items()
        if isinstance(value, (list, tuple)) and len(value) == number > 2 and name not in LISTS
    }


def _layers(base: Any) -> list[int] | None:
    """Of which layers a small model is made where they differ: of every kind at least one."""
    lists = _by_layer(base)
    if not lists:
        return None
    kinds = list(zip(*(map(repr, value) for value in lists.values()), strict=True))
    first = sorted({kind: number for number, kind in reversed(list(enumerate(kinds)))}.values())[:LAYERS]
    return sorted([*first, *[i for i in range(len(kinds)) if i not in first][: max(3 - len(first), 0)]])


def _fitting(base: Any, name: str, value: Any, chosen: list[int] | None) -> Any:
    """A small value for a field; None if it is to stay as it is."""
    if value is None:
        return ABSENT.get(name)
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        if name in TOKENS:
            return TOKENS[name]
        if name == "num_hidden_layers" and chosen is not None:
            return len(chosen)
        if name.endswith("_token_id") and value >= 60:
            return 60 + sum(map(ord, name)) % 30  # inside of the small vocabulary; `place_tokens` tells them apart
        if name == "head_dim" and value == getattr(base, "qk_rope_head_dim", None):
            return NUMBERS["qk_rope_head_dim"]
        if name in ("num_key_value_heads", "num_kv_heads") and _all_heads(base, value):
            return NUMBERS["num_attention_heads"]
        return NUMBERS.get(name)
    if isinstance(value, float):
        return 0.0 if "drop" in name else None
    if isinstance(value, (list, tuple)) and value:
        if chosen is not None and name in _by_layer(base):
            number = NUMBERS.get(name)
            return type(value)(value[i] if number is None or isinstance(value[i], bool) else number for i in chosen)
        if name in LISTS and all(isinstance(one, int) for one in value):
            return type(value)(LISTS[name](value))
    return None


def _all_heads(base: Any, value: int) -> bool:
    heads = getattr(base, "num_attention_heads", None)
    return isinstance(heads, int) and heads == value


def place_tokens(config: Any) -> None:
    """Numbers of tokens that stand for something, inside of the small vocabulary, one for every name."""
    given: dict[str, int] = {}
    for part in parts(config):
        for name, value in list(vars(part).items()):
            special = name.endswith(("_token_id", "_token_index")) and name not in TOKENS
            if special and isinstance(value, int) and not isinstance(value, bool):
                given.setdefault(name.replace("_index", "_id"), 95 - len(given))
                if value >= 60:
                    setattr(part, name, given[name.replace("_index", "_id")])
