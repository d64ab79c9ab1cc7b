"""Functions as syntax trees."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import CellType, FunctionType
from typing import Any

from torch import nn

from residrop.surgery.reading.nodes import walk

__all__ = [
    "Function",
    "Unreadable",
    "function_of",
    "owner_of",
    "path_of",
    "paths_of_method",
    "set_in_forward",
    "wrapped_alike",
]


class Unreadable(Exception):
    """A forward that cannot be taken apart; the text says why."""


@dataclass(frozen=True, eq=False)
class Function:
    """A Python function.

    Attributes:
        node: its definition.
        plain: the function object (under its decorators).
        wrappers: the functions that decorators put around it, from the inside to the outside.
    """

    node: ast.FunctionDef
    plain: Any  # a FunctionType, which as an attribute would be taken for a method
    wrappers: tuple[FunctionType, ...]


@cache
def function_of(function: Callable[..., Any]) -> Function:
    """The source of a function; Unreadable if there is none, or if it is of a kind that cannot be taken apart."""
    plain = inspect.unwrap(function)
    if not isinstance(plain, FunctionType):
        raise Unreadable(f"{getattr(function, '__qualname__', function)} is no Python function")
    try:
        tree = _tree(plain)
    except (OSError, TypeError, SyntaxError) as error:
        raise Unreadable(f"the source of {plain.__qualname__} is not at hand") from error
    node = tree.body[0] if len(tree.body) == 1 else None
    if not isinstance(node, ast.FunctionDef):
        raise Unreadable(f"{plain.__qualname__} is no plain function")
    if set(plain.__code__.co_freevars) - {"__class__"}:
        raise Unreadable(f"{plain.__qualname__} uses variables of a function around it")
    for part in walk(node):
        if isinstance(part, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom, ast.Global, ast.Nonlocal)):
            raise Unreadable(f"{plain.__qualname__} has a {type(part).__name__} in it")
        if isinstance(part, ast.Attribute) and part.attr.startswith("__") and not part.attr.endswith("__"):
            raise Unreadable(f"{plain.__qualname__} uses the private name {part.attr}")
    wrappers: list[FunctionType] = []
    while function is not plain:
        if not isinstance(function, FunctionType) or not _cells(function):
            raise Unreadable(f"{plain.__qualname__} has a decorator that cannot be seen through")
        wrappers.insert(0, function)
        function = function.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    return Function(node, plain, tuple(wrappers))


def _cells(wrapper: FunctionType) -> list[int]:
    """Which variables of a wrapper hold what it wraps."""
    inner: Any = wrapper.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    cells = wrapper.__closure__ or ()
    return [number for number, cell in enumerate(cells) if _content(cell) is inner]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def wrapped_alike(function: FunctionType, wrappers: Sequence[FunctionType]) -> FunctionType:
    """A function in the wrappers that decorators put around another one."""
    for wrapper in wrappers:
        cells = list(wrapper.__closure__ or ())
        for number in _cells(wrapper):
            cells[number] = CellType(function)
        made = FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, tuple(cells))
        made.__kwdefaults__ = wrapper.__kwdefaults__
        function = made
    return function


def owner_of(cls: type, name: str) -> type | None:
    """The class, of `cls` and its bases, that defines an attribute."""
    return next((one for one in cls.__mro__ if name in vars(one)), None)


@cache
def set_in_forward(cls: type) -> frozenset[str]:
    """Names of attributes that the forward of a class, or a method that it calls, sets on its module."""
    seen, waiting, names = set[str](), ["forward"], set[str]()
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            for method in _methods(cls, one):
                names.update(_set_on_self(method))
                calls = (node.func for node in walk(method) if isinstance(node, ast.Call))
                waiting += [call.attr for call in calls if isinstance(call, ast.Attribute)]
    return frozenset(names)


def _methods(cls: type, name: str) -> Iterator[ast.FunctionDef]:
    """The sources of the methods of a name that a class and its bases have."""
    for one in cls.__mro__:
        if one is not nn.Module and issubclass(one, nn.Module) and name in vars(one):
            attribute = _plain(vars(one)[name])
            function = attribute.fget if isinstance(attribute, property) else attribute
            function = inspect.unwrap(function) if callable(function) else function
            if isinstance(function, FunctionType):
                with suppress(OSError, TypeError, SyntaxError):
                    yield from (node for node in _tree(function).body if isinstance(node, ast.FunctionDef))


@cache
def _tree(function: FunctionType) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def _set_on_self(method: ast.FunctionDef) -> Iterator[str]:
    first = method.args.args[0].arg if method.args.args else ""
    for node in walk(method):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, (ast.Store, ast.Del))
            and isinstance(node.value, ast.Name)
            and node.value.id == first
        ):
            yield node.attr


@cache
def paths_of_method(cls: type, name: str) -> frozenset[str]:
    """The attributes of self that a method uses, also through other methods; Unreadable if that cannot be seen."""
    seen: set[str] = set()
    paths: set[str] = set()
    waiting = [name]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        owner = owner_of(cls, one)
        function = function_of(_plain(vars(owner)[one]) if owner else None)  # pyright: ignore[reportArgumentType]
        own = function.node.args.args[0].arg if function.node.args.args else ""
        for path in _used(function.node, own):
            first = path.partition(".")[0]
            found = getattr(cls, first, None)
            if isinstance(found, property):
                raise Unreadable(f"{cls.__name__}.{first} is a property")
            if callable(found) and not isinstance(found, type):
                waiting.append(first)
            else:
                paths.add(path)
    return frozenset(paths)


def _plain(attribute: Any) -> Any:
    return attribute.__func__ if isinstance(attribute, (staticmethod, classmethod)) else attribute


def _used(node: ast.FunctionDef, own: str) -> Iterator[str]:
    inside: set[int] = set()
    for part in walk(node):  # outer nodes come first
        if id(part) in inside:
            continue
        path = path_of(part, own)
        if path:
            inside.update(id(one) for one in walk(part))
            yield path
        elif path == "":
            raise Unreadable(f"{node.name} hands itself on")


def path_of(node: ast.AST, own: str = "self") -> str | None:
    """The path of self.a.b[0].c: "a.b.0.c", also of getattr(self, "a"); "" for self; None for anything else."""
    if isinstance(node, ast.Name):
        return "" if node.id == own else None
    if isinstance(node, ast.Attribute):
        base, name = path_of(node.value, own), node.attr
    elif (
        isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in ("getattr", "hasattr")
        and len(node.args) >= 2
        and isinstance(node.args[1], ast.Constant)
    ):
        base, name = path_of(node.args[0], own), str(node.args[1].value)
    elif isinstance(node, ast.Subscript) and (index := _index(node.slice)) is not None:
        base, name = path_of(node.value, own), str(index)
        if not base:
            return None
    else:
        return None
    return None if base is None else f"{base}.{name}" if base else name


def _index(node: ast.expr) -> int | None:
    """The number that an expression is, -1 too."""
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1, node.operand
    return sign * node.value if isinstance(node, ast.Constant) and type(node.value) is int else None
