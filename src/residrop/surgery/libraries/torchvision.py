"""Blocks of torchvision."""

from typing import Any

from torch import Tensor

from residrop.surgery.adapters import known, sometimes
from residrop.surgery.chain import Chain, chain

__all__ = ["ADAPTERS"]


class EncoderBlock(Chain):
    """Of its ViT; no drop modules of its own."""

    def residrop_attend(self: Any, x: Tensor) -> Tensor:
        x, _ = self.self_attention(x, x, x, need_weights=False)
        return x


class PartitionAttentionLayer(Chain):
    """Of MaxViT: attention and MLP on windows of the image, which are taken apart before and put together after."""

    def residrop_forward(self: Any, x: Tensor) -> Tensor:
        height, width = self.grid_size
        x = self.partition_swap(self.partition_op(x, self.p))
        x = self.residrop_link(1, self.residrop_link(0, x, {}), {})
        return self.departition_op(self.departition_swap(x), self.p, height // self.p, width // self.p)


_CHAINS = {
    "resnet.BasicBlock": chain("conv1 bn1 relu conv2 bn2", shortcut="downsample", post="relu"),
    "resnet.Bottleneck": chain("conv1 bn1 relu conv2 bn2 relu conv3 bn3", shortcut="downsample", post="relu"),
    "video.resnet.BasicBlock": chain("conv1 conv2", shortcut="downsample", post="relu"),
    "video.resnet.Bottleneck": chain("conv1 conv2 conv3", shortcut="downsample", post="relu"),
    "regnet.ResBottleneckBlock": chain("f", shortcut="proj", post="activation"),
    "convnext.CNBlock": chain("block layer_scale stochastic_depth"),
    "maxvit.MBConv": chain("layers stochastic_depth", shortcut="proj"),
    "maxvit.PartitionAttentionLayer": chain(
        "attn_layer stochastic_dropout", "mlp_layer stochastic_dropout", base=PartitionAttentionLayer
    ),
    "swin_transformer.SwinTransformerBlock": chain("norm1 attn stochastic_depth", "norm2 mlp stochastic_depth"),
    "swin_transformer.SwinTransformerBlockV2": chain("attn norm1 stochastic_depth", "mlp norm2 stochastic_depth"),
    "vision_transformer.EncoderBlock": chain(
        "ln_1 residrop_attend dropout",
        "ln_2 mlp",
        uses={"residrop_attend": ("self_attention",)},
        base=EncoderBlock,
    ),
}

# blocks that are residual only where neither stride nor width change: by which attribute
_SOMETIMES = {
    "efficientnet.MBConv": (chain("block stochastic_depth"), "use_res_connect"),
    "efficientnet.FusedMBConv": (chain("block stochastic_depth"), "use_res_connect"),
    "mobilenetv2.InvertedResidual": (chain("conv"), "use_res_connect"),
    "mobilenetv3.InvertedResidual": (chain("block"), "use_res_connect"),
    "mnasnet._InvertedResidual": (chain("layers"), "apply_residual"),
}

ADAPTERS = (
    *(known(f"torchvision.models.{name}", mixin) for name, mixin in _CHAINS.items()),
    *sometimes("torchvision.models.", _SOMETIMES),
)
