"""Denoisers of diffusers, a few thousand parameters each, and its autoencoder of images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sweep.sources import ROWS, Built


def _latents(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape)


def _text(width: int = 16, tokens: int = 5) -> Tensor:
    return torch.randn(ROWS, tokens, width)


def _times() -> Tensor:
    return torch.tensor([1, 5, 7])


def _padding(tokens: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """1 for tokens, 0 behind them; another number in every sample."""
    return (torch.arange(tokens) < torch.tensor([tokens, tokens - 1, tokens - 2])[:, None]).to(dtype)


class _Small(NamedTuple):
    """A model: its options, what it is called with, and the kind of its blocks."""

    options: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    family: str


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_ROPE = {"num_attention_heads": 2, "attention_head_dim": 16}
_IDS = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}


def _flux(width: int = 4) -> dict[str, Any]:
    return {"hidden_states": _latents(16, width), "encoder_hidden_states": _text(), **_IDS, "timestep": _times() / 10}


# by class: those of one stream, of two streams, of convolutions
_MODELS: dict[str, _Small] = {
    "DiTTransformer2DModel": _Small(
        {
            **_HEADS,
            "in_channels": 4,
            "num_layers": 3,
            "sample_size": 8,
            "norm_num_groups": 4,
            "num_embeds_ada_norm": 10,
        },
        lambda: {"hidden_states": _latents(4, 8, 8), "timestep": _times(), "class_labels": torch.tensor([1, 2, 3])},
        "one stream",
    ),
    "PixArtTransformer2DModel": _Small(
        {
            **_HEADS,
            "in_channels": 4,
            "num_layers": 3,
            "sample_size": 8,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "use_additional_conditions": False,
        },
        lambda: {
            "hidden_states": _latents(4, 8, 8),
            "encoder_hidden_states": _text(12),
            "encoder_attention_mask": _padding(),
            "timestep": _times(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        "one stream",
    ),
    "WanTransformer3DModel": _Small(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 3,
            "rope_max_seq_len": 32,
        },
        lambda: {"hidden_states": _latents(4, 2, 4, 4), "timestep": _times(), "encoder_hidden_states": _text()},
        "one stream",
    ),
    "SanaTransformer2DModel": _Small(
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "sample_size": 8,
        },
        lambda: {
            "hidden_states": _latents(4, 4, 4),
            "encoder_hidden_states": _text(12),
            "encoder_attention_mask": _padding(),
            "timestep": _times(),
        },
        "one stream",
    ),
    "StableAudioDiTModel": _Small(
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 3,
            **_ROPE,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 12,
        },
        lambda: {
            "hidden_states": _latents(4, 8),
            "timestep": _times() / 10,
            "encoder_hidden_states": _text(12),
            "global_hidden_states": _text(8, 1),
            "rotary_embedding": (torch.randn(9, 8), torch.randn(9, 8)),  # one token of the global state before them
        },
        "one stream",
    ),
    "LTXVideoTransformer3DModel": _Small(
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "num_layers": 3,
            "caption_channels": 12,
        },
        lambda: {
            "hidden_states": _latents(16, 4),
            "encoder_hidden_states": _text(12),
            "timestep": _times(),
            "encoder_attention_mask": _padding(),
            "num_frames": 1,
            "height": 4,
            "width": 4,
        },
        "one stream",
    ),
    "Lumina2Transformer2DModel": _Small(
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 3,
            "num_refiner_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 12,
        },
        lambda: {
            "hidden_states": _latents(4, 8, 8),
            "timestep": _times() / 10,
            "encoder_hidden_states": _text(12),
            "encoder_attention_mask": _padding(dtype=torch.bool),
        },
        "one stream",
    ),
    "HunyuanDiT2DModel": _Small(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 16,
            "num_layers": 4,
            "cross_attention_dim": 16,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 16,
            "text_len": 5,
            "text_len_t5": 4,
            "use_style_cond_and_image_meta_size": False,
        },
        lambda: {
            "hidden_states": _latents(4, 8, 8),
            "timestep": _times().float(),
            "encoder_hidden_states": _text(),
            "text_embedding_mask": _padding(),
            "encoder_hidden_states_t5": _text(16, 4),
            "text_embedding_mask_t5": _padding(4),
        },
        "one stream, skips over a distance",
    ),
    "PriorTransformer": _Small(
        {**_HEADS, "num_layers": 3, "embedding_dim": 16, "num_embeddings": 5},
        lambda: {
            "hidden_states": _latents(16),
            "timestep": _times(),
            "proj_embedding": _latents(16),
            "encoder_hidden_states": _text(),
            "attention_mask": _padding(dtype=torch.bool),
        },
        "one stream",
    ),
    "SD3Transformer2DModel": _Small(
        {
            **_HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16,
            "out_channels": 4,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0,),
        },
        lambda: {
            "hidden_states": _latents(4, 8, 8),
            "encoder_hidden_states": _text(),
            "pooled_projections": _latents(16),
            "timestep": _times(),
        },
        "two streams",
    ),
    "FluxTransformer2DModel": _Small(
        {
            **_ROPE,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 3,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        },
        lambda: {**_flux(), "pooled_projections": _latents(16)},
        "two streams, then two streams in one",
    ),
    "Flux2Transformer2DModel": _Small(
        {
            **_ROPE,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 3,
            "joint_attention_dim": 16,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda: {
            **_flux(),
            "img_ids": torch.zeros(16, 4),
            "txt_ids": torch.zeros(5, 4),
            "guidance": _times() / 10,
        },
        "two streams, then one of both",
    ),
    "ChromaTransformer2DModel": _Small(
        {
            **_ROPE,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 3,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 4, 8),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 2,
        },
        lambda: {**_flux(), "attention_mask": torch.ones(ROWS, 21)},
        "two streams, then one of both",
    ),
    "HunyuanVideoTransformer3DModel": _Small(
        {
            **_ROPE,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 2,
            "patch_size": 2,
            "text_embed_dim": 12,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 4, 8),
        },
        lambda: {
            "hidden_states": _latents(4, 2, 4, 4),
            "timestep": _times(),
            "encoder_hidden_states": _text(12),
            "encoder_attention_mask": _padding(dtype=torch.int64),
            "pooled_projections": _latents(8),
            "guidance": _times() * 100.0,
        },
        "two streams",
    ),
    "CogVideoXTransformer3DModel": _Small(
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 12,
            "num_layers": 3,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 5,
            "max_text_seq_length": 5,
        },
        lambda: {"hidden_states": _latents(2, 4, 4, 4), "encoder_hidden_states": _text(12), "timestep": _times()},
        "two streams",
    ),
    "CogView4Transformer2DModel": _Small(
        {
            "num_layers": 3,
            **_ROPE,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 12,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "pos_embed_max_size": 16,
            "sample_size": 8,
            "rope_axes_dim": (8, 8),
        },
        lambda: {
            "hidden_states": _latents(4, 4, 4),
            "encoder_hidden_states": _text(12),
            "timestep": _times(),
            "original_size": torch.full((ROWS, 2), 32.0),
            "target_size": torch.full((ROWS, 2), 32.0),
            "crop_coords": torch.zeros(ROWS, 2),
        },
        "two streams",
    ),
    "MochiTransformer3DModel": _Small(
        {
            **_HEADS,
            "num_layers": 3,
            "pooled_projection_dim": 8,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "max_sequence_length": 5,
        },
        lambda: {
            "hidden_states": _latents(4, 2, 4, 4),
            "encoder_hidden_states": _text(),
            "timestep": _times(),
            "encoder_attention_mask": _padding(dtype=torch.bool),
        },
        "two streams",
    ),
    "QwenImageTransformer2DModel": _Small(
        {
            **_ROPE,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 4, 8),
        },
        lambda: {
            "hidden_states": _latents(16, 16),
            "encoder_hidden_states": _text(12),
            "encoder_hidden_states_mask": _padding(dtype=torch.int64),
            "timestep": _times() / 10,
            "img_shapes": [(1, 4, 4)] * ROWS,
        },
        "two streams",
    ),
    "AuraFlowTransformer2DModel": _Small(
        {
            **_HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "out_channels": 4,
            "pos_embed_max_size": 16,
        },
        lambda: {"hidden_states": _latents(4, 8, 8), "encoder_hidden_states": _text(12), "timestep": _times() / 10},
        "two streams, then one of both",
    ),
    "UNet2DConditionModel": _Small(
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 12,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            "transformer_layers_per_block": 2,
        },
        lambda: {"sample": _latents(4, 8, 8), "timestep": _times(), "encoder_hidden_states": _text(12)},
        "convolutions",
    ),
    "AutoencoderKL": _Small(
        {
            "block_out_channels": (8, 16),
            "layers_per_block": 2,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
            "sample_size": 16,
        },
        lambda: {"sample": _latents(3, 16, 16)},
        "convolutions",
    ),
}


def names() -> list[str]:
    return list(_MODELS)


def build(name: str) -> Built:
    import diffusers

    small = _MODELS[name]
    return Built(getattr(diffusers, name)(**small.options), kwargs=small.inputs(), family=small.family)
