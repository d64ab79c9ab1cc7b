"""Layers of vision models."""

import sys
from typing import Any

from torch import Tensor, nn

from residrop.surgery.libraries.transformers.layers import Layer, PreNorm

__all__ = ["MIXINS"]


class ViTLayer(PreNorm):
    """ViT, DeiT, I-JEPA, MAE, MSN, ViViT, AST."""

    forms = ("a65e5f6b9314",)
    parts = (("layernorm_before", "attention", "dropout"), ("layernorm_after", "mlp", "dropout"))

    def residrop_forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        x = self.through(0, hidden_states, self.attention_branch, attention_mask=attention_mask, **kwargs)
        return self.through(1, x, self.feed_forward_branch)


class PixioLayer(ViTLayer):
    """The same with drop paths."""

    forms = ("94ec146304e0",)
    drops = ("drop_path", "drop_path")


class Dinov2Layer(ViTLayer):
    """DINOv2, EoMT, RADIO."""

    forms = ("2b952f0a9a0e",)
    parts = (("norm1", "attention", "layer_scale1"), ("norm2", "mlp", "layer_scale2"))
    drops = ("drop_path", "drop_path")


class Dinov3Layer(Dinov2Layer):
    """DINOv3, with rotary positions that all rows share."""

    forms = ("c51574ecd523",)
    shared = ("position_embeddings",)

    def residrop_forward(
        self, hidden_states: Tensor, attention_mask: Any = None, position_embeddings: Any = None, **kwargs: Any
    ) -> Tensor:
        return super().residrop_forward(
            hidden_states, attention_mask, position_embeddings=position_embeddings, **kwargs
        )


class CLIPLayer(PreNorm):
    """CLIP, SigLIP, AltCLIP, OWL-ViT, Idefics2, SmolVLM, X-CLIP's text layers."""

    forms = ("aba5819709e3",)
    parts = (("layer_norm1", "self_attn"), ("layer_norm2", "mlp"))
    by_name = True

    def residrop_forward(self, hidden_states: Tensor, attention_mask: Any, **kwargs: Any) -> Tensor:
        x = self.through(0, hidden_states, self.attention_branch, attention_mask=attention_mask, **kwargs)
        return self.through(1, x, self.feed_forward_branch)


class BlipLayer(PreNorm):
    """BLIP and InstructBLIP."""

    forms = ("b431d3f509c1",)
    parts = CLIPLayer.parts
    by_name = True

    def residrop_forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        x = self.through(0, hidden_states, self.attention_branch, **kwargs)
        return self.through(1, x, self.feed_forward_branch)


class _Windows(Layer):
    """Attention in shifted windows, which looks at (height, width) of the layer's tokens."""

    def attended(self: Any, x: Tensor, size: tuple[int, int], seen: list[Any], *args: Any, **kwargs: Any) -> Tensor:
        """Attention over Tensor[N, height * width, C]; appends the number of rows and the attention's weights."""
        (height, width), (rows, _, channels) = size, x.shape
        helpers: Any = sys.modules[self.__dict__["_residrop_class"].__module__]
        x, pad = self.maybe_pad(x.view(rows, height, width, channels), height, width)
        padded = x.shape[1:3]
        x = helpers.window_partition(self.shifted(x, -1), self.window_size)
        x = x.view(-1, self.window_size * self.window_size, channels)
        mask = self.get_attn_mask(*padded, dtype=x.dtype, device=x.device)
        x, *weights = self.attention(x, mask, *args, **kwargs)
        seen[:] = [rows, *weights]
        x = self.projected(x).view(-1, self.window_size, self.window_size, channels)
        x = self.shifted(helpers.window_reverse(x, self.window_size, *padded), 1)
        if pad[3] > 0 or pad[5] > 0:
            x = x[:, :height, :width, :].contiguous()
        return x.view(rows, height * width, channels)

    def shifted(self: Any, x: Tensor, sign: int) -> Tensor:
        return x if self.shift_size <= 0 else x.roll((sign * self.shift_size, sign * self.shift_size), (1, 2))

    def projected(self, x: Tensor) -> Tensor:
        """What comes right after the attention."""
        return x

    def windowed(self: Any, x: Tensor, size: tuple[int, int], **kwargs: Any) -> tuple[Tensor, Any]:
        """x through the layer, and the weights of its attention: None where not all rows have some."""
        seen: list[Any] = []

        def branch(x: Tensor) -> Tensor:
            return self.attention_branch(x, size, seen, **kwargs)

        rows = x.shape[0]
        x = self.through(1, self.through(0, x, branch), self.feed_forward_branch)
        return x, seen[1] if len(seen) > 1 and seen[0] == rows else None


