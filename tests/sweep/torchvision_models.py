"""One model of every family of torchvision."""

import torch
from torch import nn

from sweep.sources import ROWS, Built, NotBuilt

# by name: side of the images, options
_MODELS = {
    "alexnet": (64, {}),
    "convnext_tiny": (32, {"stochastic_depth_prob": 0.1}),
    "densenet121": (32, {}),
    "efficientnet_b0": (32, {"stochastic_depth_prob": 0.2}),
    "efficientnet_v2_s": (32, {"stochastic_depth_prob": 0.2}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "inception_v3": (96, {"aux_logits": False, "init_weights": False}),
    "maxvit_t": (64, None),
    "mnasnet0_5": (32, {}),
    "mobilenet_v2": (32, {"width_mult": 0.25}),
    "mobilenet_v3_small": (32, {}),
    "mobilenet_v3_large": (32, {}),
    "regnet_x_400mf": (32, {}),
    "regnet_y_400mf": (32, {}),
    "resnet18": (32, {"width_per_group": 64}),
    "resnet50": (32, {}),
    "resnext50_32x4d": (32, {}),
    "wide_resnet50_2": (32, {}),
    "shufflenet_v2_x0_5": (32, {}),
    "squeezenet1_1": (32, {}),
    "swin_t": (32, None),
    "swin_v2_t": (32, None),
    "vgg11_bn": (32, {}),
    "vit_b_16": (32, None),
    "mc3_18": (16, {}),
    "mvit_v1_b": (32, None),
    "mvit_v2_s": (32, None),
    "r2plus1d_18": (16, {}),
    "r3d_18": (16, {}),
    "s3d": (32, {}),
    "swin3d_t": (32, None),
    "deeplabv3_mobilenet_v3_large": (32, {"weights_backbone": None, "num_classes": 5}),
    "lraspp_mobilenet_v3_large": (32, {"weights_backbone": None, "num_classes": 5}),
    "fcn_resnet50": (32, {"weights_backbone": None, "num_classes": 5}),
    "resnet18 + fpn": (32, None),
    "raft_small": (128, {}),
}
_VIDEO = {"mc3_18", "r2plus1d_18", "r3d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_t"}


def names() -> list[str]:
    return list(_MODELS)


def build(name: str) -> Built:
    import torchvision.models as models

    side, options = _MODELS[name]
    x = torch.randn(ROWS, 3, side, side)
    if name in _VIDEO:
        frames = {"s3d": 16, "mvit_v1_b": 4, "mvit_v2_s": 4, "swin3d_t": 4}.get(name, 4)
        x = torch.randn(ROWS, 3, frames, side, side)
    if options is not None:
        model = models.get_model(name, weights=None, **({"num_classes": 7} | options))
    else:
        model = _small(name, side, models)
    args = (x, x.flip(0)) if name == "raft_small" else (x,)
    return Built(model, args, family=name.partition("_")[0].rstrip("0123456789"))


def _small(name: str, side: int, models: object) -> nn.Module:
    if name == "maxvit_t":
        return models.maxvit.MaxVit((side, side), 16, 8, [16, 32], [2, 2], 8, stochastic_depth_prob=0.2, num_classes=7)
    if name in ("swin_t", "swin_v2_t"):
        swin = models.swin_transformer
        block = swin.SwinTransformerBlockV2 if "v2" in name else swin.SwinTransformerBlock
        merging = swin.PatchMergingV2 if "v2" in name else swin.PatchMerging
        return swin.SwinTransformer(
            [4, 4],
            16,
            [2, 2],
            [1, 2],
            [4, 4],
            stochastic_depth_prob=0.2,
            num_classes=7,
            block=block,
            downsample_layer=merging,
        )
    if name == "vit_b_16":
        return models.vision_transformer.VisionTransformer(side, 8, 4, 2, 32, 48, num_classes=7)
    if name == "resnet18 + fpn":
        return models.detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    if name.startswith("mvit"):
        setting = models.video.mvit.MSBlockConfig
        two = name == "mvit_v2_s"
        blocks = [
            setting(1, 16, 32 if two else 16, [3, 3, 3], [], [1, 4, 4], [1, 1, 1]),
            setting(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
            setting(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 1, 1]),
        ]
        if not two:
            blocks[0] = setting(1, 16, 32, [3, 3, 3], [], [1, 4, 4], [1, 1, 1])
        return models.video.mvit.MViT(
            (side, side),
            4,
            blocks,
            residual_pool=two,
            residual_with_cls_embed=not two,
            rel_pos_embed=two,
            proj_after_attn=two,
            stochastic_depth_prob=0.2,
            num_classes=7,
        )
    if name == "swin3d_t":
        return models.video.swin_transformer.SwinTransformer3d(
            [2, 4, 4], 16, [2, 2], [2, 4], [2, 7, 7], stochastic_depth_prob=0.2, num_classes=7
        )
    raise NotBuilt("no small one is known")
