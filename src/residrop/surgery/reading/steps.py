"""A forward as steps: one call or operation each, every value under a name of its own.

Conditions on the block's attributes are settled by asking the block, so that what is left is what this block does.
Calls of methods, functions and children can be replaced by their own steps, which is how a sum is found that a block
leaves to a child (BERT's `output(hidden, input)`).
"""

import ast
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import nn

from residrop.surgery.reading.functions import Function, Unreadable, function_of, owner_of, path_of
from residrop.surgery.reading.questions import Questions

__all__ = ["Fork", "Forward", "Step", "forward_of", "names_in", "paths_in"]

_BODY = "return"  # the name of what a forward returns
_RAISES = ast.Constant("raises")  # in its place, where statements always end in an error
_SPLITS = 8  # conditions after which a forward may have returned: what follows them is read twice
_FAST_PATH = "torch.backends.mha.get_fastpath_enabled"  # which has no branches: it computes whole layers at once
_DEPTH = 4  # of calls within calls that are replaced by their steps
_ASKED = {
    "self",
    "torch",
    "nn",
    "isinstance",
    "hasattr",
    "len",
    "getattr",
    "callable",
    "bool",
    "type",
    "int",
    "float",
    "str",
    "tuple",
}


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
        functions: all functions that steps come from.
        variadic: names of values that are `*args` or `**kwargs`.
    """

    function: Function
    steps: list[Step]
    arguments: dict[str, str]
    guards: dict[str, bool]
    constants: dict[str, Any]
    called: list[str]
    functions: list[Function]
    variadic: frozenset[str]


def names_in(node: ast.AST) -> frozenset[str]:
    """Names of values (not of the block, globals or variables of comprehensions) that are used in a node."""
    return frozenset(part.id for part in ast.walk(node) if isinstance(part, ast.Name) and "__" in part.id[1:])


def paths_in(node: ast.AST) -> frozenset[str]:
    """Dotted paths of the block's attributes used in a node; "" if the block itself is handed on."""
    found: set[str] = set()
    inside: set[int] = set()
    for part in ast.walk(node):
        path = path_of(part)
        if path is not None and id(part) not in inside:
            found.add(path)
            inside.update(id(one) for one in ast.walk(part))
    return frozenset(found)


def forward_of(block_class: type[nn.Module], questions: Questions, inline: frozenset[str], deep: str = "") -> Forward:
    """Take the forward of a block apart.

    Args:
        block_class: the block's class.
        questions: to the block.
        inline: sites of calls that are to be replaced by their steps.
        deep: a site below which all calls are, as far as they can be read.
    """
    owner = owner_of(block_class, "forward")
    function = function_of(block_class.forward, owner)
    lowering = _Lowering(block_class, questions, function, inline, deep)
    return lowering.forward()


def _clear(steps: list[Step]) -> None:
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


class _Scope:
    """The variables of one function while it is read."""

    def __init__(self, function: Function, base: ast.expr | None, site: tuple[str, ...]) -> None:
        self.function, self.base, self.site = function, base, site
        self.names: dict[str, ast.expr] = {}
        self.local = {
            part.id
            for part in ast.walk(function.node)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
        }
        self.functions: dict[str, ast.FunctionDef] = {}


