"""Networks of other libraries beside ResNets and ViTs: of most, `residrop.apply` reads the branches from their sources.

Their chains are written by hand, piece by piece as their own forwards go.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from residrop.common.extras import extra
from residrop.research.bench.base import CLASSES, Chain, MakeRule, Network, Unit, sharing
from residrop.surgery import apply

__all__ = ["FOUND"]

T5_SMALL: dict[str, Any] = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
OPT_6: dict[str, Any] = {"hidden_size": 512, "ffn_dim": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
LLAMA_8: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 8192,
}
HIERA_TINY: dict[str, Any] = {}
CONVNEXT_TINY: dict[str, Any] = {}


class _Classifier(nn.Module):
    """A linear head on the mean over a sequence of what a model of tokens gives."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.of(self.body(tokens).last_hidden_state)

    def of(self, hidden: Tensor) -> Tensor:
        return self.head(hidden.mean(1))


class _Part(nn.Module):
    """A function, which the compiler takes as a module."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = run


def _unit(run: Callable[[Tensor], Tensor], compiled: bool) -> Unit:
    if not compiled:
        return Unit(run)
    part = _Part(run)
    part.compile()
    return Unit(part)


class _OfTokens(Network):
    """A network that reads tokens."""

    pixels = None
    tokens = 64
    convolutional = False

    def inputs(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        assert self.tokens is not None
        vocabulary = self.model.body.config.vocab_size
        return torch.randint(vocabulary, (count, self.tokens), generator=generator)


class _T5Encoder(_OfTokens):
    """The encoder of T5-small; its first self-attention makes the position bias of all others, and so stays."""

    def __init__(self, name: str, pixels: int | None = None) -> None:
        with extra("transformers"):
            from transformers import T5Config, T5EncoderModel
        config = T5Config(**T5_SMALL, dropout_rate=0.0)
        super().__init__(name, _Classifier(T5EncoderModel(config), config.d_model))

    def blocks_of(self, model: Any) -> list[Any]:
        return _layers(model)[1:]

    def end(self, block: Any, make: Callable[[], nn.Module]) -> None:
        block.dropout = make()

    def under(self, make: MakeRule, survival: str) -> nn.Module:
        model = sharing(self.model)
        example = self.inputs(4).to(next(model.parameters()).device)
        apply(model, make, survival, example=example)  # the example tells that the first attention cannot be absent
        return model

    def chain(self, compiled: bool = False) -> Chain:
        model = self.model
        encoder = model.body.encoder
        first, *others = _layers(model)
        bias: list[Tensor] = []

        def start(x: Tensor) -> Tensor:
            x, made, _ = first(x)
            bias[:] = [made]
            return x

        def attend(layer: Any, x: Tensor) -> Tensor:
            return layer(x, position_bias=bias[0])[0]

        units = [Unit(layer if hasattr(layer, "DenseReluDense") else partial(attend, layer)) for layer in others]
        stays = Unit(start, start, droppable=False, whole=True)
        return Chain(encoder.embed_tokens, [stays, *units], lambda x: model.of(encoder.final_layer_norm(x)))


def _layers(model: Any) -> list[Any]:
    return [layer for block in model.body.encoder.block for layer in block.layer]


class _OPT(_OfTokens):
    """A decoder like OPT's, of 6 layers, whose norms come before the branches."""

    def __init__(self, name: str, pixels: int | None = None) -> None:
        with extra("transformers"):
            from transformers import OPTConfig, OPTModel
        config = OPTConfig(**OPT_6, word_embed_proj_dim=OPT_6["hidden_size"], dropout=0.0, attention_dropout=0.0)
        super().__init__(name, _Classifier(OPTModel(config), config.hidden_size))

    def blocks_of(self, model: Any) -> list[Any]:
        return list(model.body.decoder.layers)

    def end(self, block: Any, make: Callable[[], nn.Module]) -> None:
        block.self_attn.out_proj = nn.Sequential(block.self_attn.out_proj, make())
        # its MLP sees the tokens of all sequences as rows
        block.fc2 = nn.Sequential(block.fc2, nn.Unflatten(0, (-1, self.tokens)), make(), nn.Flatten(0, 1))  # pyright: ignore[reportArgumentType]

    def chain(self, compiled: bool = False) -> Chain:
        model = self.model
        decoder = model.body.decoder

        def stem(tokens: Tensor) -> Tensor:
            ones = torch.ones_like(tokens)
            return decoder.embed_tokens(tokens) + decoder.embed_positions(ones, 0, position_ids=ones.cumsum(1) - 1)

        def attend(layer: Any, x: Tensor) -> Tensor:
            return x + layer.self_attn(layer.self_attn_layer_norm(x))[0]

        def feed(layer: Any, x: Tensor) -> Tensor:
            return x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))

        halves = [partial(half, layer) for layer in decoder.layers for half in (attend, feed)]
        units = [_unit(half, compiled) for half in halves]
        return Chain(stem, units, lambda x: model.of(decoder.final_layer_norm(x)))


