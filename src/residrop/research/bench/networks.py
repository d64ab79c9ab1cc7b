"""The networks that benchmarks run, by name: ours, torchvision's ResNets, timm's ViTs, and those of `found`."""

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from residrop.blocks.attach import attach
from residrop.blocks.residual import Residual
from residrop.common.errors import ConfigError
from residrop.engines.compiling import compile_branches
from residrop.models import create, list_models, reads_flat_rows
from residrop.research.bench.base import CLASSES, Chain, MakeRule, Map, Network, Unit, sharing
from residrop.research.bench.found import FOUND
from residrop.schedule.survival import parse

__all__ = ["has_timm", "network"]


class _Own(Network):
    """A network of `residrop.create`."""

    pixels = 32
    batch_size = 64
    rescale = "test"

    def __init__(self, name: str, pixels: int | None = None) -> None:
        known, _, block = name.partition("/")
        if reads_flat_rows(known):
            raise ConfigError(f"{name!r} reads no images; choose another network")
        options: dict[str, Any] = {"block": block} if block else {}
        if known.startswith("imagenet"):
            self.pixels, self.batch_size = 64, 32
        self.pixels = pixels or self.pixels
        super().__init__(name, create(known, classes=CLASSES, **options))

    def blocks_of(self, model: Any) -> list[Any]:
        return [block for block in model.blocks if isinstance(block, Residual)]

    def end(self, block: Any, make: Callable[[], nn.Module]) -> None:
        block.branch = nn.Sequential(block.branch, make())

    def under(self, make: MakeRule, survival: str) -> nn.Module:
        model = sharing(self.model)
        blocks = self.blocks_of(model)
        for block, rate in zip(blocks, parse(survival, len(blocks)), strict=True):
            block.rule = make(rate)
        attach(model)
        return model

    def compile_blocks(self, model: nn.Module) -> None:
        compile_branches(model)  # at constant depth that is the block as a whole

    def chain(self, compiled: bool = False) -> Chain:
        units = [
            Unit(child, _without_branch(child)) if isinstance(child, Residual) else Unit(child, child, droppable=False)
            for child in self.model.blocks
        ]
        return Chain(self.model.stem, units, self.model.tail)


def _without_branch(block: Residual) -> Map | None:
    shortcut, post = block.shortcut, block.post
    if block.settled or isinstance(post, nn.Identity):
        return None if isinstance(shortcut, nn.Identity) else shortcut
    return lambda x: post(shortcut(x))


class _ResNet(Network):
    """A ResNet of torchvision."""

    def __init__(self, name: str, pixels: int | None = None) -> None:
        self.pixels = pixels or self.pixels
        short = name.removeprefix("torchvision/")
        try:
            with torch.device("meta"):
                kind = type(torchvision.models.get_model(short))
        except ValueError:
            raise ConfigError(f"torchvision knows no model {short!r}; {_KNOWN}") from None
        if kind is not torchvision.models.ResNet:
            raise ConfigError(f"{name!r} is no ResNet; {_KNOWN}")
        super().__init__(name, torchvision.models.get_model(short, num_classes=CLASSES))

    def blocks_of(self, model: Any) -> list[Any]:
        return [*model.layer1, *model.layer2, *model.layer3, *model.layer4]

    def end(self, block: Any, make: Callable[[], nn.Module]) -> None:
        last = "bn3" if hasattr(block, "bn3") else "bn2"
        setattr(block, last, nn.Sequential(getattr(block, last), make()))

    def chain(self, compiled: bool = False) -> Chain:
        model = self.model
        stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
        units = [Unit(block, _projection(block)) for block in self.blocks_of(model)]
        return Chain(stem, units, nn.Sequential(model.avgpool, nn.Flatten(), model.fc))


def _projection(block: Any) -> Map | None:
    """What is left of a block without its branch: relu(x) is x, since x left a ReLU."""
    return None if block.downsample is None else lambda x: block.relu(block.downsample(x))


class _ViT(Network):
    """A vision transformer of timm, whose blocks have two branches each."""

    convolutional = False

    def __init__(self, name: str, pixels: int | None = None) -> None:
        self.pixels = pixels or self.pixels
        if not has_timm():
            raise ConfigError(f"{name!r} needs timm, which is not installed: python -m pip install timm")
        import timm

        short = name.removeprefix("timm/")
        if not timm.is_model(short):
            raise ConfigError(f"timm knows no model {short!r}; {_KNOWN}")
        with torch.device("meta"):
            kind = type(timm.create_model(short))
        if kind is not timm.models.VisionTransformer:
            raise ConfigError(f"{name!r} is no plain vision transformer; {_KNOWN}")
        super().__init__(name, timm.create_model(short, num_classes=CLASSES, img_size=self.pixels))

    def blocks_of(self, model: Any) -> list[Any]:
        return list(model.blocks)

    def end(self, block: Any, make: Callable[[], nn.Module]) -> None:
        block.drop_path1, block.drop_path2 = make(), make()

    def chain(self, compiled: bool = False) -> Chain:
        model = self.model
        halves = [half for block in model.blocks for half in (_Attention(block), _FeedForward(block))]
        if compiled:
            for half in halves:
                half.compile()
        return Chain(self._stem, [Unit(half) for half in halves], lambda x: model.forward_head(model.norm(x)))

    def _stem(self, x: Tensor) -> Tensor:
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))


class _Attention(nn.Module):
    """The first half of a block of timm."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        return x + block.ls1(block.attn(block.norm1(x)))


class _FeedForward(_Attention):
    """The second half."""

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        return x + block.ls2(block.mlp(block.norm2(x)))


_KNOWN = (
    "networks are named as in residrop recipes --networks (resnet-56; resnet-56/v2 for pre-activation), or "
    "torchvision/resnet50, or timm/vit_small_patch16_224, or one of " + ", ".join(FOUND)
)


def has_timm() -> bool:
    """Whether timm is installed."""
    try:
        import timm  # noqa: F401
    except ImportError:
        return False
    return True


def network(name: str, pixels: int | None = None) -> Network:
    """A network by name: one of `residrop.list_models()`, "torchvision/RESNET", "timm/VIT" or one of `FOUND`.

    "/v2" after one of ours chooses pre-activation blocks.

    Args:
        name: of the network.
        pixels: height and width of its images; None is 32 for ours but those of ImageNet, else 64.

    Raises:
        ConfigError: an unknown name, a model of another kind, a package that is not installed, or pixels for a network
            that reads tokens.
        MissingExtraError: the package of a network of `FOUND` is not installed.
    """
    if pixels is not None and pixels < 8:
        raise ConfigError(f"images of {pixels} pixels are too small; give at least 8")
    if name in FOUND:
        if pixels is not None and FOUND[name].pixels is None:
            raise ConfigError(f"{name} reads tokens and has no use for pixels; leave one of them out")
        return FOUND[name](name, pixels)
    if name.startswith("torchvision/"):
        return _ResNet(name, pixels)
    if name.startswith("timm/"):
        return _ViT(name, pixels)
    if "-" not in name or name.partition("/")[0].rpartition("-")[0] not in {
        m.rpartition("-")[0] for m in list_models()
    }:
        raise ConfigError(f"network {name!r} is unknown; {_KNOWN}")
    return _Own(name, pixels)