class _Lowering:
    def __init__(
        self, block_class: type, questions: Questions, function: Function, inline: frozenset[str], deep: str
    ) -> None:
        self.block_class, self.questions, self.inline, self.deep = block_class, questions, inline, deep
        self.root = function
        self.count: dict[str, int] = {}
        self.guards: dict[str, bool] = {}
        self.constants: dict[str, Any] = {}
        self.called: list[str] = []
        self.functions = [function]
        self.steps: list[Step] = []
        self.variadic: set[str] = set()
        self.splits = 0
        self.lists: set[str] = set()  # values that are lists made in the forward

    def forward(self) -> Forward:
        arguments = self.root.node.args
        scope = _Scope(self.root, ast.Name("self", ast.Load()), ())
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        if not every or every[0].arg != "self":
            raise Unreadable("its forward does not call the block self")
        named: dict[str, str] = {}
        for one in every[1:]:
            named[one.arg] = self.fresh(one.arg)
        for one in (arguments.vararg, arguments.kwarg):
            if one is not None:
                named[one.arg] = self.fresh(one.arg)
                self.variadic.add(named[one.arg])
        scope.names.update({name: _load(value) for name, value in named.items()})
        returned = self.body(self.root.node.body, scope)
        if returned is None or returned is _RAISES:
            raise Unreadable("its forward returns nothing")
        self.add(ast.Return(returned), scope)
        _clear(self.steps)
        return Forward(
            self.root,
            self.steps,
            named,
            self.guards,
            self.constants,
            self.called,
            self.functions,
            frozenset(self.variadic),
        )

    def fresh(self, name: str) -> str:
        self.count[name] = self.count.get(name, 0) + 1
        return f"{name}__{self.count[name]}"

    def add(
        self, node: ast.stmt, scope: _Scope, *, effect: bool = False, mutates: frozenset[str] = frozenset()
    ) -> Step:
        """Append a statement with its names in place."""
        ast.fix_missing_locations(node)
        writes = tuple(
            dict.fromkeys(
                part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            )
        )
        reads = frozenset(
            part.id
            for part in ast.walk(node)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load) and "__" in part.id[1:]
        )
        writes = tuple(name for name in writes if "__" in name[1:])
        step = Step(
            node, reads - frozenset(writes), writes, paths_in(node), inside=scope.site, effect=effect, mutates=mutates
        )
        self.steps.append(step)
        return step

    # statements

    def body(self, statements: list[ast.stmt], scope: _Scope) -> ast.expr | None:
        """Append the steps of statements; returns what they return, None if they run to their end."""
        for number, statement in enumerate(statements):
            rest = statements[number + 1 :]
            if isinstance(statement, ast.Return):
                return self.value(statement.value or ast.Constant(None), scope)
            if isinstance(statement, ast.Raise):
                self.statement(statement, scope)
                return _RAISES
            if isinstance(statement, ast.If):
                test = self.expression(statement.test, scope, hoist=False)
                known = self.known(test)
                if known is not None:
                    return self.body([*(statement.body if known else statement.orelse), *rest], scope)
                if any(_returns(one) for one in (*statement.body, *statement.orelse)):
                    return self.split(statement, rest, scope)
                self.fork(statement, scope)
                continue
            self.statement(statement, scope)
        return None

    def statement(self, statement: ast.stmt, scope: _Scope) -> None:
        match statement:
            case ast.Pass() | ast.Delete() | ast.Expr(value=ast.Constant()):
                pass
            case ast.Expr() if (name := self.grown(statement, scope)) is not None:
                new = self.renewed(name, scope)
                step = self.add(self.renamed(statement, scope), scope)
                step.writes, step.reads = (new,), step.reads - {new}
            case ast.Expr():
                value = self.value(statement.value, scope)
                if isinstance(value, ast.Name) and self.steps and value.id in self.steps[-1].writes:
                    self.steps[-1].effect = True
                elif not _is_atom(value):
                    self.add(ast.Expr(value), scope, effect=True, mutates=self.mutated(value))
            case ast.Assign(targets=[target]):
                self.assign(target, statement.value, scope)
            case ast.Assign():
                value = self.value(statement.value, scope)
                for target in statement.targets:
                    self.bind(target, value, scope)
            case ast.AnnAssign():
                if statement.value is not None:
                    self.assign(statement.target, statement.value, scope)
            case ast.AugAssign(target=ast.Name()):
                self.augmented(statement, scope)
            case ast.FunctionDef() if not statement.decorator_list and not statement.args.defaults:
                scope.functions[statement.name] = statement
                scope.names.pop(statement.name, None)
            case ast.Assert() | ast.Raise():
                self.add(self.renamed(statement, scope), scope)
            case ast.AugAssign():
                value = self.value(statement.value, scope)
                target = self.renamed(statement.target, scope)
                self.change(ast.AugAssign(target, statement.op, value), target, scope)
            case ast.For() | ast.While() | ast.With() | ast.Try():
                self.opaque(statement, scope)
            case _:
                raise Unreadable(f"its forward has a {type(statement).__name__} in it")

    def assign(self, target: ast.expr, value: ast.expr, scope: _Scope) -> None:
        if (
            isinstance(target, ast.Tuple)
            and isinstance(value, ast.Tuple)
            and len(target.elts) == len(value.elts)
            and not any(isinstance(one, ast.Starred) for one in (*target.elts, *value.elts))
        ):
            values = [self.value(one, scope) for one in value.elts]
            for one, made in zip(target.elts, values, strict=True):
                self.bind(one, made, scope)
            return
        self.bind(target, self.value(value, scope), scope)

    def bind(self, target: ast.expr, value: ast.expr, scope: _Scope) -> None:
        """Give a value (a name, a constant, an attribute of the block, or an expression) to a target."""
        if isinstance(target, ast.Name):
            if _is_atom(value):
                scope.names[target.id] = value
                return
            name = self.fresh(target.id)
            self.add(ast.Assign([_store(name)], value), scope)
            if isinstance(value, ast.List):
                self.lists.add(name)
            scope.names[target.id] = _load(name)
        elif (
            isinstance(target, ast.Tuple)
            and isinstance(value, ast.Tuple)
            and len(target.elts) == len(value.elts)
            and not any(isinstance(one, ast.Starred) for one in (*target.elts, *value.elts))
        ):
            for one, made in zip(target.elts, value.elts, strict=True):
                self.bind(one, made, scope)
        elif isinstance(target, (ast.Tuple, ast.List)):
            fresh: dict[str, str] = {}

            def rename(one: ast.expr) -> ast.expr:
                if isinstance(one, ast.Name):
                    fresh[one.id] = self.fresh(one.id)
                    return _store(fresh[one.id])
                if isinstance(one, ast.Starred):
                    return ast.Starred(rename(one.value), ast.Store())
                if isinstance(one, (ast.Tuple, ast.List)):
                    return type(one)([rename(each) for each in one.elts], ast.Store())
                raise Unreadable("its forward unpacks into something that is no variable")

            self.add(ast.Assign([rename(target)], value), scope)
            scope.names.update({name: _load(own) for name, own in fresh.items()})
        else:
            new = self.renamed(target, scope)
            self.change(ast.Assign([new], value), new, scope)

    def change(self, node: ast.stmt, target: ast.AST, scope: _Scope) -> None:
        """A statement that changes something in place: an element or attribute of a value, or of the block."""
        while isinstance(target, (ast.Attribute, ast.Subscript)):
            target = target.value
        mutates = names_in(target)
        self.add(node, scope, effect=True, mutates=mutates)

    def augmented(self, statement: ast.AugAssign, scope: _Scope) -> None:
        assert isinstance(statement.target, ast.Name)
        value = self.value(statement.value, scope)
        old = self.expression(ast.Name(statement.target.id, ast.Load()), scope, hoist=False)
        name = self.fresh(statement.target.id)
        if isinstance(old, ast.Name):
            # in place where the value is a tensor: whoever else has the old value has the new one, too
            node = ast.Assign([_store(name)], ast.BinOp(old, statement.op, value))
            step = self.add(node, scope, mutates=frozenset({old.id}))
            step.node = _InPlace(old, statement.op, value, name)
        else:
            made = _combined(old, statement.op, value)
            if _is_atom(made):
                scope.names[statement.target.id] = made
                return
            self.add(ast.Assign([_store(name)], made), scope)
        scope.names[statement.target.id] = _load(name)

    def fork(self, statement: ast.If, scope: _Scope) -> None:
        test = self.expression(statement.test, scope, hoist=False)
        before = dict(scope.names)
        arms: list[list[Step]] = []
        after: list[dict[str, ast.expr]] = []
        for body in (statement.body, statement.orelse):
            steps, self.steps = self.steps, []
            scope.names = dict(before)
            try:
                raises = self.body(body, scope) is _RAISES
            finally:
                arm, self.steps = self.steps, steps
            arms.append(arm)
            after.append({} if raises else scope.names)
        scope.names = before
        self.join(test, arms, after, scope)

    def join(
        self,
        test: ast.expr,
        arms: list[list[Step]],
        after: list[dict[str, ast.expr]],
        scope: _Scope,
    ) -> None:
        if {} in after:  # that arm raises an error
            scope.names = dict(after[1] or after[0])
            after = [{}, {}]
        changed = [
            name
            for name in dict.fromkeys((*after[0], *after[1]))
            if _text(after[0].get(name)) != _text(after[1].get(name))
        ]
        for name in changed:
            scope.names[name] = self.merged(name, arms, [names.get(name) for names in after], scope)
        for name in after[0]:
            if name not in changed:
                scope.names[name] = after[0][name]
        fork = Fork(ast.Pass(), frozenset(), (), frozenset(), inside=scope.site, test=test, arms=(arms[0], arms[1]))
        fork.update()
        self.steps.append(fork)

    def merged(self, name: str, arms: list[list[Step]], values: list[ast.expr | None], scope: _Scope) -> ast.expr:
        """One value for what two arms give, of tuples element by element."""
        first, second = values
        if (
            isinstance(first, ast.Tuple)
            and isinstance(second, ast.Tuple)
            and _text(first) != _text(second)
            and (alike := min(map(_plain_elements, (first, second))))
        ):
            pairs = zip(first.elts[:alike], second.elts[:alike], strict=True)
            elements = [self.merged(name, arms, list(pair), scope) for pair in pairs]
            rest: list[ast.expr | None] = [ast.Tuple(one.elts[alike:], ast.Load()) for one in (first, second)]
            if first.elts[alike:] or second.elts[alike:]:
                elements.append(ast.Starred(self.merged(name, arms, rest, scope), ast.Load()))
            return ast.Tuple(elements, ast.Load())
        if _text(first) == _text(second) and first is not None:
            return first
        own = self.fresh(name)
        for arm, value in zip(arms, values, strict=True):
            if value is not None:
                steps, self.steps = self.steps, arm
                self.add(ast.Assign([_store(own)], deepcopy(value)), scope)
                self.steps = steps
        return _load(own)

    def split(self, statement: ast.If, rest: list[ast.stmt], scope: _Scope) -> ast.expr:
        """A condition of which an arm may return: the statements after it belong to both."""
        bodies = [
            body if _always_returns(body) else [*body, *rest] for body in (list(statement.body), list(statement.orelse))
        ]
        self.splits += 1
        if self.splits > _SPLITS:
            raise Unreadable("its forward returns in too many places")
        test = self.expression(statement.test, scope, hoist=False)
        before = dict(scope.names)
        arms: list[list[Step]] = []
        after: list[dict[str, ast.expr]] = []
        for body in bodies:
            steps, self.steps = self.steps, []
            scope.names = dict(before)
            try:
                returned = self.body(body, scope)
            finally:
                arm, self.steps = self.steps, steps
            if returned is None:
                raise Unreadable("its forward returns in some cases only")
            arms.append(arm)
            after.append({} if returned is _RAISES else {_BODY: returned})
        scope.names = {}
        self.join(test, arms, after, scope)
        result = scope.names[_BODY]
        scope.names = before
        return result

    def grown(self, statement: ast.stmt, scope: _Scope) -> str | None:
        """The variable of a list that was made in this forward, if a statement appends to it."""
        match statement:
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append" | "extend"))) if (
                isinstance(value := scope.names.get(name), ast.Name) and value.id in self.lists
            ):
                return name
        return None

    def renewed(self, name: str, scope: _Scope) -> str:
        """A new name for the value of a variable that is about to be changed."""
        new = self.fresh(name)
        old = scope.names[name]
        self.add(ast.Assign([_store(new)], deepcopy(old)), scope)
        if isinstance(old, ast.Name) and old.id in self.lists:
            self.lists.add(new)
        scope.names[name] = _load(new)
        return new

    def opaque(self, statement: ast.stmt, scope: _Scope) -> None:
        """A loop or the like, as one step."""
        for part in ast.walk(statement):
            if isinstance(part, (ast.Return, ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Match)):
                raise Unreadable(f"its forward has a {type(part).__name__} within a {type(statement).__name__}")
        stored = [
            part.id for part in ast.walk(statement) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
        ]
        inner = [part for part in ast.walk(statement) if isinstance(part, ast.Expr)]
        grown = [self.grown(part, scope) for part in inner]
        mutated: set[str] = set()
        stored += [name for name in grown if name is not None]
        for name in dict.fromkeys(stored):
            if name in scope.names:
                self.renewed(name, scope)
            else:
                scope.names[name] = _load(self.fresh(name))
        node = self.renamed(statement, scope)
        for part in ast.walk(node):
            if isinstance(part, (ast.AugAssign, ast.Assign)):
                targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                for target in targets:
                    if not isinstance(target, ast.Name) or isinstance(part, ast.AugAssign):
                        mutated |= names_in(target)
        written = frozenset(self.renamed(_load(name), scope).id for name in stored)  # pyright: ignore
        does = None in grown
        step = self.add(node, scope, effect=does or bool(mutated - written), mutates=frozenset(mutated) - written)
        # what it changes it reads, too
        step.reads = step.reads | (names_in(node) & written)
        step.writes = tuple(dict.fromkeys((*step.writes, *(written & {scope.names[name].id for name in stored}))))  # pyright: ignore

    # expressions

    def value(self, expression: ast.expr, scope: _Scope) -> ast.expr:
        return self.expression(expression, scope, hoist=True)

    def renamed(self, node: Any, scope: _Scope) -> Any:
        """A node with the names of values in place, otherwise as it is."""
        return _Rename(self, scope).visit(deepcopy(node))

    def expression(self, node: ast.expr, scope: _Scope, *, hoist: bool) -> ast.expr:
        """An expression with names in place; with `hoist` every call and operation in it becomes a step of its own."""
        if not hoist:
            return self.renamed(node, scope)
        return _Hoist(self, scope).visit(deepcopy(node))

    def mutated(self, node: ast.AST) -> frozenset[str]:
        """Names of the values that calls in a node change in place, as far as that can be seen."""
        found: set[str] = set()
        for part in ast.walk(node):
            if not isinstance(part, ast.Call):
                continue
            name = part.func.attr if isinstance(part.func, ast.Attribute) else ""
            if name.endswith("_") and not name.startswith("_") and isinstance(part.func, ast.Attribute):
                if path_of(part.func.value) is None and not _is_module_name(part.func.value):
                    found |= names_in(part.func.value)
                else:
                    found |= names_in(part.args[0]) if part.args else set()
            for word in part.keywords:
                if word.arg == "inplace" and not (isinstance(word.value, ast.Constant) and not word.value.value):
                    found |= names_in(part.args[0]) if part.args else set()
                if word.arg == "out":
                    found |= names_in(word.value)
        return frozenset(found)

    # conditions

    def known(self, test: ast.expr) -> bool | None:
        """Whether a condition holds, if the block's attributes tell."""
        match test:
            case ast.BoolOp():
                answers = [self.known(one) for one in test.values]
                decisive = isinstance(test.op, ast.Or)
                if decisive in answers:
                    return decisive
                return None if None in answers else not decisive
            case ast.UnaryOp(op=ast.Not()):
                inner = self.known(test.operand)
                return None if inner is None else not inner
            case ast.Call(func=ast.Attribute(attr="is_scripting")):
                return False
        if not _may_be_asked(test):
            return None
        text = ast.unparse(test)
        for path in paths_in(test):
            if not path or path.rpartition(".")[2] == "training" or not self.questions.ask("lasting", path):
                return None
        answer = self.questions.ask("truth", text, self.root.plain.__module__)
        if answer is not None and paths_in(test):
            self.guards[text] = answer
        return answer

    # calls that are replaced by their steps

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
            owner = owner_of(cls, "forward")
            if "__call__" in {name for one in cls.__mro__[: cls.__mro__.index(nn.Module)] for name in vars(one)}:
                return None
            return function_of(cls.forward, owner), func, args, path
        inner, _, name = path.rpartition(".")
        cls = self.questions.ask("class", inner) if inner else self.block_class
        owner = owner_of(cls, name) if cls is not None else None
        if owner is None or owner is nn.Module or not isinstance(vars(owner)[name], FunctionType):
            return None
        assert isinstance(func, ast.Attribute)
        return function_of(vars(owner)[name], owner), func.value, args, ""

    def wants(self, site: str, depth: int) -> bool:
        return site in self.inline or (bool(self.deep) and site.startswith(self.deep) and depth < _DEPTH)

    def inlined(self, node: ast.Call, scope: _Scope, site: str) -> ast.expr | None:
        """The steps of a call in its place; returns its value, None if it has to stay a call."""
        local = isinstance(node.func, ast.Name) and node.func.id in scope.functions
        before = (dict(self.count), dict(self.guards), dict(self.constants), list(self.called), list(self.functions))
        steps, self.steps = self.steps, []
        try:
            value = self.local_call(node, scope) if local else self.other_call(node, scope, site)
        except Unreadable:
            value = None
        made, self.steps = self.steps, steps
        if value is None:
            self.count, self.guards, self.constants, self.called, self.functions = before
            return None
        self.steps.extend(made)
        return value

    def local_call(self, node: ast.Call, scope: _Scope) -> ast.expr | None:
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

    def other_call(self, node: ast.Call, scope: _Scope, site: str) -> ast.expr | None:
        found = self.called_function(node)
        if found is None:
            return None
        function, base, args, path = found
        if not all(map(_only_renames, function.wrappers)) or len(scope.site) >= _DEPTH:
            return None
        inner = _Scope(function, base, (*scope.site, site))
        self.arguments_of(function, base, args, node.keywords, inner, scope)
        if path:
            self.called.append(path)
        self.functions.append(function)
        self.take_globals(function)
        return self.body(function.node.body, inner)

    def arguments_of(
        self,
        function: Function,
        base: ast.expr | None,
        args: list[Any],
        keywords: list[ast.keyword],
        inner: _Scope,
        outer: _Scope,
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
            self.add(ast.Assign([_store(holder)], items), inner)
            for name in missing:
                default = ast.Constant(None) if name not in defaults else self.constant(defaults[name])
                if name not in defaults:
                    raise Unreadable("an argument that may be among others")
                taken = ast.Call(ast.Attribute(_load(holder), "pop", ast.Load()), [ast.Constant(name), default], [])
                inner.names[name] = self.named(name, taken, inner)
            spread = [_load(holder)]
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

    def named(self, name: str, value: ast.expr, scope: _Scope) -> ast.expr:
        own = self.fresh(name)
        self.add(ast.Assign([_store(own)], value), scope)
        return _load(own)

    def constant(self, value: Any) -> ast.expr:
        if value is None or isinstance(value, (bool, int, float, str)):
            return ast.Constant(value)
        name = f"constant{len(self.constants)}"
        self.constants[name] = value
        return ast.Name(name, ast.Load())

    def take_globals(self, function: Function) -> None:
        """Make the globals of another function available; Unreadable if they have the names of other things here."""
        if function.plain.__globals__ is self.root.plain.__globals__:
            return
        ours, theirs = self.root.plain.__globals__, function.plain.__globals__
        for part in ast.walk(function.node):
            if isinstance(part, ast.Name) and part.id in theirs:
                value, name = theirs[part.id], part.id
                if name in ours and ours[name] is value:
                    continue
                if (name in ours and ours[name] is not value) or self.constants.get(name, value) is not value:
                    raise Unreadable(f"two things are called {name}")
                self.constants[name] = value


class _InPlace(ast.AugAssign):
    """x__2 = x__1; x__2 += value: written when it is known whether the old value may be overwritten."""

    def __init__(self, old: ast.Name, op: ast.operator, value: ast.expr, name: str) -> None:
        super().__init__(_store(name), op, value)
        self.old, self.name = old, name


class _Rename(ast.NodeTransformer):
    """Puts the names of values in the place of variables."""

    def __init__(self, lowering: _Lowering, scope: _Scope) -> None:
        self.lowering, self.scope = lowering, scope
        self.bound: list[set[str]] = []

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if any(node.id in names for names in self.bound):
            return node
        value = self.scope.names.get(node.id)
        if value is None:
            if node.id in self.scope.functions:
                raise Unreadable("a function within the forward is handed on")
            if node.id in self.scope.local and isinstance(node.ctx, ast.Load):
                raise Unreadable(f"{node.id} may have no value")
            return node
        if isinstance(node.ctx, ast.Load):
            return deepcopy(value)
        if isinstance(value, ast.Name):
            return ast.Name(value.id, node.ctx)
        raise Unreadable(f"{node.id} is set where it cannot be told")

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        arguments = node.args
        self.bound.append({one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)})
        node.body = self.visit(node.body)
        self.bound.pop()
        return node

    def _comprehension(self, node: Any) -> ast.expr:
        names = {part.id for one in node.generators for part in ast.walk(one.target) if isinstance(part, ast.Name)}
        self.bound.append(names)
        self.generic_visit(node)
        self.bound.pop()
        return node

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        test = self.visit(node.test)
        known = self.lowering.known(test)
        if known is not None:
            return self.visit(node.body if known else node.orelse)
        return ast.IfExp(test, self.visit(node.body), self.visit(node.orelse))

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        """Without the operands of which it is known that they decide nothing."""
        decisive = isinstance(node.op, ast.Or)
        left: list[ast.expr] = []
        for number, one in enumerate(node.values):
            operand = self.visit(one)
            known = self.lowering.known(operand)
            if known is not None and known != decisive and number < len(node.values) - 1:
                continue
            left.append(operand)
            if known == decisive:
                break
        return left[0] if len(left) == 1 else ast.BoolOp(node.op, left)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            raise Unreadable("its forward calls that of a base class")
        return self.generic_visit(node)  # pyright: ignore[reportReturnType]


