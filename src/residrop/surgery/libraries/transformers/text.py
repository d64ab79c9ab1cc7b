"""Layers of language models: encoders, decoders, and the two with cross-attention."""

from typing import Any

import torch
from torch import Tensor, nn

from residrop.surgery.libraries.transformers.layers import CrossAttention, Layer, PreNorm

__all__ = ["MIXINS"]


class LlamaLayer(PreNorm):
    """Llama, Mistral, Qwen2, Qwen3, Gemma, OLMo, DeepSeek-V3, SmolLM3, GLM and some sixty more."""

    forms = ("56851eb5314f", "3de6c16874d6")
    parts = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
    by_name = True

    def residrop_forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: Any = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        x = self.through(
            0,
            hidden_states,
            self.attention_branch,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return self.through(1, x, self.feed_forward_branch)


class GptOssLayer(LlamaLayer):
    """As Llama's, with an MLP (of experts) that returns a pair."""

    forms = ("51e54383f3b7", "21ca6cec9373")

    def feed_forward_branch(self: Any, x: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x))[0]


class GraniteLayer(LlamaLayer):
    """As Llama's, with branches times a constant."""

    forms = ("c8eb9762287b", "d21a8544c26a")

    def attention_branch(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        return super().attention_branch(x, **kwargs) * self.residual_multiplier

    def feed_forward_branch(self: Any, x: Tensor) -> Tensor:
        return super().feed_forward_branch(x) * self.residual_multiplier


class Olmo2Layer(LlamaLayer):
    """x + norm(attention(x)), then x + norm(mlp(x)): OLMo 2 and 3, EXAONE 4."""

    forms = ("ddcc10218045", "6dc027daef0f")
    parts = (("self_attn", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm"))

    def attention_branch(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        return self.post_attention_layernorm(self.self_attn(hidden_states=x, **kwargs)[0])


class MixtralLayer(PreNorm):
    """Mixtral, Phi-MoE, MiniMax-M2: Llama's with another order of arguments."""

    forms = ("9d615a1d8ee4", "a16bdb563fb0")
    parts = LlamaLayer.parts
    by_name = True

    def residrop_forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        x = self.through(
            0,
            hidden_states,
            self.attention_branch,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return self.through(1, x, self.feed_forward_branch)


class Gemma2Layer(MixtralLayer):
    """Norms before and after each branch: Gemma 2 and 3."""

    forms = ("616c4cee5761", "937c8486053f")
    parts = (
        ("input_layernorm", "self_attn", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    )


class ModernBertLayer(PreNorm):
    forms = ("edec019ee483",)
    parts = (("attn_norm", "attn"), ("mlp_norm", "mlp"))

    def residrop_forward(
        self, hidden_states: Tensor, attention_mask: Any = None, position_embeddings: Any = None, **kwargs: Any
    ) -> Tensor:
        x = self.through(
            0,
            hidden_states,
            self.attention_branch,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        return self.through(1, x, self.feed_forward_branch)


class GPT2Block(PreNorm):
    forms = ("bcf7bad99ceb", "77405f4351b2")
    parts = (("ln_1", "attn"), ("ln_2", "mlp"))

    def residrop_forward(
        self: Any,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        use_cache: Any = False,
        **kwargs: Any,
    ) -> Tensor:
        x = self.through(
            0,
            hidden_states,
            self.attention_branch,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        if encoder_hidden_states is not None:
            x = self.cross_attention(
                x,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
            )
        return self.through(len(self.parts) - 1, x, self.feed_forward_branch)

    def cross_attention(self, x: Tensor, **kwargs: Any) -> Tensor:
        raise ValueError("encoder_hidden_states were given to a model built without add_cross_attention=True")


class GPT2CrossBlock(CrossAttention, GPT2Block):
    """The same with cross-attention to an encoder between the two."""

    parts = (("ln_1", "attn"), ("ln_cross_attn", "crossattention"), ("ln_2", "mlp"))

    def cross_attention(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.through(1, x, self.cross_attention_branch, **kwargs)

    def cross_attention_branch(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        return self.crossattention(self.ln_cross_attn(x), **kwargs)[0]


_NORM_OF_SUM = "bd131388eee1"  # LayerNorm(dropout(dense(h)) + x)
_FEED_FORWARD = (("feed_forward_chunk", "7d18a4174290"), ("output.forward", _NORM_OF_SUM))
_ATTENTION = ("574dc55f2d17", "905233ba672e")


class LayoutLMLayer(Layer):
    """norm(x + attention(x)), then norm(x + mlp(x)): LayoutLM and the text encoders of CLAP, ALIGN, Chinese-CLIP.

    The rule is inside of the norms: those are computed in every pass.
    """

    forms = ("96ab48cf0449",)
    inner = (*_FEED_FORWARD, ("attention.forward", "6595ec0b28c1"), ("attention.output.forward", _NORM_OF_SUM))
    parts = (("attention.self", "attention.output.dense"), ("intermediate", "output.dense"))

    def residrop_forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        x = self.through(0, hidden_states, self.attention_branch, attention_mask=attention_mask, **kwargs)
        return self.after_attention(self.attention.output.LayerNorm(x))

    def after_attention(self: Any, x: Tensor) -> Tensor:
        return self.output.LayerNorm(self.through(len(self.parts) - 1, x, self.feed_forward_branch))

    def attention_branch(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        return _dense(self.attention.output, self.attention.self(x, **kwargs)[0])

    def feed_forward_branch(self: Any, x: Tensor) -> Tensor:
        size = self.chunk_size_feed_forward
        chunks = [x] if size == 0 else x.split(size, self.seq_len_dim)
        done = [_dense(self.output, self.intermediate(chunk)) for chunk in chunks]
        return done[0] if len(done) == 1 else torch.cat(done, self.seq_len_dim)


def _dense(output: Any, x: Tensor) -> Tensor:
    return output.dropout(output.dense(x))


class BertLayer(LayoutLMLayer):
    """BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, ERNIE, data2vec-text, RoCBert, BridgeTower's text layers."""

    forms = ("0dbd1b46df46", "39ee817ced37")
    inner = (*_FEED_FORWARD, ("attention.forward", *_ATTENTION), ("attention.output.forward", _NORM_OF_SUM))

    @classmethod
    def suits(cls, block: nn.Module) -> bool:
        return super().suits(block) and not getattr(block.attention, "is_cross_attention", True)

    def residrop_forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        x = self.through(
            0,
            hidden_states,
            self.attention_branch,
            encoder_hidden_states=None,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        x = self.attention.output.LayerNorm(x)
        if self.is_decoder and encoder_hidden_states is not None:
            x = self.cross_attention(
                x,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return self.after_attention(x)

    cross_attention = GPT2Block.cross_attention


class BertCrossLayer(CrossAttention, BertLayer):
    """The same with cross-attention to an encoder between the two."""

    inner = (
        *BertLayer.inner,
        ("crossattention.forward", *_ATTENTION),
        ("crossattention.output.forward", _NORM_OF_SUM),
    )
    parts = (
        BertLayer.parts[0],
        ("crossattention.self", "crossattention.output.dense"),
        BertLayer.parts[1],
    )

    def cross_attention(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        x = self.through(1, x, self.cross_attention_branch, **kwargs)
        return self.crossattention.output.LayerNorm(x)

    def cross_attention_branch(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        return _dense(self.crossattention.output, self.crossattention.self(x, **kwargs)[0])


class DistilBertBlock(Layer):
    """As BERT's; the norms are the layer's own."""

    forms = ("91edca288f4c",)
    parts = (("attention",), ("ffn",))

    def residrop_forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        x = self.through(0, hidden_states, self.attention_branch, attention_mask=attention_mask, **kwargs)
        x = self.sa_layer_norm(x)
        return self.output_layer_norm(self.through(1, x, self.ffn))

    def attention_branch(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        return self.attention(x, **kwargs)[0]


MIXINS = (
    LlamaLayer,
    GptOssLayer,
    GraniteLayer,
    Olmo2Layer,
    MixtralLayer,
    Gemma2Layer,
    ModernBertLayer,
    GPT2CrossBlock,
    GPT2Block,
    LayoutLMLayer,
    BertCrossLayer,
    BertLayer,
    DistilBertBlock,
)
