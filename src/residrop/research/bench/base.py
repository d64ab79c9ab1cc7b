"""What a network of a benchmark is: its parts, and its forms, which share one set of parameters.

So they compute the same, and memory holds the parameters once.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from residrop.rules.base import Rule
from residrop.schedule.survival import parse
from residrop.surgery import apply

__all__ = ["CLASSES", "Chain", "MakeRule", "Map", "Network", "Unit", "sharing"]

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
        whole: whether all rows go through it; only for one that is not droppable.
    """

    present: Map
    absent: Map | None = None
    droppable: bool = True
    whole: bool = False


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
        pixels: height and width of its images; None where it reads tokens.
        tokens: length of its sequences; None where it reads images.
        batch_size: default number of images or sequences in a step.
        rescale: who scales branches by default: "test" in our own networks, "train" in foreign ones.
        convolutional: whether a memory format means something to it.
    """

    pixels: int | None = 64
    tokens: int | None = None
    batch_size = 32
    rescale = "train"
    convolutional = True

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name = name
        self.model: Any = model.train()

    def inputs(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """A random batch on the CPU: Tensor[count, 3, pixels, pixels], float32, or Tensor[count, tokens], int64."""
        assert self.pixels is not None
        return torch.randn(count, 3, self.pixels, self.pixels, generator=generator)

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
        model = sharing(self.model)
        blocks = self.blocks_of(model)
        for block, rate in zip(blocks, parse(survival, len(blocks)), strict=True):
            self.end(block, partial(make, rate))
        return model

    def under(self, make: MakeRule, survival: str) -> nn.Module:
        """The network with a rule make(rate) in every block, attached."""
        model = sharing(self.model)
        apply(model, make, survival)
        return model

    def compile_blocks(self, model: nn.Module) -> None:
        """Compile every residual block of a form without rules, in place."""
        for block in self.blocks_of(model):
            block.compile()


def sharing(model: nn.Module) -> Any:
    """A copy of a model's modules that has the same parameters and buffers, not copies of them."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
