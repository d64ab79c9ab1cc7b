"""One small model for every form of layer of transformers, and steps with coins in the plain model."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

ROWS, TOKENS, WIDTH = 5, 7, 32


@dataclass(frozen=True)
class Family:
    """A model to be checked.

    Attributes:
        make: builds it.
        inputs: builds arguments of its forward, for ROWS rows.
        ends: for every branch of a layer the child behind which its coin is tossed; what comes after it is linear.
        decoder_ends: the same for layers of a decoder.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    ends: Sequence[str]
    decoder_ends: Sequence[str] = ()

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make()
        for parameter in model.parameters():  # branches that weigh as much as what they are added to
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.15)
        return model


def without_dropout(model: nn.Module) -> nn.Module:
    """The model without dropout of units, which is drawn for live branches only."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def output(result: Mapping[str, Any]) -> Tensor:
    """The hidden state, logits or the like among a model's results."""
    return next(one for one in result.values() if isinstance(one, Tensor) and one.is_floating_point())


def step(model: nn.Module, inputs: Mapping[str, Any], seed: int = 3) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output of a forward, and the gradients of all parameters."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = output(model(**inputs))
    (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def tossed(
    model: nn.Module, layers: Mapping[str, Sequence[str]], factors: Sequence[float | Tensor], backward: bool = False
) -> nn.Module:
    """A copy of a plain model that multiplies branches, or only their gradients (`backward`), by these factors, in the
    order of layers and their ends."""
    model = without_dropout(copy.deepcopy(model))
    left = iter(factors)
    for name, ends in layers.items():
        layer = model.get_submodule(name)
        mine = list(itertools.islice(left, len(ends)))
        for end in dict.fromkeys(ends):
            module = layer.get_submodule(end)
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
            turns = itertools.cycle([factor for one, factor in zip(ends, mine, strict=True) if one == end])
            module.register_forward_hook(lambda module, args, out, turns=turns: _scaled(out, next(turns), backward))
    assert next(left, None) is None
    return model


def _scaled(out: Any, factor: float | Tensor, backward: bool) -> Any:
    if isinstance(out, tuple):
        return _scaled(out[0], factor, backward), *out[1:]
    factor = factor.view(-1, *[1] * (out.ndim - 1)) if isinstance(factor, Tensor) else factor
    return out.detach() + factor * (out - out.detach()) if backward else out * factor


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def ids(rows: int = ROWS, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, 60, (rows, tokens), generator=torch.Generator().manual_seed(1))


def text() -> dict[str, Any]:
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[1, -2:] = 0
    mask[3, -3:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def encoded() -> dict[str, Any]:
    states = {"encoder_hidden_states": _random(ROWS, 4, WIDTH)}
    return {**text(), **states, "encoder_attention_mask": torch.tensor([[1, 1, 1, 0]] * ROWS)}


def images() -> dict[str, Any]:
    return {"pixel_values": _random(ROWS, 3, 32, 32)}


def audio() -> dict[str, Any]:
    return {"input_values": _random(ROWS, 1200)}


def built(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A function that builds transformers' `model` from its `config`."""
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1}
TEXT["eos_token_id"] = 2
CAUSAL = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.0}
VISION = {**SMALL, "image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.1}
SPEECH = {**SMALL, "vocab_size": 32, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
SPEECH |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
SPEECH |= {"mask_time_prob": 0.0, "layerdrop": 0.0, "mask_feature_prob": 0.0}
SEQ2SEQ = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 48))}
SEQ2SEQ |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": WIDTH, "vocab_size": 64}
SEQ2SEQ |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
GPT2 = {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 32, "vocab_size": 64, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 2, "pad_token_id": 0}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
SWIN |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [2, 2], "drop_path_rate": 0.3}

_ATTENTION_MLP = ("self_attn", "mlp")
_DROP_PATHS = ("drop_path", "drop_path")
_BERT = ("attention.output.dropout", "output.dropout")
_DECODER = ("self_attn", "encoder_attn", "fc2")


def _causal(name: str, config: str = "", ends: Sequence[str] = _ATTENTION_MLP, **options: Any) -> Family:
    return Family(built(f"{name}ForCausalLM", config or f"{name}Config", **{**CAUSAL, **options}), text, ends)


