"""Calls of methods, functions and children, replaced by their own steps.

That is how a sum is found that a block leaves to a child (BERT's `output(hidden, input)`).
"""

import ast
from types import FunctionType
from typing import Any

from torch import nn

from residrop.surgery.reading.expressions import Expressions
from residrop.surgery.reading.functions import Function, Unreadable, function_of, owner_of, path_of
from residrop.surgery.reading.nodes import walk
from residrop.surgery.reading.steps import Scope
from residrop.surgery.reading.trees import (
    load,
    store,
)

__all__ = ["Calls"]

_DEPTH = 4  # of calls within calls that are replaced by their steps


class Calls(Expressions):
    """Adds calls that are replaced by their steps."""

    def body(self, statements: list[ast.stmt], scope: Scope) -> ast.expr | None:
        """Append the steps of statements; returns what they return, None if they run to their end."""
        raise NotImplementedError

    def called_function(self, node: ast.Call) -> "tuple[Function, ast.expr | None, list[Any], str] | None":
        """What a call calls, as far as it may be replaced by its steps: the function, what it calls self, the
        arguments, and the path of the module that is called."""
        func, args = node.func, list(node.args)
        known = {**self.root.plain.__globals__, **self.constants}
        if isinstance(func, ast.Name) and func.id in known and func.id != "self":
            found = known[func.id]
            if getattr(found, "__name__", "") == "apply_chunking_to_forward" and len(args) >= 4:
                # what chunks of tokens give is what all of them give
                return self.called_function(ast.Call(args[0], args[3:], node.keywords))
            if isinstance(found, FunctionType) and not found.__module__.startswith("torch."):
                return function_of(found), None, args, ""
            return None
        path = path_of(func)
        if not path:
            return None
        cls = self.questions.ask("class", path)
        if cls is not None:
            if cls.__module__.startswith("torch.") or issubclass(cls, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
                return None
            if "__call__" in {name for one in cls.__mro__[: cls.__mro__.index(nn.Module)] for name in vars(one)}:
                return None
            return function_of(cls.forward), func, args, path
        inner, _, name = path.rpartition(".")
        cls = self.questions.ask("class", inner) if inner else self.block_class
        owner = owner_of(cls, name) if cls is not None else None
        if owner is None or owner is nn.Module or not isinstance(vars(owner)[name], FunctionType):
            return None
        assert isinstance(func, ast.Attribute)
        return function_of(vars(owner)[name]), func.value, args, ""

    def wants(self, site: str, depth: int) -> bool:
        return site in self.inline or (bool(self.deep) and site.startswith(self.deep) and depth < _DEPTH)

    def inlined(self, node: ast.Call, scope: Scope, site: str) -> ast.expr | None:
        """The steps of a call in its place; returns its value, None if it has to stay a call."""
        local = isinstance(node.func, ast.Name) and node.func.id in scope.functions
        before = (dict(self.count), dict(self.guards), dict(self.constants), list(self.called))
        steps, self.steps = self.steps, []
        try:
            value = self.local_call(node, scope) if local else self.other_call(node, scope, site)
        except Unreadable:
            value = None
        made, self.steps = self.steps, steps
        if value is None:
            self.count, self.guards, self.constants, self.called = before
            return None
        self.steps.extend(made)
        return value

    def local_call(self, node: ast.Call, scope: Scope) -> ast.expr | None:
        definition = scope.functions[node.func.id]  # pyright: ignore[reportAttributeAccessIssue]
        arguments = definition.args
        if node.keywords or len(node.args) != len(arguments.args) or arguments.kwarg or arguments.vararg:
            return None
        names = scope.names
        scope.names = {**names, **{one.arg: made for one, made in zip(arguments.args, node.args, strict=True)}}
        try:
            return self.body(definition.body, scope)
        finally:
            scope.names = names

    def other_call(self, node: ast.Call, scope: Scope, site: str) -> ast.expr | None:
        found = self.called_function(node)
        if found is None:
            return None
        function, base, args, path = found
        if not all(map(_only_renames, function.wrappers)) or len(scope.site) >= _DEPTH:
            return None
        inner = Scope(function, (*scope.site, site))
        self.arguments_of(function, base, args, node.keywords, inner, scope)
        if path:
            self.called.append(path)
        self.take_globals(function)
        return self.body(function.node.body, inner)

    def arguments_of(
        self,
        function: Function,
        base: ast.expr | None,
        args: list[Any],
        keywords: list[ast.keyword],
        inner: Scope,
        outer: Scope,
    ) -> None:
        """Bind the arguments of a call, as Python does."""
        arguments = function.node.args
        positional = [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
        if base is not None:
            inner.names[positional.pop(0)] = base
        if any(isinstance(one, ast.Starred) for one in args) or (len(args) > len(positional) and not arguments.vararg):
            raise Unreadable("arguments that cannot be told")
        for name, value in zip(positional, args, strict=False):
            inner.names[name] = value
        if arguments.vararg is not None:
            rest: ast.expr = ast.Tuple(list(args[len(positional) :]), ast.Load())
            inner.names[arguments.vararg.arg] = self.named(arguments.vararg.arg, rest, inner)
        words = {one.arg: one.value for one in keywords if one.arg is not None}
        spread = [one.value for one in keywords if one.arg is None]
        wanted = [*positional, *(one.arg for one in arguments.kwonlyargs)]
        others = {name: value for name, value in words.items() if name not in wanted}
        for name in wanted:
            if name in words:
                if name in inner.names:
                    raise Unreadable("an argument that is given twice")
                inner.names[name] = words[name]
        plain = function.plain
        defaults = dict(zip(reversed(_all_positional(function)), reversed(plain.__defaults__ or ()), strict=False))
        defaults.update(plain.__kwdefaults__ or {})
        missing = [name for name in wanted if name not in inner.names]
        if spread and missing:
            # what is among **kwargs decides, when the block is called
            holder = self.fresh("given")
            items = ast.Dict([None] * len(spread), list(spread))
            self.add(ast.Assign([store(holder)], items), inner)
            for name in missing:
                default = ast.Constant(None) if name not in defaults else self.constant(defaults[name])
                if name not in defaults:
                    raise Unreadable("an argument that may be among others")
                taken = ast.Call(ast.Attribute(load(holder), "pop", ast.Load()), [ast.Constant(name), default], [])
                inner.names[name] = self.named(name, taken, inner)
            spread = [load(holder)]
        else:
            for name in missing:
                if name not in defaults:
                    raise Unreadable("an argument that is missing")
                inner.names[name] = self.constant(defaults[name])
        if arguments.kwarg is not None:
            if not others and len(spread) == 1:
                inner.names[arguments.kwarg.arg] = spread[0]  # nobody changes it, or it would not be private
            else:
                items = ast.Dict(
                    [*([None] * len(spread)), *(ast.Constant(name) for name in others)], [*spread, *others.values()]
                )
                inner.names[arguments.kwarg.arg] = self.named(arguments.kwarg.arg, items, inner)
            if isinstance(kept := inner.names[arguments.kwarg.arg], ast.Name):
                self.variadic.add(kept.id)
        elif others:
            raise Unreadable("an argument that the function does not have")

    def take_globals(self, function: Function) -> None:
        """Make the globals of another function available; Unreadable if they have the names of other things here."""
        if function.plain.__globals__ is self.root.plain.__globals__:
            return
        ours, theirs = self.root.plain.__globals__, function.plain.__globals__
        for part in walk(function.node):
            if isinstance(part, ast.Name) and part.id in theirs:
                value, name = theirs[part.id], part.id
                if name in ours and ours[name] is value:
                    continue
                if (name in ours and ours[name] is not value) or self.constants.get(name, value) is not value:
                    raise Unreadable(f"two things are called {name}")
                self.constants[name] = value


def _only_renames(wrapper: FunctionType) -> bool:
    """Whether a decorator only gives arguments of earlier versions their names of today."""
    return wrapper.__globals__.get("__name__") == "transformers.utils.deprecation"


def _all_positional(function: Function) -> list[str]:
    arguments = function.node.args
    return [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
