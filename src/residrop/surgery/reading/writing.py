"""Writing a forward with rules in the place of its sums, and its branches as methods."""

import ast
import linecache
from collections.abc import Sequence
from types import FunctionType
from typing import Any

from residrop.surgery.reading.functions import wrapped_alike
from residrop.surgery.reading.nodes import copied
from residrop.surgery.reading.steps import Fork, Forward, Step
from residrop.surgery.reading.sums import Sum

__all__ = ["methods_of", "written"]


def written(forward: Forward, sums: Sequence[Sum]) -> str:
    """The source of the forward and of its branches, as functions of a factory that takes the constants."""
    writer = _Writer(forward, sums)
    return writer.source()


def methods_of(forward: Forward, source: str) -> dict[str, Any]:
    """Make the functions of a source that `written` gave."""
    plain = forward.function.plain
    name = f"<residual branches of {plain.__module__}.{plain.__qualname__} {abs(hash(source)):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    made: dict[str, Any] = {}
    exec(compile(source, name, "exec"), plain.__globals__, made)
    methods: dict[str, Any] = made["make"](**forward.constants)
    main: FunctionType = methods["residrop_forward"]
    main.__defaults__, main.__kwdefaults__ = plain.__defaults__, plain.__kwdefaults__
    main.__name__, main.__qualname__ = plain.__name__, plain.__qualname__
    methods["residrop_forward"] = wrapped_alike(main, forward.function.wrappers)
    return methods