class SwinLayer(_Windows):
    """Swin. Its own drop path is on the attention alone."""

    forms = ("95e9137e6c4a",)
    parts = (("layernorm_before", "attention"), ("layernorm_after", "mlp"))
    drops = ("drop_path", "")

    def residrop_forward(
        self: Any,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        always_partition: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        return self.windowed(hidden_states, input_dimensions, **kwargs)

    def attention_branch(self: Any, x: Tensor, size: tuple[int, int], seen: list[Any], **kwargs: Any) -> Tensor:
        return self.attended(self.layernorm_before(x), size, seen, **kwargs)

    def projected(self: Any, x: Tensor) -> Tensor:
        return self.dropout(x)

    def feed_forward_branch(self: Any, x: Tensor) -> Tensor:
        return self.dropout(self.mlp(self.layernorm_after(x)))


class DonutSwinLayer(_Windows):
    """The encoders of Donut and CLAP: Swin with an older way to return the weights."""

    forms = ("09fbef1b295e",)
    parts = (("layernorm_before", "attention"), ("layernorm_after", "intermediate", "output"))
    drops = SwinLayer.drops

    def residrop_forward(
        self: Any,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool | None = False,
        always_partition: bool | None = False,
    ) -> tuple[Any, ...]:
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        out = self.windowed(hidden_states, input_dimensions, output_attentions=output_attentions)
        return out if output_attentions else out[:1]

    attention_branch = SwinLayer.attention_branch

    def feed_forward_branch(self, x: Tensor) -> Tensor:
        return self.chain(x, self.parts[1])


class Swinv2Layer(_Windows):
    """Swin v2 and Swin2SR: norms after the branches, drop paths on both."""

    forms = ("462a19888d07",)
    parts = (("attention", "layernorm_before"), ("intermediate", "output", "layernorm_after"))
    drops = ("drop_path", "drop_path")

    def residrop_forward(
        self: Any, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: bool | None = False
    ) -> tuple[Any, ...]:
        out = self.windowed(hidden_states, input_dimensions, output_attentions=output_attentions)
        return out if output_attentions else out[:1]

    def attention_branch(self: Any, x: Tensor, size: tuple[int, int], seen: list[Any], **kwargs: Any) -> Tensor:
        return self.layernorm_before(self.attended(x, size, seen, **kwargs))

    def feed_forward_branch(self, x: Tensor) -> Tensor:
        return self.chain(x, self.parts[1])


class ConvNextLayer(Layer):
    """x + ConvNeXt's branch, channels last inside of it."""

    forms = ("a83719688833",)
    parts = (("dwconv", "layernorm", "pwconv1", "act", "pwconv2", "layer_scale_parameter"),)
    drops = ("drop_path",)

    def residrop_forward(self: Any, features: Tensor) -> Tensor:
        return self.through(0, features, self.branch)

    def branch(self: Any, x: Tensor) -> Tensor:
        convolution, *pointwise = (name for name in self.parts[0] if isinstance(getattr(self, name), nn.Module))
        x = self.chain(getattr(self, convolution)(x).permute(0, 2, 3, 1), pointwise)
        return self.scaled(x).permute(0, 3, 1, 2)

    def scaled(self: Any, x: Tensor) -> Tensor:
        return x if self.layer_scale_parameter is None else self.layer_scale_parameter * x


class ConvNextV2Layer(ConvNextLayer):
    forms = ("0f4fde8a50d1",)
    parts = (("dwconv", "layernorm", "pwconv1", "act", "grn", "pwconv2"),)

    def scaled(self, x: Tensor) -> Tensor:
        return x


class Dinov3ConvNextLayer(ConvNextLayer):
    forms = ("3d1c27912a3f",)
    parts = (("depthwise_conv", "layer_norm", "pointwise_conv1", "activation_fn", "pointwise_conv2", "gamma"),)

    def scaled(self: Any, x: Tensor) -> Tensor:
        return x * self.gamma


MIXINS = (
    ViTLayer,
    PixioLayer,
    Dinov2Layer,
    Dinov3Layer,
    CLIPLayer,
    BlipLayer,
    SwinLayer,
    DonutSwinLayer,
    Swinv2Layer,
    ConvNextLayer,
    ConvNextV2Layer,
    Dinov3ConvNextLayer,
)