class _Hoist(_Rename):
    """The same, and makes a step of every call and operation that is always carried out."""

    def _plainly(self, node: ast.expr) -> Any:
        """Without steps of its own: what may not be carried out, or not in this order."""
        return _Rename(self.lowering, self.scope).visit(node)

    visit_Lambda = visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _plainly

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        known = self.lowering.known(self._plainly(deepcopy(node.test)))
        if known is not None:
            return self.visit(node.body if known else node.orelse)
        lowering, scope, name = self.lowering, self.scope, "chosen"
        arms: list[list[Step]] = []
        values: list[ast.expr] = []
        for one in (node.body, node.orelse):
            steps, lowering.steps = lowering.steps, []
            try:
                values.append(self.visit(one))
            finally:
                arm, lowering.steps = lowering.steps, steps
            arms.append(arm)
        values = [
            value if _is_atom(value) else self._in_arm(value, arm) for value, arm in zip(values, arms, strict=True)
        ]
        scope.names[name], kept = ast.Constant(None), scope.names.get(name)
        lowering.join(self._plainly(node.test), arms, [{name: value} for value in values], scope)
        made = scope.names.pop(name)
        if kept is not None:
            scope.names[name] = kept
        return made

    def _in_arm(self, value: ast.expr, arm: list[Step]) -> ast.expr:
        steps, self.lowering.steps = self.lowering.steps, arm
        made = self._step(value, "chosen")
        self.lowering.steps = steps
        return made

    visit_BoolOp = _plainly

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        return self._plainly(node) if len(node.ops) > 1 else self.generic_visit(node)  # pyright: ignore

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        made = _combined(self.visit(node.left), node.op, self.visit(node.right))
        return made if _is_atom(made) else self._step(made, "sum" if isinstance(node.op, ast.Add) else "value")

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        made = _element(ast.Subscript(self.visit(node.value), self.visit(node.slice), ast.Load()))
        return made if _is_atom(made) or path_of(made) is not None else self._step(made, "part")

    def visit_Call(self, node: ast.Call) -> ast.expr:
        scope, lowering = self.scope, self.lowering
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            raise Unreadable("its forward calls that of a base class")
        local = isinstance(node.func, ast.Name) and node.func.id in scope.functions
        if ast.unparse(node.func) == _FAST_PATH:
            return ast.Constant(False)
        func: ast.expr = node.func if local else self.visit(node.func)
        args = [self.visit(one) for one in node.args]
        keywords = [ast.keyword(one.arg, self.visit(one.value)) for one in node.keywords]
        made = ast.Call(func, args, keywords)
        if _only_moves(made):
            return func.value  # pyright: ignore[reportAttributeAccessIssue]
        where = f"{getattr(node, 'lineno', 0)}:{getattr(node, 'col_offset', 0)}"
        site = f"{scope.site[-1] if scope.site else ''}/{scope.function.node.name}:{where}"
        if local or lowering.wants(site, len(scope.site)):
            value = lowering.inlined(made, scope, site)
            if value is not None:
                return value if _is_atom(value) else lowering.named("value", value, scope)
            if local:
                raise Unreadable("a function within the forward cannot be read")
        name = ast.unparse(func).rpartition(".")[2] if isinstance(func, (ast.Attribute, ast.Name)) else "value"
        value = self._step(made, name if name.isidentifier() and "__" not in name else "value")
        lowering.steps[-1].site = site
        lowering.steps[-1].mutates = lowering.mutated(made)
        return value

    def _step(self, node: ast.expr, name: str) -> ast.expr:
        own = self.lowering.fresh(name.strip("_") or "value")
        self.lowering.add(ast.Assign([_store(own)], node), self.scope)
        return _load(own)