class _Writer:
    def __init__(self, forward: Forward, sums: Sequence[Sum]) -> None:
        self.forward, self.sums = forward, sums
        self.results = {one.result for one in sums}  # and what else they are called
        for step in (step for one in forward.steps for step in one.walk()):
            value = step.node.value if isinstance(step.node, ast.Assign) and not isinstance(step, Sum) else None
            if isinstance(value, ast.Name) and value.id in self.results:
                self.results |= set(step.writes)

    def source(self) -> str:
        node = copied(self.forward.function.node)
        node.name = "residrop_forward"
        node.returns, node.decorator_list = None, []
        arguments = node.args
        for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
            if one is not None:
                one.annotation = None
        arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
        arguments.kw_defaults = [None if one is None else ast.Constant(None) for one in arguments.kw_defaults]
        body: list[ast.stmt] = []
        if self.forward.guards:
            test = " and ".join(text if holds else f"not ({text})" for text, holds in self.forward.guards.items())
            body += ast.parse(f"if not ({test}):\n    self.residrop_changed()").body
        for name in dict.fromkeys(self.forward.called):
            body += ast.parse(f"self.residrop_plain(self.{_spelled(name)})").body
        body += ast.parse("\n".join(f"{value} = {name}" for name, value in self.forward.arguments.items())).body
        body += self.statements(self.forward.steps)
        node.body = body
        functions: list[ast.stmt] = [node]
        for one in self.sums:
            functions.append(
                self.function(
                    f"residrop_branch_{one.result}", one.x, one.taken, one.branch, one.out, one.live, one.beyond
                )
            )
            if one.shortcut:
                name = f"residrop_shortcut_{one.result}"
                functions.append(self.function(name, one.x, one.skip_taken, one.shortcut, one.skip))
        names = ", ".join(self.forward.constants)
        factory = ast.parse(f"def make({names}):\n    return locals()").body[0]
        assert isinstance(factory, ast.FunctionDef)
        listed = ", ".join(f"{one.name!r}: {one.name}" for one in functions)  # pyright: ignore[reportAttributeAccessIssue]
        factory.body = [*functions, ast.Return(ast.parse(f"{{{listed}}}", mode="eval").body)]
        return ast.unparse(ast.fix_missing_locations(ast.Module([factory], [])))

    def function(
        self,
        name: str,
        x: str,
        taken: Sequence[str],
        steps: Sequence[Step],
        out: str,
        live: Sequence[str] = (),
        beyond: frozenset[str] = frozenset(),
    ) -> ast.stmt:
        arguments = ", ".join(["self", x, *(f"{own}=None" for own in taken)])
        function = ast.parse(f"def {name}({arguments}):\n    pass").body[0]
        assert isinstance(function, ast.FunctionDef)
        others = [f"(None, *{own}[1:])" if own in beyond else own for own in live]
        result = f"return ({out}, {', '.join(others)},)" if live else f"return {out}"
        function.body = [*self.statements(list(steps), {out, *live}), *_parsed(result)]
        return function

    def statements(self, steps: list[Step], kept: set[str] | None = None) -> list[ast.stmt]:
        """The statements of steps; values that nothing needs any more are let go of."""
        found: list[ast.stmt] = []
        last = _last_uses(steps, kept or set())
        for number, step in enumerate(steps):
            found += self.statement(step)
            if not isinstance(step.node, ast.Return) and last[number]:
                found += ast.parse(f"del {', '.join(sorted(last[number]))}").body
        return found or [ast.Pass()]

    def statement(self, step: Step) -> list[ast.stmt]:
        if isinstance(step, Sum):
            return self.sum(step)
        if isinstance(step, Fork):
            return [ast.If(step.test, self.statements(step.arms[0], set(step.writes)), self._orelse(step))]
        node = step.node
        # the sum of an absent branch is the block's own input, which is not ours to overwrite
        if isinstance(node, ast.AugAssign) and hasattr(node, "old"):
            old: ast.Name = node.old  # pyright: ignore[reportAttributeAccessIssue]
            value = f"self.residrop_own({old.id})" if old.id in self.results else old.id
            return [*ast.parse(f"{node.name} = {value}").body, ast.AugAssign(node.target, node.op, node.value)]  # pyright: ignore
        owned = [f"{name} = self.residrop_own({name})" for name in sorted(step.mutates & self.results)]
        return [*(statement for text in owned for statement in ast.parse(text).body), node]

    def _orelse(self, step: Fork) -> list[ast.stmt]:
        return self.statements(step.arms[1], set(step.writes)) if step.arms[1] else []

    def sum(self, one: Sum) -> list[ast.stmt]:
        options: list[str] = []
        if one.taken:
            names = ", ".join(f"{name!r}: {name}" for name in one.taken)
            options.append(f"taken={{{names}}}")
        if one.shortcut:
            names = ", ".join(f"{name!r}: {name}" for name in one.skip_taken)
            options.append(f"shortcut=self.residrop_shortcut_{one.result}, skip_taken={{{names}}}")
        if one.live:
            options.append(f"live={len(one.live)}")
        if one.post:
            options.append(f"post=self.{_spelled(one.post)}")
        arguments = self.forward.arguments
        if arguments and one.x not in {*arguments.values(), *(other.result for other in self.sums)} and not options:
            # of a value made in between, such as one with its tokens as rows, the batch tells which rows are whose
            options.append(f"batch={next(iter(arguments))}")
        given = "".join(f", {option}" for option in options)
        call = f"self.residrop_sum({one.number}, {one.x}, self.residrop_branch_{one.result}{given})"
        return ast.parse(f"{', '.join([one.result, *one.live])} = {call}").body


def _parsed(text: str) -> list[ast.stmt]:
    function = ast.parse(f"def f():\n    {text}").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.body


def _spelled(path: str) -> str:
    """A dotted path as an expression: "layer.0.norm" is layer[0].norm."""
    text = ""
    for name in path.split("."):
        text += f"[{name}]" if name.lstrip("-").isdigit() else f".{name}" if text else name
    return text


def _last_uses(steps: list[Step], kept: set[str]) -> list[set[str]]:
    """For every step the values made in this list that are used for the last time in it."""
    made: dict[str, int] = {}
    optional: set[str] = set()
    for number, step in enumerate(steps):
        for name in step.writes:
            made[name] = number
        if isinstance(step, Fork):
            optional |= set(step.writes)
        if not isinstance(step.node, ast.Assign) and not isinstance(step, (Sum, Fork)):
            optional |= set(step.writes)  # of a loop that may not run
    last: list[set[str]] = [set() for _ in steps]
    for name, first in made.items():
        if name in kept or name in optional:
            continue
        uses = [number for number, step in enumerate(steps) if name in step.reads]
        last[max(uses, default=first)].add(name)
    return last
