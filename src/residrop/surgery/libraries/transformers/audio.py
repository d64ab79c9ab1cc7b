"""Layers of speech models, and of the encoders and decoders that they share with BART."""

from typing import Any

import torch
from torch import Tensor, nn

from residrop.surgery.libraries.transformers.layers import Layer, PreNorm

__all__ = ["MIXINS"]


class Wav2Vec2Layer(Layer):
    """norm(x + attention(x)), then norm(x + mlp(x)): wav2vec 2.0, HuBERT, SEW, UniSpeech, data2vec-audio.

    The rule is inside of the norms: those are computed in every pass.
    """

    forms = ("098928359ff3",)
    parts = (("attention",), ("feed_forward",))

    def residrop_forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        x = self.through(0, hidden_states, self.attention_branch, attention_mask=attention_mask, **kwargs)
        x = self.layer_norm(x)
        return self.final_layer_norm(self.through(1, x, self.feed_forward))

    def attention_branch(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        return self.dropout(self.attention(x, **kwargs)[0])


class Wav2Vec2StableLayer(PreNorm):
    """The form with norms first (`do_stable_layer_norm`); an adapter of it stays present."""

    forms = ("3c49f8e4faa3",)
    parts = (("layer_norm", "attention", "dropout"), ("final_layer_norm", "feed_forward"))

    def residrop_forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        x = self.through(0, hidden_states, self.attention_branch, attention_mask=attention_mask, **kwargs)
        x = self.through(1, x, self.feed_forward_branch)
        return x if self.adapter_layer is None else x + self.adapter_layer(x)


class _Seq2Seq(Layer):
    """What BART, mBART, Whisper and their kin have in common."""

    norm_first = True

    def attended(self: Any, number: int, norm: nn.Module, x: Tensor, attention: Any, **kwargs: Any) -> Tensor:
        def branch(x: Tensor, **kwargs: Any) -> Tensor:
            return self.dropped(attention(norm(x) if self.norm_first else x, **kwargs)[0])

        x = self.through(number, x, branch, **kwargs)
        return x if self.norm_first else norm(x)

    def fed_forward(self: Any, x: Tensor) -> Tensor:
        x = self.through(len(self.parts) - 1, x, self.feed_forward_branch)
        return x if self.norm_first else self.final_layer_norm(x)

    def feed_forward_branch(self: Any, x: Tensor) -> Tensor:
        x = self.activation_fn(self.fc1(self.final_layer_norm(x) if self.norm_first else x))
        x = nn.functional.dropout(x, p=self.activation_dropout, training=self.training)
        return self.dropped(self.fc2(x))

    def dropped(self: Any, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, p=self.dropout, training=self.training)


class WhisperEncoderLayer(_Seq2Seq):
    """Norms first: mBART, M2M-100, Pegasus, Blenderbot, Speech2Text, Whisper, Qwen2-Audio, Voxtral."""

    forms = ("04ddee22248b",)
    parts = (("self_attn_layer_norm", "self_attn"), ("final_layer_norm", "fc1", "fc2"))

    def residrop_forward(self: Any, hidden_states: Tensor, attention_mask: Any, **kwargs: Any) -> Tensor:
        def attend(x: Tensor, **kwargs: Any) -> Any:
            return self.self_attn(hidden_states=x, **kwargs)

        x = self.attended(0, self.self_attn_layer_norm, hidden_states, attend, attention_mask=attention_mask, **kwargs)
        return _clamped(self.fed_forward(x), overflown_only=False)


class BartEncoderLayer(_Seq2Seq):
    """Norms last: BART, Marian, PLBart, Blenderbot-small."""

    forms = ("959b36eaa674",)
    parts = (("self_attn",), ("fc1", "fc2"))
    norm_first = False

    def residrop_forward(self: Any, hidden_states: Tensor, attention_mask: Any, **kwargs: Any) -> Tensor:
        norm, attend = self.self_attn_layer_norm, self.self_attn
        x = self.attended(0, norm, hidden_states, attend, attention_mask=attention_mask, **kwargs)
        return _clamped(self.fed_forward(x), overflown_only=True)


def _clamped(x: Tensor, *, overflown_only: bool) -> Tensor:
    if x.dtype == torch.float16 and not (overflown_only and torch.isfinite(x).all()):
        limit = torch.finfo(x.dtype).max - 1000
        x = torch.clamp(x, min=-limit, max=limit)
    return x


class WhisperDecoderLayer(_Seq2Seq):
    """Norms first: mBART, M2M-100, Pegasus, Blenderbot; MusicGen, Speech2Text, Whisper, XGLM."""

    forms = ("8e26dc508270", "01b41a1da37a", "418788e11d68", "7a14249408fd")
    parts = (
        ("self_attn_layer_norm", "self_attn"),
        ("encoder_attn_layer_norm", "encoder_attn"),
        ("final_layer_norm", "fc1", "fc2"),
    )

    def residrop_forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        past_key_values: Any = None,
        use_cache: Any = True,
        **kwargs: Any,
    ) -> Tensor:
        norm, attend, cache = self.self_attn_layer_norm, self.self_attn, past_key_values
        x = self.attended(
            0, norm, hidden_states, attend, past_key_values=cache, attention_mask=attention_mask, **kwargs
        )
        if encoder_hidden_states is not None:
            x = self.attended(
                1,
                self.encoder_attn_layer_norm,
                x,
                self.encoder_attn,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                past_key_values=cache,
                **kwargs,
            )
        return self.fed_forward(x)


class BartDecoderLayer(WhisperDecoderLayer):
    """Norms last: BART, Marian, PLBart, Blenderbot-small."""

    forms = ("af6bb23d8caf", "95c9ce9cc15d")
    parts = (("self_attn",), ("encoder_attn",), ("fc1", "fc2"))
    norm_first = False


MIXINS = (
    Wav2Vec2Layer,
    Wav2Vec2StableLayer,
    WhisperEncoderLayer,
    BartEncoderLayer,
    WhisperDecoderLayer,
    BartDecoderLayer,
)
