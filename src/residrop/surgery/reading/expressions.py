"""Expressions as steps, with the names of values in place; and what of them is known beforehand.

Conditions on the block's attributes are settled by asking the block, so that what is left is what this block does.
"""

import ast
from typing import Any

from residrop.surgery.reading.functions import Function, Unreadable, path_of
from residrop.surgery.reading.nodes import copied, walk
from residrop.surgery.reading.questions import Questions
from residrop.surgery.reading.steps import Scope, Step, names_in, paths_in
from residrop.surgery.reading.trees import (
    combined,
    element,
    is_atom,
    is_module_name,
    load,
    may_be_asked,
    only_moves,
    store,
)

__all__ = ["Expressions"]

_FAST_PATH = "torch.backends.mha.get_fastpath_enabled"  # which has no branches: it computes whole layers at once


class Expressions:
    """What a forward is read with: the steps so far, the names of values, and the questions to the block."""

    def __init__(
        self, block_class: type, questions: Questions, function: Function, inline: frozenset[str], deep: str
    ) -> None:
        self.block_class, self.questions, self.inline, self.deep = block_class, questions, inline, deep
        self.root = function
        self.count: dict[str, int] = {}
        self.guards: dict[str, bool] = {}
        self.constants: dict[str, Any] = {}
        self.called: list[str] = []
        self.steps: list[Step] = []
        self.variadic: set[str] = set()
        self.splits = 0
        self.lists: set[str] = set()  # values that are lists made in the forward
        self.there: set[str] = set()  # values that are not None

    def fresh(self, name: str) -> str:
        self.count[name] = self.count.get(name, 0) + 1
        return f"{name}__{self.count[name]}"

    def add(self, node: ast.stmt, scope: Scope, *, effect: bool = False, mutates: frozenset[str] = frozenset()) -> Step:
        """Append a statement with its names in place."""
        names = [part for part in walk(node) if isinstance(part, ast.Name) and "__" in part.id[1:]]
        writes = tuple(dict.fromkeys(one.id for one in names if isinstance(one.ctx, ast.Store)))
        reads = frozenset(one.id for one in names if isinstance(one.ctx, ast.Load))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
            self.there.update(writes)
        step = Step(
            node, reads - frozenset(writes), writes, paths_in(node), inside=scope.site, effect=effect, mutates=mutates
        )
        self.steps.append(step)
        return step

    def named(self, name: str, value: ast.expr, scope: Scope) -> ast.expr:
        own = self.fresh(name)
        self.add(ast.Assign([store(own)], value), scope)
        return load(own)

    def constant(self, value: Any) -> ast.expr:
        if value is None or isinstance(value, (bool, int, float, str)):
            return ast.Constant(value)
        name = f"constant{len(self.constants)}"
        self.constants[name] = value
        return ast.Name(name, ast.Load())

    def value(self, expression: ast.expr, scope: Scope) -> ast.expr:
        return self.expression(expression, scope, hoist=True)

    def renamed(self, node: Any, scope: Scope) -> Any:
        """A node with the names of values in place, otherwise as it is."""
        return _Rename(self, scope).visit(copied(node))

    def expression(self, node: ast.expr, scope: Scope, *, hoist: bool) -> ast.expr:
        """An expression with names in place; with `hoist` every call and operation in it becomes a step of its own."""
        if not hoist:
            return self.renamed(node, scope)
        return _Hoist(self, scope).visit(copied(node))

    def mutated(self, node: ast.AST) -> frozenset[str]:
        """Names of the values that calls in a node change in place, as far as that can be seen."""
        found: set[str] = set()
        for part in walk(node):
            if not isinstance(part, ast.Call):
                continue
            name = part.func.attr if isinstance(part.func, ast.Attribute) else ""
            if name.endswith("_") and not name.startswith("_") and isinstance(part.func, ast.Attribute):
                if path_of(part.func.value) is None and not is_module_name(part.func.value):
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
            case ast.Compare(left=ast.Name(id=name), ops=[operator], comparators=[ast.Constant(value=None)]) if (
                name in self.there and isinstance(operator, (ast.Is, ast.IsNot))
            ):
                return isinstance(operator, ast.IsNot)
        if not may_be_asked(test):
            return None
        text = ast.unparse(test)
        for path in paths_in(test):
            if not path or path.rpartition(".")[2] == "training" or not self.questions.ask("lasting", path):
                return None
        answer = self.questions.ask("truth", text, self.root.plain.__module__)
        if answer is not None and paths_in(test):
            self.guards[text] = answer
        return answer


class _Rename(ast.NodeTransformer):
    """Puts the names of values in the place of variables."""

    def __init__(self, lowering: Any, scope: Scope) -> None:
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
            return copied(value)
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
        names = {part.id for one in node.generators for part in walk(one.target) if isinstance(part, ast.Name)}
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
        known = self.lowering.known(self._plainly(copied(node.test)))
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
            value if is_atom(value) else self._in_arm(value, arm) for value, arm in zip(values, arms, strict=True)
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
        made = combined(self.visit(node.left), node.op, self.visit(node.right))
        return made if is_atom(made) else self._step(made, "sum" if isinstance(node.op, ast.Add) else "value")

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        made = element(ast.Subscript(self.visit(node.value), self.visit(node.slice), ast.Load()))
        return made if is_atom(made) or path_of(made) is not None else self._step(made, "part")

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
        if only_moves(made):
            return func.value  # pyright: ignore[reportAttributeAccessIssue]
        where = f"{getattr(node, 'lineno', 0)}:{getattr(node, 'col_offset', 0)}"
        site = f"{scope.site[-1] if scope.site else ''}/{scope.function.node.name}:{where}"
        if local or lowering.wants(site, len(scope.site)):
            value = lowering.inlined(made, scope, site)
            if value is not None:
                return value if is_atom(value) else lowering.named("value", value, scope)
            if local:
                raise Unreadable("a function within the forward cannot be read")
        name = ast.unparse(func).rpartition(".")[2] if isinstance(func, (ast.Attribute, ast.Name)) else "value"
        value = self._step(made, name if name.isidentifier() and "__" not in name else "value")
        lowering.steps[-1].site = site
        lowering.steps[-1].mutates = lowering.mutated(made)
        return value

    def _step(self, node: ast.expr, name: str) -> ast.expr:
        own = self.lowering.fresh(name.strip("_") or "value")
        self.lowering.add(ast.Assign([store(own)], node), self.scope)
        return load(own)
