"""One small block of every family of timm."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from block_checks import Case
from timm.layers import BatchNormAct2d, DropPath, bottleneck_attn
from timm.models import (
    _efficientnet_blocks,
    beit,
    byobnet,
    cait,
    convit,
    convnext,
    cspnet,
    efficientformer,
    efficientformer_v2,
    eva,
    fastvit,
    focalnet,
    gcvit,
    hgnet,
    inception_next,
    levit,
    mambaout,
    maxxvit,
    metaformer,
    mlp_mixer,
    mobilevit,
    nest,
    pvt_v2,
    regnet,
    resnet,
    resnetv2,
    sequencer,
    sknet,
    starnet,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    tiny_vit,
    tresnet,
    twins,
    visformer,
    vision_transformer,
    vision_transformer_relpos,
    vitamin,
    volo,
    xcit,
)
from torch import nn

D = 8
TOKENS = (4, D)  # as many tokens as rows in a batch: nothing may be told by its size
IMAGE = (D, 4, 4)
LAST = (4, 4, D)
TWO = ("drop_path1", "drop_path2")
BOTH = ("drop_path", "drop_path")
ONE = ("drop_path",)
HALF: dict[str, Any] = {"drop_path": 0.5}
RATE: dict[str, Any] = {"drop_path_rate": 0.5}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def mask(*shape: int) -> torch.Tensor:
    return torch.where(torch.rand(*shape) < 0.3, -torch.inf, 0.0).double().index_fill(-1, torch.tensor([0]), 0.0)


def _block(kind: type[nn.Module], **options: Any) -> Any:
    return partial(kind, D, 2, **HALF, **options)


def _down(stride: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(D, width, 1, stride, bias=False), nn.BatchNorm2d(width))


VIT = _block(vision_transformer.Block, init_values=0.1)
ROPE = (4 - 1, 2 * (D // 2))  # of all tokens but the first

ATTENTION = {
    "vit": Case(VIT, TOKENS, TWO),
    "vit, no scale": Case(_block(vision_transformer.Block), TOKENS, TWO),
    "vit, mask of tokens": Case(VIT, TOKENS, TWO, {"attn_mask": lambda n: mask(4, 4)}),
    "vit, mask of heads": Case(VIT, TOKENS, TWO, {"attn_mask": lambda n: mask(2, 4, 4)}),
    "vit, mask of rows": Case(VIT, TOKENS, TWO, {"attn_mask": lambda n: mask(n, 1, 4, 4)}),
    "vit, one mask": Case(VIT, TOKENS, TWO, {"attn_mask": lambda n: mask(1, 1, 4, 4)}),
    "vit, causal": Case(VIT, TOKENS, TWO, {"is_causal": lambda n: True}),
    "vit, post": Case(_block(vision_transformer.ResPostBlock), TOKENS, TWO),
    "vit, parallel": Case(_block(vision_transformer.ParallelScalingBlock), TOKENS, ONE, exact=False),
    "vit, parallel, mask": Case(
        _block(vision_transformer.ParallelScalingBlock),
        (5, D),
        ONE,
        {"attn_mask": lambda n: mask(n, 1, 5, 5)},
        exact=False,
    ),
    "relpos": Case(
        _block(vision_transformer_relpos.RelPosBlock, init_values=0.1),
        TOKENS,
        TWO,
        {"shared_rel_pos": lambda n: random(1, 2, 4, 4)},
    ),
    "relpos, post": Case(_block(vision_transformer_relpos.ResPostRelPosBlock), TOKENS, TWO),
    "beit": Case(_block(beit.Block, init_values=0.1), TOKENS, TWO, {"shared_rel_pos_bias": lambda n: random(2, 4, 4)}),
    "beit, no scale": Case(_block(beit.Block), TOKENS, TWO),
    "eva": Case(_block(eva.EvaBlock, init_values=0.1), TOKENS, TWO, {"rope": lambda n: random(*ROPE)}),
    "eva, rope of rows": Case(
        _block(eva.EvaBlock),
        TOKENS,
        TWO,
        {"rope": lambda n: random(n, 1, *ROPE), "attn_mask": lambda n: mask(n, 1, 1, 4)},
    ),
    "eva, post": Case(_block(eva.EvaBlockPostNorm), TOKENS, TWO, {"rope": lambda n: random(2, *ROPE)}),
    "cait": Case(_block(cait.LayerScaleBlock), TOKENS, BOTH),
    "convit": Case(_block(convit.Block), TOKENS, BOTH),
    "nest": Case(_block(nest.TransformerLayer), (2, *TOKENS), TWO),
    "outlooker": Case(partial(volo.Outlooker, D, 3, 1, **HALF), LAST, TWO),
    "volo": Case(_block(volo.Transformer), LAST, TWO),
    "mobilevit v2": Case(partial(mobilevit.LinearTransformerBlock, D, **HALF), IMAGE, TWO),
    "twins": Case(_block(twins.Block, ws=2), (16, D), TWO, {"size": lambda n: (4, 4)}),
    "pvt": Case(_block(pvt_v2.Block), (16, D), TWO, {"feat_size": lambda n: (4, 4)}),
    "gcvit": Case(
        partial(gcvit.GlobalContextVitBlock, D, (4, 4), 2, window_size=(2, 2), layer_scale=0.1, **HALF),
        LAST,
        TWO,
        {"q_global": lambda n: random(n, 4, D)},
    ),
    "focalnet": Case(partial(focalnet.FocalNetBlock, D, **HALF), IMAGE, TWO),
    "levit": Case(partial(levit.LevitBlock, D, 4, 2, resolution=(4, 4), **HALF), (16, D), TWO),
    "levit, down": Case(partial(levit.LevitDownsample, D, 12, 4, 2, resolution=(4, 4), **HALF), (16, D), ONE),
    "xcit": Case(
        _block(xcit.XCABlock),
        (16, D),
        ("drop_path1", "drop_path3", "drop_path2"),
        {"H": lambda n: 4, "W": lambda n: 4},
    ),
    "coatnet": Case(
        partial(maxxvit.TransformerBlock2d, D, D, cfg=maxxvit.MaxxVitTransformerCfg(dim_head=4), **HALF), IMAGE, TWO
    ),
    "coatnet, down": Case(
        partial(maxxvit.TransformerBlock2d, D, 16, 2, cfg=maxxvit.MaxxVitTransformerCfg(dim_head=4), **HALF), IMAGE, TWO
    ),
    "swin": Case(
        partial(swin_transformer.SwinTransformerBlock, D, (4, 4), 2, window_size=2, shift_size=1, **HALF), LAST, TWO
    ),
    "swin v2": Case(
        partial(swin_transformer_v2.SwinTransformerV2Block, D, (4, 4), 2, window_size=2, shift_size=1, **HALF),
        LAST,
        TWO,
    ),
    "swin v2 cr": Case(
        partial(swin_transformer_v2_cr.SwinTransformerV2CrBlock, D, 2, (4, 4), (2, 2), (1, 1), extra_norm=True, **HALF),
        LAST,
        TWO,
    ),
    "visformer": Case(partial(visformer.Block, D, 2, group=2, **HALF), IMAGE, BOTH),
    "visformer, no attention": Case(partial(visformer.Block, D, 2, group=2, attn_disabled=True, **HALF), IMAGE, ONE),
}
WINDOWS = {
    name: Case(
        partial(kind, D, cfg=maxxvit.MaxxVitTransformerCfg(dim_head=4, window_size=(2, 2), grid_size=(2, 2)), **HALF),
        shape,
        TWO,
    )
    for name, kind, shape in (
        ("maxvit", maxxvit.PartitionAttentionCl, LAST),
        ("maxvit 2d", maxxvit.PartitionAttention2d, IMAGE),
        ("maxvit, parallel", maxxvit.ParallelPartitionAttention, LAST),
    )
}
MIXERS = {
    "mixer": Case(partial(mlp_mixer.MixerBlock, D, 4, **HALF), TOKENS, BOTH),
    "resmlp": Case(partial(mlp_mixer.ResBlock, D, 4, **HALF), TOKENS, BOTH),
    "gmlp": Case(partial(mlp_mixer.SpatialGatingBlock, D, 4, **HALF), TOKENS, ONE),
    "sequencer": Case(partial(sequencer.Sequencer2dBlock, D, 4, **HALF), LAST, BOTH),
    "poolformer": Case(
        partial(metaformer.MetaFormerBlock, D, layer_scale_init_value=0.1, res_scale_init_value=1.0, **HALF),
        IMAGE,
        TWO,
        exact=False,
        last=("layer_scale1", "layer_scale2"),
    ),
    "caformer": Case(
        partial(
            metaformer.MetaFormerBlock,
            D,
            token_mixer=metaformer.Attention,
            use_nchw=False,
            norm_layer=nn.LayerNorm,
            head_dim=4,
            **HALF,
        ),
        TOKENS,
        TWO,
        exact=False,
    ),
    "efficientformer 1d": Case(partial(efficientformer.MetaBlock1d, D, **HALF), (49, D), TWO),
    "efficientformer 2d": Case(partial(efficientformer.MetaBlock2d, D, **HALF), IMAGE, TWO),
    "efficientformer v2": Case(
        partial(efficientformer_v2.EfficientFormerV2Block, D, resolution=(4, 4), **HALF), IMAGE, TWO
    ),
    "efficientformer v2, no attention": Case(
        partial(efficientformer_v2.EfficientFormerV2Block, D, use_attn=False, **HALF), IMAGE, ("drop_path2",)
    ),
    "fastvit": Case(partial(fastvit.RepMixerBlock, D, **HALF), IMAGE, ("token_mixer.layer_scale", *ONE)),
    "fastvit, attention": Case(partial(fastvit.AttentionBlock, 32, **HALF), (32, 4, 4), TWO),
    "mambaout": Case(partial(mambaout.GatedConvBlock, D, **HALF), LAST, ONE, exact=False),
    "starnet": Case(partial(starnet.Block, D, drop_path=0.5), IMAGE, ONE, exact=False),
}

CONVOLUTIONS = {
    "convnext": Case(partial(convnext.ConvNeXtBlock, D, **HALF), IMAGE, ONE),
    "convnext, conv mlp": Case(
        partial(convnext.ConvNeXtBlock, D, conv_mlp=True, ls_init_value=None, **HALF), IMAGE, ONE
    ),
    "convnext, down": Case(partial(convnext.ConvNeXtBlock, D, 16, stride=2, **HALF), IMAGE, ONE),
    "inception next": Case(partial(inception_next.MetaNeXtBlock, 16, **HALF), (16, 4, 4), ONE),
    "coatnet mbconv": Case(partial(maxxvit.MbConvBlock, D, D, **HALF), IMAGE, ONE),
    "coatnet mbconv, down": Case(partial(maxxvit.MbConvBlock, D, 12, 2, **HALF), IMAGE, ONE),
    "vitamin": Case(partial(vitamin.MbConvLNBlock, D, D, **HALF), IMAGE, ONE),
    "vitamin, down": Case(partial(vitamin.MbConvLNBlock, D, 12, 2, **HALF), IMAGE, ONE),
    "tinyvit": Case(partial(tiny_vit.MBConv, D, D, 2.0, nn.GELU, 0.5), IMAGE, ONE),
    "darknet": Case(partial(cspnet.DarkBlock, D, D, **HALF), IMAGE, ONE),
    "cs3 edge": Case(partial(cspnet.EdgeBlock, D, D, **HALF), IMAGE, ONE),
    "csp bottleneck": Case(partial(cspnet.BottleneckBlock, D, D, **HALF), IMAGE, ONE),
    "hgnet": Case(partial(hgnet.HighPerfGpuBlock, D, 4, D, 2, residual=True, **HALF), IMAGE, ONE, exact=False),
    "resnet": Case(lambda: resnet.BasicBlock(D, D, drop_path=DropPath(0.5)), IMAGE, ONE, signed=False),
    "resnet, signed": Case(lambda: resnet.BasicBlock(D, D, drop_path=DropPath(0.5)), IMAGE, ONE),
    "resnet, tanh": Case(
        lambda: resnet.BasicBlock(D, D, drop_path=DropPath(0.5), act_layer=lambda inplace: nn.LeakyReLU(0.1, True)),
        IMAGE,
        ONE,
    ),
    "resnet, down": Case(
        lambda: resnet.BasicBlock(D, 12, 2, _down(2, 12), attn_layer=None, drop_path=DropPath(0.5)), IMAGE, ONE
    ),
    "resnet 50": Case(lambda: resnet.Bottleneck(D, 2, drop_path=DropPath(0.5)), IMAGE, ONE),
    "resnet 50, squeeze": Case(
        lambda: resnet.Bottleneck(D, 2, attn_layer="se", aa_layer="avg", drop_path=DropPath(0.5)), IMAGE, ONE
    ),
    "resnet 50, down": Case(lambda: resnet.Bottleneck(D, 3, 2, _down(2, 12), drop_path=DropPath(0.5)), IMAGE, ONE),
    "resnet v2": Case(partial(resnetv2.PreActBottleneck, D, D, norm_layer=BatchNormAct2d, **RATE), IMAGE, ONE),
    "resnet v2, down": Case(
        partial(
            resnetv2.PreActBottleneck,
            D,
            12,
            stride=2,
            norm_layer=BatchNormAct2d,
            proj_layer=resnetv2.DownsampleConv,
            **RATE,
        ),
        IMAGE,
        ONE,
    ),
    "resnet v2, basic": Case(partial(resnetv2.PreActBasic, D, D, norm_layer=BatchNormAct2d, **RATE), IMAGE, ONE),
    "resnet v2, basic, down": Case(
        partial(
            resnetv2.PreActBasic, D, 12, stride=2, norm_layer=BatchNormAct2d, proj_layer=resnetv2.DownsampleConv, **RATE
        ),
        IMAGE,
        ONE,
    ),
    "resnet v2, post": Case(
        partial(resnetv2.Bottleneck, D, D, act_layer=nn.ReLU, norm_layer=BatchNormAct2d, **RATE), IMAGE, ONE
    ),
    "sknet": Case(lambda: sknet.SelectiveKernelBasic(D, D, drop_path=DropPath(0.5)), IMAGE, ONE),
    "sknet 50": Case(lambda: sknet.SelectiveKernelBottleneck(D, 2, drop_path=DropPath(0.5)), IMAGE, ONE),
    "tresnet": Case(partial(tresnet.BasicBlock, D, D, **RATE), IMAGE, ONE),
    "tresnet 50": Case(partial(tresnet.Bottleneck, D, 2, act_layer="leaky_relu", **RATE), IMAGE, ONE),
    "efficientnet, conv": Case(partial(_efficientnet_blocks.ConvBnAct, D, D, 3, skip=True, **RATE), IMAGE, ONE),
    "efficientnet, separable": Case(partial(_efficientnet_blocks.DepthwiseSeparableConv, D, D, **RATE), IMAGE, ONE),
    "efficientnet, mbconv": Case(
        partial(
            _efficientnet_blocks.InvertedResidual,
            D,
            D,
            exp_ratio=2.0,
            se_layer=_efficientnet_blocks.SqueezeExcite,
            **RATE,
        ),
        IMAGE,
        ONE,
    ),
    "efficientnet, fused": Case(partial(_efficientnet_blocks.EdgeResidual, D, D, exp_ratio=2.0, **RATE), IMAGE, ONE),
    "mobilenet v4": Case(
        partial(_efficientnet_blocks.UniversalInvertedResidual, D, D, 3, exp_ratio=2.0, **RATE), IMAGE, ONE
    ),
    "byob": Case(partial(byobnet.BasicBlock, D, D, **RATE), IMAGE, ONE),
    "byob, down": Case(partial(byobnet.BasicBlock, D, 12, stride=2, **RATE), IMAGE, ONE),
    "byob, bottleneck": Case(partial(byobnet.BottleneckBlock, D, D, bottle_ratio=0.5, **RATE), IMAGE, ONE),
    "byob, dark": Case(partial(byobnet.DarkBlock, D, D, **RATE), IMAGE, ONE),
    "byob, edge": Case(partial(byobnet.EdgeBlock, D, D, **RATE), IMAGE, ONE),
    "byob, attention": Case(
        partial(
            byobnet.SelfAttnBlock,
            D,
            D,
            feat_size=(4, 4),
            layers=byobnet.LayerFn(self_attn=bottleneck_attn.BottleneckAttn),
            **RATE,
        ),
        IMAGE,
        ONE,
    ),
    "regnet": Case(partial(regnet.Bottleneck, D, D, **RATE), IMAGE, ONE),
    "regnet, down": Case(partial(regnet.Bottleneck, D, 12, stride=2, **RATE), IMAGE, ONE),
    "regnet z": Case(partial(regnet.PreBottleneck, D, D, **RATE), IMAGE, ONE),
}

# of classes that timm 1.0.20 lacks: module, class, and the case made of it
_LATER: dict[str, tuple[str, str, Callable[[Any], Case]]] = {
    "vit, differential": (
        "vision_transformer",
        "DiffParallelScalingBlock",
        lambda kind: Case(_block(kind), TOKENS, ONE, exact=False),
    ),
    "deepseek": (
        "deepseek_vit",
        "DeepseekVitBlock",
        lambda kind: Case(_block(kind), TOKENS, TWO, {"rope": lambda n: random(4, D)}, digits=4),
    ),
    "gemma4": (
        "gemma4_vit",
        "Gemma4Block",
        lambda kind: Case(
            partial(kind, D, 2, 4, 16, **HALF),
            TOKENS,
            BOTH,
            {name: lambda n: random(n, 4, 4) for name in ("rope_cos", "rope_sin")},
        ),
    ),
    "iformer": (
        "iformer",
        "Residual",
        lambda kind: Case(lambda: kind(nn.Conv2d(D, D, 3, padding=1), 0.5, 0.1, D), IMAGE, ONE, exact=False),
    ),
    "cspnext": ("cspnext", "CspNextBlock", lambda kind: Case(partial(kind, D, D, **HALF), IMAGE, ONE)),
    "lowformer": (
        "lowformer",
        "ResidualBlock",
        lambda kind: Case(lambda: kind(nn.Conv2d(D, D, 3, padding=1), nn.Identity(), 0.5), IMAGE, ONE),
    ),
}


def _later() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for name, (module, kind, case) in _LATER.items():
        try:
            found[name] = case(getattr(import_module(f"timm.models.{module}"), kind))
        except (ImportError, AttributeError):
            continue
    return found


CASES = {**ATTENTION, **WINDOWS, **MIXERS, **CONVOLUTIONS, **_later()}
if "is_causal" not in signature(vision_transformer.Block.forward).parameters:
    # timm 1.0.20 has no such argument, takes no float64 in ConViT, gives windows of GC ViT queries of other rows, and
    # keeps the graph of attention biases in eval mode
    faulty = ("convit", "gcvit", "levit", "levit, down", "efficientformer 1d", "efficientformer v2")
    for name in ("vit, causal", *faulty):
        del CASES[name]
