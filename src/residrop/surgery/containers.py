"""Blocks that are containers (`nn.Sequential`): the rules that a block is given are no element of it."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

__all__ = ["RULES", "Container"]

RULES = "residrop_rules"  # name of the child that holds a block's rules


def _without_rules(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        rules = self._modules.pop(RULES, None)  # None: one such method calls another
        try:
            result = getattr(super(Container, self), name)(*args)
        finally:
            if rules is not None:
                self._modules[RULES] = rules  # at the end again, behind elements that came new
        if type(result) is type(self) and result is not self:  # a slice or a sum is a container of its own class
            result.__class__ = self.__dict__["_residrop_class"]
        return result

    method.__name__ = name
    return method


class Container:
    """Stands between the mixin and the container's class."""

    def __iter__(self: Any) -> Iterator[nn.Module]:
        return (module for name, module in self._modules.items() if name != RULES)

    def __len__(self: Any) -> int:
        return len(self._modules) - (RULES in self._modules)

    __getitem__ = _without_rules("__getitem__")
    __setitem__ = _without_rules("__setitem__")
    __delitem__ = _without_rules("__delitem__")
    __add__ = _without_rules("__add__")
    __iadd__ = _without_rules("__iadd__")
    __mul__ = _without_rules("__mul__")
    __rmul__ = _without_rules("__rmul__")
    __imul__ = _without_rules("__imul__")
    append = _without_rules("append")
    extend = _without_rules("extend")
    insert = _without_rules("insert")
    pop = _without_rules("pop")
