"""Blocks of timm."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from residrop.surgery.adapters import Adapter, known, sometimes
from residrop.surgery.chain import Chain, chain
from residrop.surgery.generic import GenericBlock

__all__ = ["ADAPTERS"]


class Scaled(Chain):
    """Convolutional blocks with a scale per channel, whose middle may work with channels last."""

    def residrop_mix(self: Any, x: Tensor) -> Tensor:
        if self.use_conv_mlp:
            return self.mlp(self.norm(x))
        return self.mlp(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    def residrop_gamma(self: Any, x: Tensor) -> Tensor:
        return x if self.gamma is None else x.mul(self.gamma.reshape(1, -1, 1, 1))


class Turned(Chain):
    """Blocks of which a part works on tokens instead of channels."""

    def residrop_turn(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Swin(Chain):
    """Attention on an image, Tensor[N, H, W, C]; MLP (and what follows) on its tokens."""

    def residrop_forward(self: Any, x: Tensor) -> Tensor:
        rows, height, width, channels = x.shape
        x = self.residrop_link(0, x, {}).reshape(rows, -1, channels)
        x = self.residrop_link(1, x, {})
        norm = getattr(self, "norm3", None)  # of some blocks of SwinV2-CR
        return (x if norm is None else norm(x)).reshape(rows, height, width, channels)


_METHODS = {
    "_attn": ("attn",),
    "_partition_attn": ("attn", "attn_block", "attn_grid"),
    "_shifted_window_attn": ("attn",),
    "_window_attn": ("attn",),
    "residrop_gamma": ("gamma",),
    "residrop_mix": ("norm", "mlp"),
    "residrop_turn": (),
}
# Masks of attention: [T, T] and [H, T, T] are shared, [N, 1, T, T] is not; rotary embeddings: [T, D] and [H, T, D] are
# shared, [N, H, T, D] is not.
_PER_ROW = {
    "attn_mask": 4,
    "rope": 4,
    "rope_cos": 3,
    "rope_sin": 3,
    "q_global": 1,
    "x_prev": 1,
    "shared_rel_pos_bias": 4,
    "shared_rel_pos": 4,
}


def _chain(*branches: str, **options: Any) -> type[Chain]:
    return chain(*branches, uses=_METHODS, batched=_PER_ROW, **options)


_MASK = "(attn_mask=,is_causal=)"
_ROPE = "(rope=,attn_mask=,is_causal=)"
_PRE_NORM = _chain("norm1 attn drop_path", "norm2 mlp drop_path")
_PRE_NORM_2 = _chain("norm1 attn drop_path1", "norm2 mlp drop_path2")
_WINDOWS = _chain("norm1 _partition_attn ls1 drop_path1", "norm2 mlp ls2 drop_path2")
_SELECTIVE = {"shortcut": "downsample", "post": "act"}

_CHAINS = {
    # attention and MLP
    "vision_transformer.Block": _chain(f"norm1 attn{_MASK} ls1 drop_path1", "norm2 mlp ls2 drop_path2"),
    "vision_transformer.ResPostBlock": _chain(f"attn{_MASK} norm1 drop_path1", "mlp norm2 drop_path2"),
    "vision_transformer_relpos.RelPosBlock": _chain(
        "norm1 attn(shared_rel_pos=) ls1 drop_path1", "norm2 mlp ls2 drop_path2"
    ),
    "vision_transformer_relpos.ResPostRelPosBlock": _chain(
        "attn(shared_rel_pos=) norm1 drop_path1", "mlp norm2 drop_path2"
    ),
    "beit.Block": _chain("norm1 attn(shared_rel_pos_bias=) gamma_1 drop_path1", "norm2 mlp gamma_2 drop_path2"),
    "eva.EvaBlock": _chain(f"norm1 attn{_ROPE} gamma_1 drop_path1", "norm2 mlp gamma_2 drop_path2"),
    "eva.EvaBlockPostNorm": _chain(f"attn{_ROPE} norm1 drop_path1", "mlp norm2 drop_path2"),
    "deepseek_vit.DeepseekVitBlock": _chain("norm1 attn(rope=) drop_path1", "norm2 mlp drop_path2"),
    "gemma4_vit.Gemma4Block": _chain(
        "norm1 attn(rope_cos,rope_sin,attn_mask=) norm2 drop_path", "norm3 mlp norm4 drop_path"
    ),
    "cait.LayerScaleBlock": _chain("norm1 attn gamma_1 drop_path", "norm2 mlp gamma_2 drop_path"),
    "convit.Block": _PRE_NORM,
    "nest.TransformerLayer": _PRE_NORM_2,
    "nest.TransformerLayer, earlier": _PRE_NORM,
    "volo.Outlooker": _PRE_NORM_2,
    "volo.Transformer": _PRE_NORM_2,
    "mobilevit.LinearTransformerBlock": _chain("norm1 attn(x_prev) drop_path1", "norm2 mlp drop_path2"),
    "twins.Block": _chain("norm1 attn(size) drop_path1", "norm2 mlp drop_path2"),
    "pvt_v2.Block": _chain("norm1 attn(feat_size) drop_path1", "norm2 mlp(feat_size) drop_path2"),
    "gcvit.GlobalContextVitBlock": _chain("norm1 _window_attn(q_global) ls1 drop_path1", "norm2 mlp ls2 drop_path2"),
    "focalnet.FocalNetBlock": _chain(
        "norm1 modulation norm1_post ls1 drop_path1", "norm2 mlp norm2_post ls2 drop_path2"
    ),
    "levit.LevitBlock": _chain("attn drop_path1", "mlp drop_path2"),
    "levit.LevitDownsample": _chain("mlp drop_path", before="attn_downsample"),
    "xcit.XCABlock": _chain(
        "norm1 attn gamma1 drop_path1", "norm3 local_mp(H,W) gamma3 drop_path3", "norm2 mlp gamma2 drop_path2"
    ),
    "xcit.XCABlock, earlier": _chain(
        "norm1 attn gamma1 drop_path", "norm3 local_mp(H,W) gamma3 drop_path", "norm2 mlp gamma2 drop_path"
    ),
    "maxxvit.TransformerBlock2d": _chain(
        "norm1 attn(shared_rel_pos=) ls1 drop_path1", "norm2 mlp ls2 drop_path2", shortcut=("shortcut", "")
    ),
    "maxxvit.PartitionAttentionCl": _WINDOWS,
    "maxxvit.PartitionAttention2d": _WINDOWS,
    "maxxvit.ParallelPartitionAttention": _WINDOWS,
    "swin_transformer.SwinTransformerBlock": _chain("norm1 _attn drop_path1", "norm2 mlp drop_path2", base=Swin),
    "swin_transformer_v2.SwinTransformerV2Block": _chain("_attn norm1 drop_path1", "mlp norm2 drop_path2", base=Swin),
    "swin_transformer_v2_cr.SwinTransformerV2CrBlock": _chain(
        "_shifted_window_attn norm1 drop_path1", "mlp norm2 drop_path2", base=Swin
    ),
    # mixers of tokens
    "mlp_mixer.MixerBlock": _chain(
        "norm1 residrop_turn mlp_tokens residrop_turn drop_path", "norm2 mlp_channels drop_path", base=Turned
    ),
    "mlp_mixer.ResBlock": _chain(
        "norm1 residrop_turn linear_tokens residrop_turn ls1 drop_path", "norm2 mlp_channels ls2 drop_path", base=Turned
    ),
    "mlp_mixer.SpatialGatingBlock": _chain("norm mlp_channels drop_path"),
    "sequencer.Sequencer2dBlock": _chain("norm1 rnn_tokens drop_path", "norm2 mlp_channels drop_path"),
    "metaformer.MetaFormerBlock": _chain(
        "norm1 token_mixer drop_path1 layer_scale1",
        "norm2 mlp drop_path2 layer_scale2",
        shortcut=("res_scale1", "res_scale2"),
    ),
    "efficientformer.MetaBlock1d": _chain("norm1 token_mixer ls1 drop_path1", "norm2 mlp ls2 drop_path2"),
    "efficientformer.MetaBlock1d, earlier": _chain("norm1 token_mixer ls1 drop_path", "norm2 mlp ls2 drop_path"),
    "efficientformer.MetaBlock2d": _chain("token_mixer ls1 drop_path1", "mlp ls2 drop_path2"),
    "fastvit.RepMixerBlock": _chain("mlp layer_scale drop_path", before="token_mixer"),
    "fastvit.AttentionBlock": _chain("norm token_mixer layer_scale_1 drop_path1", "mlp layer_scale_2 drop_path2"),
    # convolutions
    "convnext.ConvNeXtBlock": _chain("conv_dw residrop_mix residrop_gamma drop_path", shortcut="shortcut", base=Scaled),
    "inception_next.MetaNeXtBlock": _chain("token_mixer norm mlp residrop_gamma drop_path", base=Scaled),
    "iformer.Residual": _chain("module drop_path gamma"),
    "maxxvit.MbConvBlock": _chain(
        "pre_norm down conv1_1x1 norm1 conv2_kxk se_early norm2 se conv3_1x1 drop_path", shortcut="shortcut"
    ),
    "vitamin.MbConvLNBlock": _chain(
        "pre_norm down conv1_1x1 act1 conv2_kxk act2 conv3_1x1 drop_path", shortcut="shortcut"
    ),
    "tiny_vit.MBConv": _chain("conv1 act1 conv2 act2 conv3 drop_path", post="act3"),
    "cspnet.DarkBlock": _chain("conv1 attn conv2 drop_path"),
    "cspnet.EdgeBlock": _chain("conv1 attn conv2 drop_path"),
    "cspnet.BottleneckBlock": _chain("conv1 conv2 attn2 conv3 attn3 drop_path", post="act3"),
    "resnet.BasicBlock": _chain(
        "conv1 bn1 drop_block act1 aa conv2 bn2 se drop_path", shortcut="downsample", post="act2"
    ),
    "resnet.Bottleneck": _chain(
        "conv1 bn1 act1 conv2 bn2 drop_block act2 aa conv3 bn3 se drop_path", shortcut="downsample", post="act3"
    ),
    "resnetv2.Bottleneck": _chain("conv1 norm1 conv2 norm2 conv3 norm3 drop_path", shortcut="downsample", post="act3"),
    "sknet.SelectiveKernelBasic": _chain("conv1 conv2 se drop_path", **_SELECTIVE),
    "sknet.SelectiveKernelBottleneck": _chain("conv1 conv2 conv3 se drop_path", **_SELECTIVE),
    "tresnet.BasicBlock": _chain("conv1 conv2 se drop_path", **_SELECTIVE),
    "tresnet.Bottleneck": _chain("conv1 conv2 se conv3 drop_path", **_SELECTIVE),
}

_BYOB = {"shortcut": "shortcut", "post": "act"}
_SOMETIMES = {
    "_efficientnet_blocks.ConvBnAct": (_chain("conv bn1 aa drop_path"), "has_skip"),
    "_efficientnet_blocks.DepthwiseSeparableConv": (
        _chain("conv_s2d bn_s2d conv_dw bn1 aa se conv_pw bn2 drop_path"),
        "has_skip",
    ),
    "_efficientnet_blocks.InvertedResidual": (
        _chain("conv_s2d bn_s2d conv_pw bn1 conv_dw bn2 aa se conv_pwl bn3 drop_path"),
        "has_skip",
    ),
    "_efficientnet_blocks.EdgeResidual": (_chain("conv_exp bn1 aa se conv_pwl bn2 drop_path"), "has_skip"),
    "_efficientnet_blocks.UniversalInvertedResidual": (
        _chain("dw_start pw_exp dw_mid se pw_proj dw_end layer_scale drop_path"),
        "has_skip",
    ),
    "byobnet.BasicBlock": (_chain("conv1_kxk attn conv2_kxk attn_last drop_path", **_BYOB), "shortcut"),
    "byobnet.BasicBlock, earlier": (_chain("conv1_kxk conv2_kxk attn drop_path", **_BYOB), "shortcut"),
    "byobnet.BottleneckBlock": (
        _chain("conv1_1x1 conv2_kxk conv2b_kxk attn conv3_1x1 attn_last drop_path", **_BYOB),
        "shortcut",
    ),
    "byobnet.DarkBlock": (_chain("conv1_1x1 attn conv2_kxk attn_last drop_path", **_BYOB), "shortcut"),
    "byobnet.EdgeBlock": (_chain("conv1_kxk attn conv2_1x1 attn_last drop_path", **_BYOB), "shortcut"),
    "byobnet.SelfAttnBlock": (
        _chain("conv1_1x1 conv2_kxk self_attn post_attn conv3_1x1 drop_path", **_BYOB),
        "shortcut",
    ),
    "regnet.Bottleneck": (_chain("conv1 conv2 se conv3 drop_path", shortcut="downsample", post="act3"), "downsample"),
    "regnet.PreBottleneck": (
        _chain("conv1 norm2 conv2 se norm3 conv3 drop_path", before="norm1", shortcut="downsample"),
        "downsample",
    ),
    "cspnext.CspNextBlock": (_chain("conv1 conv2 drop_path"), "add_identity"),
    "lowformer.ResidualBlock": (_chain("main drop_path", shortcut="shortcut"), "shortcut"),
    "hgnet.HighPerfGpuBlock": (GenericBlock, "residual"),
}

# the shortcut is the input, or, where it has a projection, what the first norm makes of it
_PRE_ACTIVATION = {
    "resnetv2.PreActBasic": "conv1 norm2 conv2 drop_path",
    "resnetv2.PreActBottleneck": "conv1 norm2 conv2 norm3 conv3 drop_path",
}
# blocks that have their first branch only where an attribute is not None
_OFTEN_TWO = {
    "visformer.Block": ("attn", "norm1 attn drop_path", "norm2 mlp drop_path"),
    "efficientformer_v2.EfficientFormerV2Block": ("token_mixer", "token_mixer ls1 drop_path1", "mlp ls2 drop_path2"),
}
# a single branch over an identity shortcut, for which the generic rule is the same law
_WHOLE = (
    "vision_transformer.ParallelScalingBlock",
    "vision_transformer.DiffParallelScalingBlock",
    "mambaout.GatedConvBlock",
    "starnet.Block",
)


def _adapters() -> Iterator[Adapter]:
    prefix = "timm.models."
    for name, mixin in _CHAINS.items():
        yield known(prefix + name, mixin)
    yield from sometimes(prefix, _SOMETIMES)
    for name, steps in _PRE_ACTIVATION.items():
        yield known(prefix + name, _chain(f"norm1 {steps}"), lambda block: block.downsample is None)
        yield known(prefix + name, _chain(steps, before="norm1", shortcut="downsample"))
    for name, (attribute, *branches) in _OFTEN_TWO.items():
        yield known(prefix + name, _chain(*branches), lambda block, name=attribute: getattr(block, name) is not None)
        yield known(prefix + name, _chain(branches[1]))
    for name in _WHOLE:
        yield known(prefix + name, GenericBlock)


ADAPTERS = tuple(_adapters())