def _only_moves(call: ast.Call) -> bool:
    """Whether a call is x.to(y.device): values of one block are on one device."""
    return (
        isinstance(call.func, ast.Attribute)
        and call.func.attr == "to"
        and isinstance(call.func.value, ast.Name)
        and not call.keywords
        and len(call.args) == 1
        and isinstance(call.args[0], ast.Attribute)
        and call.args[0].attr == "device"
    )


def _only_renames(wrapper: FunctionType) -> bool:
    """Whether a decorator only gives arguments of earlier versions their names of today."""
    return wrapper.__globals__.get("__name__") == "transformers.utils.deprecation"


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _store(name: str) -> ast.Name:
    return ast.Name(name, ast.Store())


def _text(node: ast.expr | None) -> str:
    return "" if node is None else ast.dump(node)


def _is_atom(node: ast.expr) -> bool:
    """Whether an expression can stand wherever its value is used: a name, a constant, an attribute of the block, or a
    tuple of such."""
    if isinstance(node, ast.Tuple):
        return all(_is_atom(one.value if isinstance(one, ast.Starred) else one) for one in node.elts)
    return isinstance(node, (ast.Name, ast.Constant)) or (not isinstance(node, ast.Call) and bool(path_of(node)))


def _combined(left: ast.expr, op: ast.operator, right: ast.expr) -> ast.expr:
    """left op right; (a,) + b becomes (a, *b), of which the elements can be told."""
    if isinstance(op, ast.Add) and isinstance(left, ast.Tuple):
        return ast.Tuple(
            [*left.elts, *(right.elts if isinstance(right, ast.Tuple) else [ast.Starred(right)])], ast.Load()
        )
    return ast.BinOp(left, op, right)