class _Llama(_OfTokens):
    """A Llama of 8 layers."""

    def __init__(self, name: str, pixels: int | None = None) -> None:
        with extra("transformers"):
            from transformers import LlamaConfig, LlamaModel
        config = LlamaConfig(**LLAMA_8, use_cache=False)
        super().__init__(name, _Classifier(LlamaModel(config), LLAMA_8["hidden_size"]))

    def blocks_of(self, model: Any) -> list[Any]:
        return list(model.body.layers)

    def end(self, block: Any, make: Callable[[], nn.Module]) -> None:
        block.self_attn.o_proj = nn.Sequential(block.self_attn.o_proj, make())
        block.mlp.down_proj = nn.Sequential(block.mlp.down_proj, make())

    def chain(self, compiled: bool = False) -> Chain:
        model = self.model
        body = model.body
        turned: list[Any] = []  # cosines and sines of the positions, alike for all layers and sequences

        def stem(tokens: Tensor) -> Tensor:
            x = body.embed_tokens(tokens)
            turned[:] = [body.rotary_emb(x, torch.arange(tokens.shape[1], device=tokens.device)[None])]
            return x

        def attend(layer: Any, x: Tensor) -> Tensor:
            normed = layer.input_layernorm(x)
            return x + layer.self_attn(normed, position_embeddings=turned[0], attention_mask=None)[0]

        def feed(layer: Any, x: Tensor) -> Tensor:
            return x + layer.mlp(layer.post_attention_layernorm(x))

        halves = [partial(half, layer) for layer in body.layers for half in (attend, feed)]
        return Chain(stem, [_unit(half, compiled) for half in halves], lambda x: model.of(body.norm(x)))


class _ConvNeXt(Network):
    """timm's ConvNeXt-tiny."""

    def __init__(self, name: str, pixels: int | None = None) -> None:
        self.pixels = pixels or self.pixels
        with extra("timm"):
            import timm
        super().__init__(name, timm.create_model("convnext_tiny", num_classes=CLASSES, **CONVNEXT_TINY))

    def blocks_of(self, model: Any) -> list[Any]:
        return [block for stage in model.stages for block in stage.blocks]

    def end(self, block: Any, make: Callable[[], nn.Module]) -> None:
        block.drop_path = make()

    def chain(self, compiled: bool = False) -> Chain:
        model = self.model
        units: list[Unit] = []
        for stage in model.stages:
            units.append(Unit(stage.downsample, stage.downsample, droppable=False, whole=True))
            units += [Unit(block) for block in stage.blocks]
        return Chain(model.stem, units, lambda x: model.forward_head(model.norm_pre(x)))


class _Hiera(Network):
    """timm's Hiera-tiny. A block that changes the shape has a shortcut: a projection of its norm's output, pooled."""

    convolutional = False

    def __init__(self, name: str, pixels: int | None = None) -> None:
        self.pixels = pixels or self.pixels
        with extra("timm"):
            import timm
        model = timm.create_model("hiera_tiny_224", num_classes=CLASSES, img_size=self.pixels, **HIERA_TINY)
        super().__init__(name, model)

    def blocks_of(self, model: Any) -> list[Any]:
        return list(model.blocks)

    def end(self, block: Any, make: Callable[[], nn.Module]) -> None:
        block.drop_path1, block.drop_path2 = make(), make()

    def chain(self, compiled: bool = False) -> Chain:
        model = self.model

        def attend(block: Any, x: Tensor) -> Tensor:
            return x + block.ls1(block.attn(block.norm1(x)))

        def pooled(block: Any, normed: Tensor) -> Tensor:
            x = block.proj(normed)
            return x.view(x.shape[0], block.attn.q_stride, -1, x.shape[-1]).amax(dim=1)

        def narrow(block: Any, x: Tensor) -> Tensor:
            return pooled(block, block.norm1(x))

        def expand(block: Any, x: Tensor) -> Tensor:
            normed = block.norm1(x)
            return pooled(block, normed) + block.ls1(block.attn(normed))

        def feed(block: Any, x: Tensor) -> Tensor:
            return x + block.ls2(block.mlp(block.norm2(x)))

        units: list[Unit] = []
        for block in model.blocks:
            unit = _unit(partial(expand if block.do_expand else attend, block), compiled)
            units.append(unit._replace(absent=partial(narrow, block)) if block.do_expand else unit)
            units.append(_unit(partial(feed, block), compiled))
        return Chain(lambda x: model.unroll(model._pos_embed(model.patch_embed(x))), units, model.forward_head)


FOUND: Mapping[str, type[_T5Encoder | _OPT | _Llama | _Hiera | _ConvNeXt]] = {
    "transformers/t5_small_encoder": _T5Encoder,
    "transformers/opt_6_layers": _OPT,
    "transformers/llama_8_layers": _Llama,
    "timm/hiera_tiny_224": _Hiera,
    "timm/convnext_tiny": _ConvNeXt,
}
