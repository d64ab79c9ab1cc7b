"""The networks that benchmarks run: ours, torchvision's ResNets and timm's ViTs, each in every form to be compared.

All forms of a network share one set of parameters, so that they compute the same and memory holds them once.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from residrop.blocks.attach import attach
from residrop.blocks.residual import Residual
from residrop.common.errors import ConfigError
from residrop.engines.compiling import compile_branches
from residrop.models import create, list_models, reads_flat_rows
from residrop.rules.base import Rule
from residrop.schedule.survival import parse
from residrop.surgery import apply

__all__ = ["Chain", "Network", "Unit", "has_timm", "network"]

Map = Callable[[Tensor], Tensor]
MakeRule = Callable[[float], Rule]
MakeMask = Callable[[float], nn.Module]
CLASSES = 100


class Unit(NamedTuple):
    """A piece of a network with one branch, or with none.

    Attributes:
        present: what it computes with its branch.
        absent: what it computes without (None: nothing, its input goes on).
        droppable: whether it has a branch, and so a place in the plan.
    """

    present: Map
    absent: Map | None = None
    droppable: bool = True


class Chain(NamedTuple):
    """A plain network taken apart: head(units(stem(x))), with one droppable unit per branch, from input to output."""

    stem: Map
    units: Sequence[Unit]
    head: Map


class Network(ABC):
    """A network of constant depth, and how its other forms are made.

    Attributes:
        name: as the user gave it.
        model: the network of constant depth, in training mode.
        pixels: height and width of its images.
        batch_size: default number of images in a step.
        rescale: who scales branches by default: "test" in our own networks, "train" in foreign ones.
        convolutional: whether a memory format means something to it.
    """

    pixels = 64
    batch_size = 32
    rescale = "train"
    convolutional = True

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name = name
        self.model: Any = model.train()

    @abstractmethod
    def chain(self, compiled: bool = False) -> Chain:
        """The network taken apart; `compiled` if `compile_blocks` compiled its blocks."""

    @abstractmethod
    def blocks_of(self, model: Any) -> list[Any]:
        """The residual blocks of a form of the network, from input to output."""

    @abstractmethod
    def end(self, block: Any, make: Callable[[], nn.Module]) -> None:
        """Put a module of a peer at the end of every branch of a block, where the peer has it used."""

    def masked(self, make: MakeMask, survival: str) -> nn.Module:
        """The network with a peer's module make(rate) at the end of every branch."""
        model = _sharing(self.model)
        blocks = self.blocks_of(model)
        for block, rate in zip(blocks, parse(survival, len(blocks)), strict=True):
            self.end(block, partial(make, rate))
        return model

    def under(self, make: MakeRule, survival: str) -> nn.Module:
        """The network with a rule make(rate) in every block, attached."""
        model = _sharing(self.model)
        apply(model, make, survival)
        return model

    def compile_blocks(self, model: nn.Module) -> None:
        """Compile every residual block of a form without rules, in place."""
        for block in self.blocks_of(model):
            block.compile()


def _sharing(model: nn.Module) -> Any:
    """A copy of a model's modules that has the same parameters and buffers, not copies of them."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class _Own(Network):
    """A network of `residrop.create`."""

    pixels = 32
    batch_size = 64
    rescale = "test"

    def __init__(self, name: str) -> None:
        known, _, block = name.partition("/")
        if reads_flat_rows(known):
            raise ConfigError(f"{name!r} reads no images; choose another network")
        options: dict[str, Any] = {"block": block} if block else {}
        if known.startswith("imagenet"):
            self.pixels, self.batch_size = 64, 32
        super().__init__(name, create(known, classes=CLASSES, **options))

    def blocks_of(self, model: Any) -> list[Any]:
        return [block for block in model.blocks if isinstance(block, Residual)]

    def end(self, block: Any, make: Callable[[], nn.Module]) -> None:
        block.branch = nn.Sequential(block.branch, make())

    def under(self, make: MakeRule, survival: str) -> nn.Module:
        model = _sharing(self.model)
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

    def __init__(self, name: str) -> None:
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

    def __init__(self, name: str) -> None:
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
    "torchvision/resnet50, or timm/vit_small_patch16_224"
)


def has_timm() -> bool:
    """Whether timm is installed."""
    try:
        import timm  # noqa: F401
    except ImportError:
        return False
    return True


def network(name: str) -> Network:
    """A network by name: one of `residrop.list_models()`, "torchvision/RESNET" or "timm/VIT".

    "/v2" after one of ours chooses pre-activation blocks.

    Raises:
        ConfigError: an unknown name, a model of another kind, or a package that is not installed.
    """
    if name.startswith("torchvision/"):
        return _ResNet(name)
    if name.startswith("timm/"):
        return _ViT(name)
    if "-" not in name or name.partition("/")[0].rpartition("-")[0] not in {
        m.rpartition("-")[0] for m in list_models()
    }:
        raise ConfigError(f"network {name!r} is unknown; {_KNOWN}")
    return _Own(name)
