"""Taking a forward apart, statement by statement."""

import ast

from torch import nn

from residrop.surgery.reading.calls import Calls
from residrop.surgery.reading.functions import Unreadable, function_of
from residrop.surgery.reading.nodes import copied, walk
from residrop.surgery.reading.questions import Questions
from residrop.surgery.reading.steps import Fork, Forward, Scope, Step, clear, names_in
from residrop.surgery.reading.trees import (
    InPlace,
    always_returns,
    combined,
    is_atom,
    load,
    plain_elements,
    returns,
    store,
    text,
)

__all__ = ["forward_of"]

_BODY = "return"  # the name of what a forward returns
_RAISES = ast.Constant("raises")  # in its place, where statements always end in an error
_SPLITS = 8  # conditions after which a forward may have returned: what follows them is read twice


def forward_of(block_class: type[nn.Module], questions: Questions, inline: frozenset[str], deep: str = "") -> Forward:
    """Take the forward of a block apart.

    Args:
        block_class: the block's class.
        questions: to the block.
        inline: sites of calls that are to be replaced by their steps.
        deep: a site below which all calls are, as far as they can be read.
    """
    return _Statements(block_class, questions, function_of(block_class.forward), inline, deep).forward()


class _Statements(Calls):
    """Adds statements."""

    def forward(self) -> Forward:
        arguments = self.root.node.args
        scope = Scope(self.root, ())
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
        scope.names.update({name: load(value) for name, value in named.items()})
        by_place = [*arguments.posonlyargs, *arguments.args][1:]
        if len(by_place) > len(arguments.defaults):
            self.there.add(named[by_place[0].arg])  # the hidden state
        returned = self.body(self.root.node.body, scope)
        if returned is None or returned is _RAISES:
            raise Unreadable("its forward returns nothing")
        self.add(ast.Return(returned), scope)
        clear(self.steps)
        return Forward(
            self.root,
            self.steps,
            named,
            self.guards,
            self.constants,
            self.called,
            frozenset(self.variadic),
        )

    def body(self, statements: list[ast.stmt], scope: Scope) -> ast.expr | None:
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
                if any(returns(one) for one in (*statement.body, *statement.orelse)):
                    return self.split(statement, rest, scope)
                self.fork(statement, scope)
                continue
            self.statement(statement, scope)
        return None

    def statement(self, statement: ast.stmt, scope: Scope) -> None:
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
                elif not is_atom(value):
                    self.add(ast.Expr(value), scope, effect=True, mutates=self.mutated(value))
            case ast.Assign():
                value = self.value(statement.value, scope)
                for target in statement.targets:
                    self.bind(target, value, scope)
            case ast.AnnAssign():
                if statement.value is not None:
                    self.bind(statement.target, self.value(statement.value, scope), scope)
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

    def bind(self, target: ast.expr, value: ast.expr, scope: Scope) -> None:
        """Give a value (a name, a constant, an attribute of the block, or an expression) to a target."""
        if isinstance(target, ast.Name):
            if is_atom(value):
                scope.names[target.id] = value
                return
            name = self.fresh(target.id)
            self.add(ast.Assign([store(name)], value), scope)
            if isinstance(value, ast.List):
                self.lists.add(name)
            scope.names[target.id] = load(name)
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
                    return store(fresh[one.id])
                if isinstance(one, ast.Starred):
                    return ast.Starred(rename(one.value), ast.Store())
                if isinstance(one, (ast.Tuple, ast.List)):
                    return type(one)([rename(each) for each in one.elts], ast.Store())
                raise Unreadable("its forward unpacks into something that is no variable")

            self.add(ast.Assign([rename(target)], value), scope)
            scope.names.update({name: load(own) for name, own in fresh.items()})
        else:
            new = self.renamed(target, scope)
            self.change(ast.Assign([new], value), new, scope)

    def change(self, node: ast.stmt, target: ast.AST, scope: Scope) -> None:
        """A statement that changes something in place: an element or attribute of a value, or of the block."""
        while isinstance(target, (ast.Attribute, ast.Subscript)):
            target = target.value
        mutates = names_in(target)
        self.add(node, scope, effect=True, mutates=mutates)

    def augmented(self, statement: ast.AugAssign, scope: Scope) -> None:
        assert isinstance(statement.target, ast.Name)
        value = self.value(statement.value, scope)
        old = self.expression(ast.Name(statement.target.id, ast.Load()), scope, hoist=False)
        name = self.fresh(statement.target.id)
        if isinstance(old, ast.Name):
            # in place where the value is a tensor: whoever else has the old value has the new one, too
            node = ast.Assign([store(name)], ast.BinOp(old, statement.op, value))
            step = self.add(node, scope, mutates=frozenset({old.id}))
            step.node = InPlace(old, statement.op, value, name)
        else:
            made = combined(old, statement.op, value)
            if is_atom(made):
                scope.names[statement.target.id] = made
                return
            self.add(ast.Assign([store(name)], made), scope)
        scope.names[statement.target.id] = load(name)

    def fork(self, statement: ast.If, scope: Scope) -> None:
        test = self.expression(statement.test, scope, hoist=False)
        arms = [self.arm(body, scope) for body in (statement.body, statement.orelse)]
        after = [{} if returned is _RAISES else names for _, returned, names in arms]
        self.join(test, [arm for arm, _, _ in arms], after, scope)

    def arm(self, body: list[ast.stmt], scope: Scope) -> tuple[list[Step], ast.expr | None, dict[str, ast.expr]]:
        """The steps of one arm, what it returns, and its variables in the end; the scope is as before."""
        before, steps = scope.names, self.steps
        scope.names, self.steps = dict(before), []
        try:
            returned = self.body(body, scope)
            return self.steps, returned, scope.names
        finally:
            scope.names, self.steps = before, steps

    def join(
        self,
        test: ast.expr,
        arms: list[list[Step]],
        after: list[dict[str, ast.expr]],
        scope: Scope,
    ) -> None:
        if {} in after:  # that arm raises an error
            scope.names = dict(after[1] or after[0])
            after = [{}, {}]
        changed = [
            name
            for name in dict.fromkeys((*after[0], *after[1]))
            if text(after[0].get(name)) != text(after[1].get(name))
        ]
        for name in changed:
            scope.names[name] = self.merged(name, arms, [names.get(name) for names in after], scope)
        for name in after[0]:
            if name not in changed:
                scope.names[name] = after[0][name]
        for first, second in _apart(test, arms):
            fork = Fork(ast.Pass(), frozenset(), (), frozenset(), inside=scope.site, test=test, arms=(first, second))
            fork.update()
            self.steps.append(fork)

    def merged(self, name: str, arms: list[list[Step]], values: list[ast.expr | None], scope: Scope) -> ast.expr:
        """One value for what two arms give, of tuples element by element."""
        first, second = values
        if (
            isinstance(first, ast.Tuple)
            and isinstance(second, ast.Tuple)
            and text(first) != text(second)
            and (alike := min(map(plain_elements, (first, second))))
        ):
            pairs = zip(first.elts[:alike], second.elts[:alike], strict=True)
            elements = [self.merged(name, arms, list(pair), scope) for pair in pairs]
            rest: list[ast.expr | None] = [ast.Tuple(one.elts[alike:], ast.Load()) for one in (first, second)]
            if first.elts[alike:] or second.elts[alike:]:
                elements.append(ast.Starred(self.merged(name, arms, rest, scope), ast.Load()))
            return ast.Tuple(elements, ast.Load())
        if text(first) == text(second) and first is not None:
            return first
        own = self.fresh(name)
        for arm, value in zip(arms, values, strict=True):
            steps, self.steps = self.steps, arm
            # a variable that only one arm makes is used where that arm was taken, or not at all
            self.add(ast.Assign([store(own)], ast.Constant(None) if value is None else copied(value)), scope)
            self.steps = steps
        return load(own)

    def split(self, statement: ast.If, rest: list[ast.stmt], scope: Scope) -> ast.expr:
        """A condition of which an arm may return: the statements after it belong to both."""
        bodies = [
            body if always_returns(body) else [*body, *rest] for body in (list(statement.body), list(statement.orelse))
        ]
        self.splits += 1
        if self.splits > _SPLITS:
            raise Unreadable("its forward returns in too many places")
        test = self.expression(statement.test, scope, hoist=False)
        arms = [self.arm(body, scope) for body in bodies]
        results = [returned for _, returned, _ in arms if returned is not None]
        if len(results) < len(arms):
            raise Unreadable("its forward returns in some cases only")
        after = [{} if returned is _RAISES else {_BODY: returned} for returned in results]
        before, scope.names = scope.names, {}
        self.join(test, [arm for arm, _, _ in arms], after, scope)
        result = scope.names[_BODY]
        scope.names = before
        return result

    def grown(self, statement: ast.stmt, scope: Scope) -> str | None:
        """The variable of a list that was made in this forward, if a statement appends to it."""
        match statement:
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append" | "extend"))) if (
                isinstance(value := scope.names.get(name), ast.Name) and value.id in self.lists
            ):
                return name
        return None

    def renewed(self, name: str, scope: Scope) -> str:
        """A new name for the value of a variable that is about to be changed."""
        new = self.fresh(name)
        old = scope.names[name]
        self.add(ast.Assign([store(new)], copied(old)), scope)
        if isinstance(old, ast.Name) and old.id in self.lists:
            self.lists.add(new)
        scope.names[name] = load(new)
        return new

    def opaque(self, statement: ast.stmt, scope: Scope) -> None:
        """A loop or the like, as one step."""
        for part in walk(statement):
            if isinstance(part, (ast.Return, ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Match)):
                raise Unreadable(f"its forward has a {type(part).__name__} within a {type(statement).__name__}")
        stored = [part.id for part in walk(statement) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
        inner = [part for part in walk(statement) if isinstance(part, ast.Expr)]
        grown = [self.grown(part, scope) for part in inner]
        mutated: set[str] = set()
        stored += [name for name in grown if name is not None]
        for name in dict.fromkeys(stored):
            if name in scope.names:
                self.renewed(name, scope)
            else:
                scope.names[name] = load(self.fresh(name))
        node = self.renamed(statement, scope)
        for part in walk(node):
            if isinstance(part, (ast.AugAssign, ast.Assign)):
                targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                for target in targets:
                    if not isinstance(target, ast.Name) or isinstance(part, ast.AugAssign):
                        mutated |= names_in(target)
        written = frozenset(self.renamed(load(name), scope).id for name in stored)  # pyright: ignore
        does = None in grown
        step = self.add(node, scope, effect=does or bool(mutated - written), mutates=frozenset(mutated) - written)
        # what it changes it reads, too
        step.reads = step.reads | (names_in(node) & written)
        step.writes = tuple(dict.fromkeys((*step.writes, *(written & {scope.names[name].id for name in stored}))))  # pyright: ignore


def _apart(test: ast.expr, arms: list[list[Step]]) -> list[tuple[list[Step], list[Step]]]:
    """The arms of a condition, taken apart where they make values that have nothing to do with each other: of
    `if y is None: a, b = f(x), x`, b may be a shortcut and a belong to a branch."""
    every = [step for arm in arms for step in arm]
    if _calls(test) or any(step.effect or step.mutates or not step.writes for step in every):
        return [(arms[0], arms[1])]
    groups: list[set[Step]] = []
    for step in every:
        own = {one for one in every if set(one.writes) & {*step.reads, *step.writes}}
        joined = [group for group in groups if group & own]
        groups = [group for group in groups if group not in joined]
        groups.append({step}.union(own, *joined))
    if len(groups) < 2 or sum(any(_calls(step.node) for step in group) for group in groups) > 1:
        return [(arms[0], arms[1])]  # calls stay in their order: they may draw random numbers
    groups.sort(key=lambda group: min(number for number, step in enumerate(every) if step in group))
    return [([one for one in arms[0] if one in group], [one for one in arms[1] if one in group]) for group in groups]


def _calls(node: ast.AST) -> bool:
    """Whether anything but torch.cat is called."""
    calls = (part.func for part in walk(node) if isinstance(part, ast.Call))
    return any(ast.unparse(one) != "torch.cat" for one in calls)
