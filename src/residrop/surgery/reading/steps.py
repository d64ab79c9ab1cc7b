"""A forward as steps: one call or operation each, every value under a name of its own."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from residrop.surgery.reading.functions import Function, path_of
from residrop.surgery.reading.nodes import walk

__all__ = ["Fork", "Forward", "Scope", "Step", "clear", "names_in", "paths_in"]


@dataclass(eq=False)
class Step:
    """One statement.

    Attributes:
        node: the statement.
        reads: names of the values it uses.
        writes: names of the values it makes.
        paths: attributes of the block that it uses, as dotted paths.
        site: where the call stands, if it is one that may be replaced by its steps.
        inside: sites of the calls whose steps this one is among.
        mutates: names of the values that it changes in place.
        effect: whether it does something besides making values.
    """

    node: ast.stmt
    reads: frozenset[str]
    writes: tuple[str, ...]
    paths: frozenset[str]
    site: str = ""
    inside: tuple[str, ...] = ()
    mutates: frozenset[str] = frozenset()
    effect: bool = False

    def walk(self) -> "Iterator[Step]":
        """The step, and those in it."""
        yield self


@dataclass(eq=False)
class Fork(Step):
    """Two lists of steps of which a condition chooses one; values that both make have one name in the end."""

    test: ast.expr = field(default_factory=lambda: ast.Constant(True))
    arms: tuple[list[Step], list[Step]] = field(default_factory=lambda: ([], []))

    def walk(self) -> Iterator[Step]:
        yield self
        for arm in self.arms:
            for step in arm:
                yield from step.walk()

    def update(self) -> None:
        """Compute what is read and written anew, after the arms have changed."""
        reads, paths, mutates, effect = set(names_in(self.test)), set(paths_in(self.test)), set(), False
        writes: set[str] = set()
        for arm in self.arms:
            made: set[str] = set()
            for step in arm:
                reads |= step.reads - made
                made |= set(step.writes)
                paths |= step.paths
                mutates |= step.mutates
                effect = effect or step.effect
            writes |= made
        self.reads, self.paths = frozenset(reads), frozenset(paths)
        self.writes, self.mutates, self.effect = tuple(sorted(writes)), frozenset(mutates), effect


@dataclass(eq=False)
class Forward:
    """A forward taken apart.

    Attributes:
        function: what it was read from.
        steps: its steps; the last one returns.
        arguments: names of its arguments (without self), each with the name of its value.
        guards: conditions that were settled, as text, with their answers.
        constants: values that steps use by name, which the function's own module does not have.
        called: paths of the modules whose calls were replaced by steps.
        variadic: names of values that are `*args` or `**kwargs`.
    """

    function: Function
    steps: list[Step]
    arguments: dict[str, str]
    guards: dict[str, bool]
    constants: dict[str, Any]
    called: list[str]
    variadic: frozenset[str]


def names_in(node: ast.AST) -> frozenset[str]:
    """Names of values (not of the block, globals or variables of comprehensions) that are used in a node."""
    return frozenset(part.id for part in walk(node) if isinstance(part, ast.Name) and "__" in part.id[1:])


def paths_in(node: ast.AST) -> frozenset[str]:
    """Dotted paths of the block's attributes used in a node; "" if the block itself is handed on."""
    found: set[str] = set()
    inside: set[int] = set()
    for part in walk(node):
        path = path_of(part)
        if path is not None and id(part) not in inside:
            found.add(path)
            inside.update(id(one) for one in walk(part))
    return frozenset(found)


def clear(steps: list[Step]) -> None:
    """Take out copies of values that nothing uses."""
    changed = True
    while changed:
        flat = [step for one in steps for step in one.walk()]
        used = {name for step in flat if not isinstance(step, Fork) for name in step.reads}
        used |= {name for step in flat if isinstance(step, Fork) for name in names_in(step.test)}
        changed = _cleared(steps, used)


def _cleared(steps: list[Step], used: set[str]) -> bool:
    changed = False
    for step in list(steps):
        if isinstance(step, Fork):
            for arm in step.arms:
                changed |= _cleared(arm, used)
            step.update()
            if not any(step.arms):
                steps.remove(step)
        elif isinstance(step.node, ast.Assign) and step.writes and not step.effect and not used & set(step.writes):
            copies = isinstance(step.node.value, (ast.Name, ast.Constant, ast.Subscript))
            if copies:
                steps.remove(step)
            changed |= copies
    return changed


class Scope:
    """The variables of one function while it is read."""

    def __init__(self, function: Function, site: tuple[str, ...]) -> None:
        self.function, self.site = function, site
        self.names: dict[str, ast.expr] = {}
        self.local = {
            part.id for part in walk(function.node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
        }
        self.functions: dict[str, ast.FunctionDef] = {}
