"""One small block of every family of torchvision."""

from functools import partial

from block_checks import Case
from torch import nn
from torchvision.models import (
    convnext,
    efficientnet,
    maxvit,
    mnasnet,
    mobilenetv2,
    mobilenetv3,
    regnet,
    resnet,
    swin_transformer,
    vision_transformer,
)
from torchvision.models.video import resnet as video

D = 8
IMAGE = (D, 4, 4)
LAST = (4, 4, D)
ONE = ("stochastic_depth",)
TWO = ("stochastic_depth", "stochastic_depth")
DROPOUT = ("stochastic_dropout", "stochastic_dropout")


def _down(kind: type[nn.Module], norm: type[nn.Module]) -> nn.Module:
    return nn.Sequential(kind(D, 12, 1, 2, bias=False), norm(12))


_down_2d = partial(_down, nn.Conv2d, nn.BatchNorm2d)
_down_3d = partial(_down, nn.Conv3d, nn.BatchNorm3d)


def _regnet(width: int, stride: int) -> nn.Module:
    return regnet.ResBottleneckBlock(D, width, stride, nn.BatchNorm2d, nn.ReLU, 4, se_ratio=0.25)


def _partition(kind: str) -> nn.Module:
    return maxvit.PartitionAttentionLayer(D, 4, 2, kind, (4, 4), 2, nn.GELU, nn.LayerNorm, 0.0, 0.0, 0.5)


def _mbconv(width: int, stride: int) -> nn.Module:
    return maxvit.MBConv(D, width, 2.0, 0.5, stride, nn.GELU, nn.BatchNorm2d, 0.5)


def _residual_conv3() -> nn.Module:
    config = mobilenetv3.InvertedResidualConfig(D, 3, 16, D, True, "RE", 1, 1, 1.0)
    return mobilenetv3.InvertedResidual(config, nn.BatchNorm2d)


CASES = {
    "resnet": Case(lambda: resnet.BasicBlock(D, D), IMAGE, ("bn2",), signed=False),
    "resnet, signed": Case(lambda: resnet.BasicBlock(D, D), IMAGE, ("bn2",)),
    "resnet, down": Case(lambda: resnet.BasicBlock(D, 12, 2, _down_2d()), IMAGE, ("bn2",)),
    "resnet 50": Case(lambda: resnet.Bottleneck(D, 2), IMAGE, ("bn3",)),
    "resnet 50, down": Case(lambda: resnet.Bottleneck(D, 3, 2, _down_2d()), IMAGE, ("bn3",)),
    "r3d": Case(lambda: video.BasicBlock(D, D, video.Conv3DSimple), (D, 2, 4, 4), ("conv2",)),
    "r2plus1d, down": Case(lambda: video.BasicBlock(D, 12, video.Conv2Plus1D, 2, _down_3d()), (D, 2, 4, 4), ("conv2",)),
    "r3d 50": Case(lambda: video.Bottleneck(D, 2, video.Conv3DSimple), (D, 2, 4, 4), ("conv3",)),
    "regnet": Case(partial(_regnet, D, 1), IMAGE, ("f",)),
    "regnet, down": Case(partial(_regnet, 12, 2), IMAGE, ("f",)),
    "convnext": Case(lambda: convnext.CNBlock(D, 0.1, 0.5), IMAGE, ONE),
    "maxvit, mbconv": Case(partial(_mbconv, D, 1), IMAGE, ONE),
    "maxvit, mbconv, down": Case(partial(_mbconv, 12, 2), IMAGE, ONE),
    "maxvit, windows": Case(partial(_partition, "window"), IMAGE, DROPOUT),
    "maxvit, grid": Case(partial(_partition, "grid"), IMAGE, DROPOUT),
    "swin": Case(
        lambda: swin_transformer.SwinTransformerBlock(D, 2, [2, 2], [1, 1], stochastic_depth_prob=0.5), LAST, TWO
    ),
    "swin v2": Case(
        lambda: swin_transformer.SwinTransformerBlockV2(D, 2, [2, 2], [1, 1], stochastic_depth_prob=0.5), LAST, TWO
    ),
    "vit": Case(lambda: vision_transformer.EncoderBlock(2, D, 16, 0.0, 0.0), (4, D), ("dropout", "mlp")),
    "efficientnet": Case(
        lambda: efficientnet.MBConv(efficientnet.MBConvConfig(2, 3, 1, D, D, 1), 0.5, nn.BatchNorm2d), IMAGE, ONE
    ),
    "efficientnet v2": Case(
        lambda: efficientnet.FusedMBConv(efficientnet.FusedMBConvConfig(2, 3, 1, D, D, 1), 0.5, nn.BatchNorm2d),
        IMAGE,
        ONE,
    ),
    "mobilenet v2": Case(lambda: mobilenetv2.InvertedResidual(D, D, 1, 2), IMAGE, ("conv",)),
    "mobilenet v3": Case(_residual_conv3, IMAGE, ("block",)),
    "mnasnet": Case(lambda: mnasnet._InvertedResidual(D, D, 3, 1, 2), IMAGE, ("layers",)),
}
