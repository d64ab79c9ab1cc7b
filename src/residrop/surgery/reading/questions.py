"""What a block itself has to say while its forward is read, and a record of it.

A forward asks its block, too: `if self.downsample is not None`. Reading answers such questions once, and keeps the
answers: they tell for which blocks of the class the reading holds, and make it again where there is no block yet (as
when a model is loaded).
"""

import inspect
import sys
from collections.abc import Hashable
from types import CodeType
from typing import Any

from torch import nn

from residrop.blocks.skippable import parameters_of
from residrop.surgery.drops import own_survival
from residrop.surgery.reading.functions import Unreadable, paths_of_method, set_in_forward

__all__ = ["Questions", "Recorded", "part_at"]
_SHORTCUT = 0.75  # a shortcut's parameters, compared with its branch's, at most


def at(block: nn.Module, path: str) -> Any:
    """The attribute of a block at a dotted path, through elements of lists, too.

    Raises:
        AttributeError, LookupError, TypeError: there is none.
    """
    found: Any = block
    for name in path.split(".") if path else ():
        found = _inside(found, name)
    return found


class Questions:
    """Asks a block."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.log: dict[tuple[Hashable, ...], Any] = {}

    def ask(self, kind: str, *what: Any) -> Any:
        """The answer to one question, from the record if it was asked before."""
        key = (kind, *what)
        if key not in self.log:
            self.log[key] = self.find(kind, *what)
        return self.log[key]

    def find(self, kind: str, *what: Any) -> Any:
        """Ask the block."""
        return getattr(self, f"_{kind}")(*what)

    def holds(self, log: dict[tuple[Hashable, ...], Any]) -> bool:
        """Whether the block gives the same answers."""
        return all(self.find(str(kind), *what) == answer for (kind, *what), answer in log.items())

    def _truth(self, text: str, module: str) -> bool | None:
        """Whether a condition on attributes, written in this module, holds; None if that cannot be told."""
        try:
            return bool(eval(_compiled(text), vars(sys.modules[module]), {"self": self.block}))
        except Exception:  # whatever properties and comparisons raise
            return None

    def _lasting(self, path: str) -> bool:
        """Whether an attribute of the block is set by no forward. (Whoever sets it elsewhere is told, see `guards`.)"""
        *inner, name = path.split(".")
        owner: Any = self.block
        for one in inner:
            if isinstance(owner, nn.Module) and one in set_in_forward(type(owner)):
                return False
            try:
                owner = at(owner, one) if isinstance(owner, nn.Module) else getattr(owner, one)
            except (AttributeError, LookupError, TypeError):
                return True
        return not (isinstance(owner, nn.Module) and name in set_in_forward(type(owner)))

    def _class(self, path: str) -> type | None:
        """The class of a child; None where there is no module."""
        try:
            found = at(self.block, path)
        except (AttributeError, LookupError, TypeError):
            return None
        return type(found) if isinstance(found, nn.Module) and "forward" not in vars(found) else None

    def _parts(self, path: str) -> tuple[str, ...] | None:
        """The attributes that the use of one comes to: itself, or those that a method uses; None if that cannot be
        seen."""
        first = path.partition(".")[0]
        found = inspect.getattr_static(type(self.block), first, None)
        if not path or isinstance(found, property):
            return None
        if first in vars(self.block) or not callable(getattr(type(self.block), first, None)):
            return (path,)
        try:
            return tuple(sorted(paths_of_method(type(self.block), first)))
        except Unreadable:
            return None

    def _weighs(self, paths: tuple[str, ...]) -> bool:
        """Whether there are weights at these paths, of layers rather than of norms, activations and embeddings, or a
        module that drops what comes before it."""
        parts = self._found(paths)
        drops = any(own_survival(part) is not None for part in parts)
        tables = {id(one.weight) for one in self.block.modules() if isinstance(one, nn.Embedding)}
        weights = [one for one in parameters_of(parts) if id(one) not in tables]
        return drops or any(one.numel() > max(one.shape, default=1) for one in weights)

    def _lighter(self, these: tuple[str, ...], those: tuple[str, ...]) -> bool:
        """Whether there are clearly fewer parameters at these paths than at those, in one layer or in fewer: they
        are a shortcut's, not those of a second branch."""
        shortcut, branch = ({own_survival(part) is not None for part in self._found(paths)} for paths in (these, those))
        if True in branch and True not in shortcut:
            return True  # the model itself drops this one
        first, second = self._parameters(these), self._parameters(those)
        layers, others = (sum(one.ndim > 1 for one in each) for each in (first, second))
        if layers > others or layers == others > 1:
            return False  # a bottleneck beside a wide projection, a shared expert beside the others
        return sum(one.numel() for one in first) <= _SHORTCUT * sum(one.numel() for one in second)

    def _parameters(self, paths: tuple[str, ...]) -> list[nn.Parameter]:
        return list(dict.fromkeys(parameters_of(self._found(paths))))

    def _found(self, paths: tuple[str, ...]) -> list[nn.Module | nn.Parameter]:
        parts = [part_at(self.block, one) for path in paths for one in self._parts(path) or ()]
        return [part for part in parts if part is not None]


class Recorded(Questions):
    """Gives answers from a record, where there is no block to ask."""

    def __init__(self, log: dict[tuple[Hashable, ...], Any]) -> None:
        super().__init__(nn.Identity())
        self.log.update(log)

    def find(self, kind: str, *what: Any) -> Any:
        raise KeyError((kind, *what))


def _inside(found: Any, name: str) -> Any:
    if name.lstrip("-").isdigit():
        return found[int(name)]
    return getattr(found, name)


def part_at(block: nn.Module, path: str) -> nn.Module | nn.Parameter | None:
    """The innermost module or parameter on the way along a path; None if there is none, or if the path leads on to
    something that is neither (a number) and no method of it."""
    found: Any = block
    part: nn.Module | nn.Parameter | None = None
    for name in path.split("."):
        try:
            found = _inside(found, name)
        except (AttributeError, LookupError, TypeError):
            found = None
        if isinstance(found, (nn.Module, nn.Parameter)):
            part = found
        else:
            return part if callable(found) else None
    return part


def _compiled(text: str) -> CodeType:
    return compile(text, "<condition>", "eval")
