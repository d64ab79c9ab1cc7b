"""Walking through syntax trees and copying them.

ast.walk and deepcopy do the same, several times slower: most of what they visit is the context of names (Load, Store),
operators, and positions.
"""

import ast
from collections.abc import Iterator
from typing import Any, TypeVar

__all__ = ["copied", "walk"]

_BARE = (ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop)  # of no content, shared by all trees

_Node = TypeVar("_Node", bound=ast.AST)


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all nodes in it, the outer ones first, without contexts and operators."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        yield one
        for name in reversed(one._fields):
            value = getattr(one, name, None)
            if isinstance(value, list):
                waiting += [each for each in reversed(value) if isinstance(each, ast.AST)]
            elif isinstance(value, ast.AST) and not isinstance(value, _BARE):
                waiting.append(value)


def copied(node: _Node) -> _Node:
    """A copy of a node with all nodes in it."""
    made = type(node).__new__(type(node))
    made.__dict__.update({name: _copied(value) for name, value in node.__dict__.items()})
    return made


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(one) for one in value]
    return copied(value) if isinstance(value, ast.AST) and not isinstance(value, _BARE) else value
