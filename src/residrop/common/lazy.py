"""A mapping whose values are made when they are first asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TypeVar

__all__ = ["Lazy"]

Value = TypeVar("Value")


class Lazy(Mapping[str, Value]):
    """A mapping that is read from files only once somebody looks into it.

    Args:
        names: gives its keys, in order; called at the first look.
        make: gives the value of a key; called at the first look at that value.
    """

    def __init__(self, names: Callable[[], Sequence[str]], make: Callable[[str], Value]) -> None:
        self.names, self.make = cache(names), cache(make)

    def __getitem__(self, name: str) -> Value:
        if name not in self.names():
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())