def _plain_elements(node: ast.Tuple) -> int:
    """How many elements of a tuple stand at a known place."""
    return next((number for number, one in enumerate(node.elts) if isinstance(one, ast.Starred)), len(node.elts))


def _element(node: ast.Subscript) -> ast.expr:
    """Elements of a tuple that is written out, where the index is."""
    if not isinstance(node.value, ast.Tuple):
        return node
    elements, plain = node.value.elts, _plain_elements(node.value)
    match node.slice:
        case ast.Constant(value=int() as index) if 0 <= index < plain:
            return elements[index]
        case ast.Slice(lower=ast.Constant(value=int() as lower), upper=None, step=None) if 0 <= lower <= plain:
            return ast.Tuple(elements[lower:], ast.Load())
        case ast.Slice(lower=None, upper=ast.Constant(value=int() as upper), step=None) if 0 <= upper <= plain:
            return ast.Tuple(elements[:upper], ast.Load())
    return node


def _is_module_name(node: ast.expr) -> bool:
    return isinstance(node, (ast.Name, ast.Attribute)) and not names_in(node)


def _returns(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Return) for part in ast.walk(node))


def _always_returns(body: list[ast.stmt]) -> bool:
    if not body:
        return False
    last = body[-1]
    if isinstance(last, ast.If):
        return _always_returns(last.body) and _always_returns(last.orelse)
    return isinstance(last, ast.Return)


def _may_be_asked(node: ast.AST) -> bool:
    """Whether a condition is about the block's attributes and constants alone."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id not in _ASKED and not part.id[0].isupper():
            return False
        if isinstance(part, ast.Call) and not (isinstance(part.func, ast.Name) and part.func.id in _ASKED):
            return False
        if isinstance(part, (ast.Lambda, ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp, ast.IfExp)):
            return False
    return True


def _all_positional(function: Function) -> list[str]:
    arguments = function.node.args
    return [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