FAMILIES = {
    "vit": Family(built("ViTModel", "ViTConfig", **VISION), images, ("dropout", "dropout")),
    "pixio": Family(built("PixioModel", "PixioConfig", **VISION, drop_path_rate=0.3), images, _DROP_PATHS),
    "dinov2": Family(
        built("Dinov2Model", "Dinov2Config", **{**VISION, "mlp_ratio": 2}, drop_path_rate=0.3), images, _DROP_PATHS
    ),
    "dinov3": Family(built("DINOv3ViTModel", "DINOv3ViTConfig", **VISION, drop_path_rate=0.3), images, _DROP_PATHS),
    "clip-vision": Family(built("CLIPVisionModel", "CLIPVisionConfig", **VISION), images, _ATTENTION_MLP),
    "clip-text": Family(built("CLIPTextModel", "CLIPTextConfig", **TEXT), text, _ATTENTION_MLP),
    "siglip": Family(built("SiglipVisionModel", "SiglipVisionConfig", **VISION), images, _ATTENTION_MLP),
    "blip": Family(built("BlipVisionModel", "BlipVisionConfig", **VISION), images, _ATTENTION_MLP),
    "swin": Family(built("SwinModel", "SwinConfig", **SWIN), images, ("drop_path", "mlp")),
    "swinv2": Family(built("Swinv2Model", "Swinv2Config", **SWIN), images, _DROP_PATHS),
    "donut": Family(built("DonutSwinModel", "DonutSwinConfig", **SWIN), images, ("drop_path", "output")),
    "convnext": Family(built("ConvNextModel", "ConvNextConfig", **CONVNEXT, num_stages=2), images, ("drop_path",)),
    "convnextv2": Family(
        built("ConvNextV2Model", "ConvNextV2Config", **CONVNEXT, num_stages=2), images, ("drop_path",)
    ),
    "dinov3-convnext": Family(built("DINOv3ConvNextModel", "DINOv3ConvNextConfig", **CONVNEXT), images, ("drop_path",)),
    "bert": Family(built("BertModel", "BertConfig", **TEXT), text, _BERT),
    "bert-decoder": Family(
        built("BertLMHeadModel", "BertConfig", **TEXT, is_decoder=True, add_cross_attention=True),
        encoded,
        ("attention.output.dropout", "crossattention.output.dropout", "output.dropout"),
    ),
    "bert-chunked": Family(built("BertModel", "BertConfig", **TEXT, chunk_size_feed_forward=TOKENS), text, _BERT),
    "roberta": Family(built("RobertaModel", "RobertaConfig", **TEXT), text, _BERT),
    # the forward of BertLayer, but an attention and an output with their norms elsewhere
    "roberta-prenorm": Family(
        built("RobertaPreLayerNormModel", "RobertaPreLayerNormConfig", **TEXT),
        text,
        ("attention.output.dropout", "output.dropout"),
    ),
    "layoutlm": Family(built("LayoutLMModel", "LayoutLMConfig", **TEXT), text, _BERT),
    "distilbert": Family(
        built("DistilBertModel", "DistilBertConfig", vocab_size=64, dim=WIDTH, n_layers=3, n_heads=4, hidden_dim=48),
        text,
        ("attention", "ffn"),
    ),
    "modernbert": Family(
        built("ModernBertModel", "ModernBertConfig", **TEXT, cls_token_id=1, sep_token_id=2), text, ("attn", "mlp")
    ),
    "gpt2": Family(built("GPT2LMHeadModel", "GPT2Config", **GPT2), text, ("attn", "mlp")),
    "gpt2-cross": Family(
        built("GPT2LMHeadModel", "GPT2Config", **GPT2, add_cross_attention=True),
        encoded,
        ("attn", "crossattention", "mlp"),
    ),
    "llama": _causal("Llama"),
    "mistral": _causal("Mistral"),
    "qwen2": _causal("Qwen2"),
    "qwen3": _causal("Qwen3"),
    "granite": _causal("Granite", residual_multiplier=0.5),
    "olmo2": _causal("Olmo2", ends=("post_attention_layernorm", "post_feedforward_layernorm")),
    "gemma2": _causal("Gemma2", ends=("post_attention_layernorm", "post_feedforward_layernorm")),
    "gemma3": _causal("Gemma3", "Gemma3TextConfig", ("post_attention_layernorm", "post_feedforward_layernorm")),
    "mixtral": _causal("Mixtral", num_local_experts=2),
    "gpt-oss": _causal("GptOss", num_local_experts=2, num_experts_per_tok=1, rope_parameters={"rope_type": "default"}),
    "wav2vec2": Family(built("Wav2Vec2Model", "Wav2Vec2Config", **SPEECH), audio, ("attention", "feed_forward")),
    "wav2vec2-stable": Family(
        built(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            **SPEECH,
            do_stable_layer_norm=True,
            feat_extract_norm="layer",
            adapter_attn_dim=4,
        ),
        audio,
        ("attention", "feed_forward", "adapter_layer"),
    ),
    "hubert": Family(built("HubertModel", "HubertConfig", **SPEECH), audio, ("attention", "feed_forward")),
    "bart": Family(built("BartModel", "BartConfig", **SEQ2SEQ), text, ("self_attn", "fc2"), _DECODER),
    "mbart": Family(built("MBartModel", "MBartConfig", **SEQ2SEQ), text, ("self_attn", "fc2"), _DECODER),
    "whisper": Family(
        built(
            "WhisperModel",
            "WhisperConfig",
            **SEQ2SEQ,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
        ),
        lambda: {"input_features": _random(ROWS, 8, 32), "decoder_input_ids": ids()},
        ("self_attn", "fc2"),
        _DECODER,
    ),
}
