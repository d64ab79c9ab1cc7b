"""Which source a known block's forward has.

Libraries alter their blocks between versions, and an adapter writes a forward anew: it is exact for the forwards it was
written after, and for no others. The form of a function is a digest of its source without comments, annotations,
docstring and error messages, which does not depend on the version of Python.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

__all__ = ["form_of", "form_of_source"]

_IGNORED = {"annotation", "ctx", "decorator_list", "kind", "returns", "type_comment", "type_params"}


@cache
def form_of(function: Callable[..., Any]) -> str:
    """The form of a function: twelve hexadecimal digits; "" if its source is not at hand."""
    try:
        return form_of_source(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError):
        return ""


def form_of_source(source: str) -> str:
    """The form of the function whose source this is."""
    (function,) = ast.parse(textwrap.dedent(source)).body
    return hashlib.sha256(_text(function).encode()).hexdigest()[:12]


def _text(node: object) -> str:
    """A syntax tree as text, without what does not alter a result. Fields that are empty are left out, as versions of
    Python add such."""
    if isinstance(node, list):
        return f"[{','.join(map(_text, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Raise):
        return "Raise"
    fields = {name: value for name, value in ast.iter_fields(node) if name not in _IGNORED and value not in (None, [])}
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    return f"{type(node).__name__}({','.join(f'{name}={_text(value)}' for name, value in fields.items())})"
