"""What the names of fields do not tell of transformers' configurations and batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_WINDOWS = {"image_size": 64, "patch_size": 4, "window_size": 2}
_TIME = {
    "first": ("prediction_length",),
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "without": ("feature_size",),
}
_ROTATED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
# by model type: fields that are given as they are, or as a function of the others and of the default configuration.
# "first" names those without which there is no default configuration, "without" those that stay as they are by default
SPECIAL: dict[str, dict[str, Any]] = {
    "swin": _WINDOWS,
    "swinv2": {**_WINDOWS, "embed_dim": 16, "pretrained_window_sizes": [0, 0, 0, 0]},
    "donut-swin": _WINDOWS,
    "maskformer-swin": _WINDOWS,
    "swin2sr": {"image_size": 16, "patch_size": 1, "window_size": 4},
    "autoformer": _TIME,
    "informer": _TIME,
    "time_series_transformer": _TIME,
    "bit": {"num_groups": 4, "hidden_sizes": [16, 32, 32, 64], "embedding_size": 16},
    "mask2former": {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64},
    "maskformer": {"fpn_feature_size": 64, "mask_feature_size": 64},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh", "local"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_hashes": 1,
        "hash_seed": 0,
    },
    "xmod": {"default_language": "en_XX"},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "perceiver": {"d_latents": 32, "d_model": 32, "num_latents": 6, "num_self_attends_per_block": 3},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "image_size": 64, "hidden_dim": 320},
    "efficientnet_vision": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "image_size": 64},
    "align_vision_model": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "image_size": 64, "hidden_dim": 80},
    "dac": {"encoder_hidden_size": 8, "decoder_hidden_size": 128, "hidden_size": 128},
    "xlstm": {"qk_dim_factor": 0.5, "v_dim_factor": 1.0, "hidden_size": 64, "num_heads": 4, "chunk_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16, "input_size": 32},
    "lilt": {"hidden_size": 48, "num_attention_heads": 4, "channel_shrink_ratio": 4},
    "glm5_next": {"index_kpool": 4},
    "glm5_next_text": {"index_kpool": 4},
    "granite_speech5_encoder": {"context_size": 16},
    "cosmos3_edge_text": {"rope_parameters": _ROTATED},
    "hy_v4_vl_text": {"rope_parameters": {**_ROTATED, "mrope_section": [2, 1, 1]}},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "audio-spectrogram-transformer": {
        "max_length": 40,
        "num_mel_bins": 16,
        "patch_size": 8,
        "time_stride": 8,
        "frequency_stride": 8,
    },
    "esm": {"position_embedding_type": "rotary", "pad_token_id": 0, "mask_token_id": 3, "vocab_size": 96},
    "levit": {"image_size": 64, "key_dim": [8, 8, 8], "patch_size": 16},
    "mobilevitv2": {"image_size": 64, "patch_size": 2},
    "mobilevit": {"image_size": 64, "patch_size": 2},
    "blip_2_qformer": {"encoder_hidden_size": 64},
    "textnet": {"without": ("hidden_sizes",)},
    "seggpt": {
        "image_size": [32, 16],
        "pretrain_image_size": 16,
        "patch_size": 8,
        "merge_index": 0,
        "intermediate_hidden_state_indices": [1],
    },
    "timesformer": {"num_frames": 4},
    "videomae": {"num_frames": 4},
    "vivit": {"num_frames": 4, "tubelet_size": [2, 8, 8]},
    "sam2_hiera_det_model": {"hidden_size": 16},
    "sam_vision_model": {"output_channels": 64},
    "sam_hq_vision_model": {"output_channels": 64},
    "cvt": {"depth": [1, 2, 3]},
    "encodec": {"codebook_dim": 64, "num_filters": 8},
    "mimi": {"num_filters": 8},
    "chameleon": {"vocabulary_map": {"<image>": 95}},
    "rt_detr": {"encoder_in_channels": [32, 64, 64], "decoder_in_channels": [64] * 3, "encoder_hidden_dim": 64},
    "rt_detr_v2": {"encoder_in_channels": [32, 64, 64], "decoder_in_channels": [64] * 3, "encoder_hidden_dim": 64},
    "d_fine": {"encoder_in_channels": [128, 256, 512], "decoder_in_channels": [64] * 3, "encoder_hidden_dim": 64},
    "zaya": {"num_experts_per_tok": 1},
    "zaya_text": {"num_experts_per_tok": 1},
    "siglip2_vision_model": {"num_patches": 16},
    "qwen3_asr_encoder": {"n_window": 8, "n_window_infer": 16},
}


def _times(model: nn.Module) -> dict[str, torch.Tensor]:
    """Series of three, of a model that forecasts."""
    config: Any = model.config
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": torch.randn(3, past),
        "past_time_features": torch.zeros(3, past, config.num_time_features),
        "past_observed_mask": torch.ones(3, past),
        "future_values": torch.randn(3, config.prediction_length),
        "future_time_features": torch.zeros(3, config.prediction_length, config.num_time_features),
    }


def _lxmert(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(3, 60, (3, 9)),
        "visual_feats": torch.randn(3, 4, model.config.visual_feat_dim),
        "visual_pos": torch.rand(3, 4, model.config.visual_pos_dim),
    }


def _decision(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        "states": torch.randn(3, 4, model.config.state_dim),
        "actions": torch.randn(3, 4, model.config.act_dim),
        "rewards": torch.randn(3, 4, 1),
        "returns_to_go": torch.randn(3, 4, 1),
        "timesteps": torch.arange(4).repeat(3, 1),
        "attention_mask": torch.ones(3, 4),
    }


def _qformer(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        "query_embeds": torch.randn(3, 6, model.config.hidden_size),
        "encoder_hidden_states": torch.randn(3, 5, model.config.encoder_hidden_size),
    }


def _siglip2(model: nn.Module) -> dict[str, torch.Tensor]:
    config: Any = getattr(model.config, "vision_config", model.config)
    batch = {
        "pixel_values": torch.randn(3, 16, 3 * config.patch_size**2),
        "pixel_attention_mask": torch.ones(3, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * 3),
    }
    return batch if config is model.config else {**batch, "input_ids": torch.randint(3, 60, (3, 9))}


def _seggpt(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.randn(3, 3, 16, 16) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


def _speecht5(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(3, 9, 64), "decoder_input_values": torch.randn(3, 5, 64)}


def _ids(length: int) -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    return lambda model: {"input_ids": torch.randint(3, 60, (3, length))}


# by model type: the whole batch
INPUTS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "autoformer": _times,
    "informer": _times,
    "time_series_transformer": _times,
    "lxmert": _lxmert,
    "decision_transformer": _decision,
    "blip_2_qformer": _qformer,
    "reformer": _ids(8),
    "seggpt": _seggpt,
    "speecht5": _speecht5,
    "siglip2": _siglip2,
    "siglip2_vision_model": _siglip2,
    "perceiver": lambda model: {"inputs": torch.randn(3, 9, 32)},
    "xlstm": lambda model: {"input_ids": torch.randint(3, 60, (3, 8)), "use_cache": False},
}
