"""Small questions to syntax trees, and how their nodes are made."""

import ast

from residrop.surgery.reading.functions import path_of
from residrop.surgery.reading.nodes import walk
from residrop.surgery.reading.steps import names_in

__all__ = [
    "InPlace",
    "always_returns",
    "combined",
    "element",
    "is_atom",
    "is_module_name",
    "load",
    "may_be_asked",
    "only_moves",
    "plain_elements",
    "returns",
    "store",
    "text",
]

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


class InPlace(ast.AugAssign):
    """x__2 = x__1; x__2 += value: written when it is known whether the old value may be overwritten."""

    def __init__(self, old: ast.Name, op: ast.operator, value: ast.expr, name: str) -> None:
        super().__init__(store(name), op, value)
        self.old, self.name = old, name


def only_moves(call: ast.Call) -> bool:
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


def load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def store(name: str) -> ast.Name:
    return ast.Name(name, ast.Store())


def text(node: ast.expr | None) -> str:
    return "" if node is None else ast.dump(node)


def is_atom(node: ast.expr) -> bool:
    """Whether an expression can stand wherever its value is used: a name, a constant, an attribute of the block, or a
    tuple of such."""
    if isinstance(node, ast.Tuple):
        return all(is_atom(one.value if isinstance(one, ast.Starred) else one) for one in node.elts)
    return isinstance(node, (ast.Name, ast.Constant)) or (not isinstance(node, ast.Call) and bool(path_of(node)))


def combined(left: ast.expr, op: ast.operator, right: ast.expr) -> ast.expr:
    """left op right; (a,) + b becomes (a, *b), of which the elements can be told."""
    if isinstance(op, ast.Add) and isinstance(left, ast.Tuple):
        return ast.Tuple(
            [*left.elts, *(right.elts if isinstance(right, ast.Tuple) else [ast.Starred(right)])], ast.Load()
        )
    return ast.BinOp(left, op, right)


def plain_elements(node: ast.Tuple) -> int:
    """How many elements of a tuple stand at a known place."""
    return next((number for number, one in enumerate(node.elts) if isinstance(one, ast.Starred)), len(node.elts))


def element(node: ast.Subscript) -> ast.expr:
    """Elements of a tuple that is written out, where the index is."""
    if not isinstance(node.value, ast.Tuple):
        return node
    elements, plain = node.value.elts, plain_elements(node.value)
    match node.slice:
        case ast.Constant(value=int() as index) if 0 <= index < plain:
            return elements[index]
        case ast.Slice(lower=ast.Constant(value=int() as lower), upper=None, step=None) if 0 <= lower <= plain:
            return ast.Tuple(elements[lower:], ast.Load())
        case ast.Slice(lower=None, upper=ast.Constant(value=int() as upper), step=None) if 0 <= upper <= plain:
            return ast.Tuple(elements[:upper], ast.Load())
    return node


def is_module_name(node: ast.expr) -> bool:
    return isinstance(node, (ast.Name, ast.Attribute)) and not names_in(node)


def returns(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Return) for part in walk(node))


def always_returns(body: list[ast.stmt]) -> bool:
    if not body:
        return False
    last = body[-1]
    if isinstance(last, ast.If):
        return always_returns(last.body) and always_returns(last.orelse)
    return isinstance(last, ast.Return)


def may_be_asked(node: ast.AST) -> bool:
    """Whether a condition is about the block's attributes and constants alone."""
    for part in walk(node):
        if isinstance(part, ast.Name) and part.id not in _ASKED and not part.id[0].isupper():
            return False
        if isinstance(part, ast.Call) and not (isinstance(part.func, ast.Name) and part.func.id in _ASKED):
            return False
        if isinstance(part, (ast.Lambda, ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp, ast.IfExp)):
            return False
    return True
