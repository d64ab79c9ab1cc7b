"""How foreign blocks are told, and which mixin knows their branches."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from residrop.surgery.blocks import AppliedBlock
from residrop.surgery.forms import form_of
from residrop.surgery.known_forms import FORMS

__all__ = ["Adapter", "known", "sometimes"]


@dataclass(frozen=True)
class Adapter:
    """A kind of foreign blocks whose branches are known.

    Attributes:
        target: dotted name of the class, such as "torchvision.models.resnet.BasicBlock".
        mixin: what takes its forward's place; None if these blocks are to be left alone.
        when: which blocks of the kind are meant; None is all of them.
        why_not: where there is no mixin, why these blocks are left alone.
        forms: of the forwards that the mixin writes anew. Blocks are told by them, so that another version of the
            library is not taken for known, and a copy of the class in another package is. Without any, blocks are told
            by their class.
    """

    target: str
    mixin: type[AppliedBlock] | None
    when: Callable[[Any], bool] | None = None
    why_not: str = ""
    forms: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """The package it comes from."""
        return self.target.partition(".")[0]

    def of_class(self, block: nn.Module) -> bool:
        """Whether a block is of the class (or a derived one), whatever its forward."""
        module, _, name = self.target.rpartition(".")
        known = getattr(sys.modules.get(module), name, None)  # a package that nobody imported made no blocks
        return known is not None and isinstance(block, known)

    def fits(self, block: nn.Module) -> bool:
        """Whether the forward of a block is the one that the mixin writes anew."""
        forward = type(block).forward
        if self.forms:
            same = not forward.__module__.startswith("torch.") and form_of(forward) in self.forms
        else:
            module, _, name = self.target.rpartition(".")
            same = self.of_class(block) and forward is getattr(sys.modules[module], name).forward
        return same and (self.when is None or self.when(block))


def known(
    target: str, mixin: type[AppliedBlock] | None, when: Callable[[Any], bool] | None = None, why_not: str = ""
) -> Adapter:
    """An adapter with the forms on record for its target; a remark ("..., earlier") behind the name tells versions."""
    return Adapter(target.partition(",")[0], mixin, when, why_not, FORMS.get(target, ()))


def sometimes(prefix: str, blocks: Mapping[str, tuple[type[AppliedBlock], str]]) -> Iterator[Adapter]:
    """Adapters for classes of which only some blocks are residual: by dotted name (after `prefix`) the mixin, and the
    attribute that is True, or not None, in those blocks."""
    why_not = "it has no residual sum (its stride or width change)"
    for name, (mixin, attribute) in blocks.items():
        get = attrgetter(attribute)
        yield known(prefix + name, mixin, lambda block, get=get: get(block) not in (None, False))
        yield known(prefix + name, None, why_not=why_not)
