"""The shape of the house: imports go down, files and functions stay small, tests can fail."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "residrop"
FILES = sorted(SOURCE.rglob("*.py"))
TEST_FILES = sorted(TESTS.rglob("*.py"))

FLOORS = [
    ("errors",),
    ("survival",),
    ("timing", "budgets"),
    ("sampler",),
    ("inactive",),
    ("kernels", "decompositions"),
    ("functional", "layout", "cut", "touch"),
    ("rows", "kept"),
    ("windows",),
    ("tracing",),
    ("rules",),
    ("units", "gaussian"),
    ("skippable",),
    ("catalogue", "residual"),
    ("attach",),
    ("compiling",),
    ("graphs",),
    ("distributed",),
    ("models",),
    ("surgery",),
    ("integrations",),
    ("observe",),
    ("inference",),
    ("theory",),
    ("data",),
    ("training",),
    ("ledger",),
    ("output",),
    ("bench",),
    ("papers",),
    ("report",),
    ("evaluating", "export_command", "analyze", "reproduce_command", "report_command"),
    ("commands",),
    ("cli",),
    ("__main__",),
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_TORCH = ("errors", "survival", "timing", "sampler")

MAX_FILE, MAX_FUNCTION = 350, 60
LONG_FILES: dict[str, str] = {}  # path: reason
LONG_FUNCTIONS: dict[str, str] = {}  # path::function: reason


def module_of(path: Path, root: Path = SOURCE) -> list[str]:
    """Dotted name of a source file below the package, as a list; [] is the roof, residrop/__init__.py."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(tree: ast.AST, module: list[str], *, is_package: bool) -> Iterator[str]:
    """Absolute dotted names of everything imported anywhere in a file (in functions and TYPE_CHECKING, too)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["residrop", *module]
                here = here[: len(here) - node.level + is_package]
                base = ".".join([*here, *filter(None, [base])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(tree: ast.AST, module: list[str], *, is_package: bool) -> list[str]:
    """What a file imports from its own floor or above."""
    found = []
    for name in imports(tree, module, is_package=is_package):
        if name.split(".")[0] != "residrop":
            continue
        room = [*name.split("."), ""][1]
        if room not in FLOOR_OF:
            found.append(f"{name} (the roof, or a room without a floor)")
        elif room != module[0] and FLOOR_OF[room] >= FLOOR_OF[module[0]]:
            found.append(name)
    return found


def by_path(path: Path) -> str:
    return str(path.relative_to(TESTS.parent))


every_file = pytest.mark.parametrize("path", FILES, ids=by_path)


@every_file
def test_file_has_a_floor(path):
    module = module_of(path)
    assert not module or module[0] in FLOOR_OF, f"give {module[0]} a floor in test_layering.py"


@every_file
def test_imports_go_down(path):
    module = module_of(path)
    tree = ast.parse(path.read_text())
    upward = violations(tree, module, is_package=path.name == "__init__.py") if module else []
    assert not upward, f"{by_path(path)} imports from its own floor or above: {upward}"


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("from residrop.rules import Rule", "attach", 0),
        ("from residrop.attach import attach", "rules", 1),
        ("from residrop import functional", "rules", 0),
        ("from residrop import attach", "rules", 1),
        ("from residrop import Rule", "cli", 1),
        ("import residrop", "cli", 1),
        ("import residrop.rules", "cli", 0),
        ("def f():\n    import residrop.cli", "rules", 1),
        ("from residrop.residual import Residual", "catalogue", 1),
        ("from residrop.models.blocks import conv", "models.cifar", 0),
        ("from . import blocks", "models.cifar", 0),
        ("from .blocks import conv", "models.cifar", 0),
        ("from ..attach import attach", "models.cifar", 0),
        ("from ..training import loop", "models.cifar", 1),
        ("from .training import loop", "rules", 1),
        ("import math, torch", "rules", 0),
        ("from residrop.unknown import x", "cli", 1),
    ],
)
def test_layering_check_catches(source, module, found):
    assert len(violations(ast.parse(source), module.split("."), is_package=False)) == found


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_ground_floor_without_torch(name):
    tree = ast.parse((SOURCE / f"{name}.py").read_text())
    roots = {imported.split(".")[0] for imported in imports(tree, [name], is_package=False)}
    assert "residrop" in roots or name == "errors"
    assert not roots & {"torch", "torchvision", "numpy", "scipy"}
    rooms = {i.split(".")[1] for i in imports(tree, [name], is_package=False) if i.startswith("residrop.")}
    assert rooms <= set(WITHOUT_TORCH)


# Size


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{by_path(path)}::{node.name}", (node.end_lineno or 0) - node.lineno + 1


@every_file
def test_file_size(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_FILE or by_path(path) in LONG_FILES, f"{lines} lines; make it two rooms"


@every_file
def test_function_sizes(path):
    long = {name: lines for name, lines in functions(path) if lines > MAX_FUNCTION and name not in LONG_FUNCTIONS}
    assert not long


def test_exceptions_are_needed_and_explained():
    lines = {by_path(path): len(path.read_text().splitlines()) for path in FILES}
    lengths = dict(pair for path in FILES for pair in functions(path))
    assert all(lines.get(path, 0) > MAX_FILE and reason for path, reason in LONG_FILES.items())
    assert all(lengths.get(name, 0) > MAX_FUNCTION and reason for name, reason in LONG_FUNCTIONS.items())


# Tests that can fail

CHECKS = ("assert_", "check_")


def calls(node: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call):
            function = inner.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            yield inner, name


def is_check(node: ast.AST) -> bool:
    if any(isinstance(inner, ast.Assert) for inner in ast.walk(node)):
        return True
    return any(name in ("raises", "warns") or name.startswith(CHECKS) for _, name in calls(node))


def faults(tree: ast.Module) -> list[str]:
    """Tests without a check, checks that a condition may skip, and comparisons whose result is thrown away."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            if not is_check(node):
                found.append(f"{node.name} checks nothing")
            branches = [inner for inner in ast.walk(node) if isinstance(inner, ast.If)]
            if any(isinstance(inner, ast.Assert) for branch in branches for inner in ast.walk(branch)):
                found.append(f"{node.name} asserts under an if")
        if isinstance(node, ast.Expr):
            if isinstance(node.value, ast.Call):
                discarded = [name for call, name in calls(node.value) if call is node.value]
                if discarded[0] in ("equal", "allclose", "isclose", "array_equal", "isfinite"):
                    found.append(f"line {node.lineno}: result of {discarded[0]} is thrown away")
            elif isinstance(node.value, ast.Compare):
                found.append(f"line {node.lineno}: result of a comparison is thrown away")
    return found


@pytest.mark.parametrize("path", TEST_FILES, ids=by_path)
def test_tests_can_fail(path):
    found = faults(ast.parse(path.read_text()))
    assert not found, f"{by_path(path)}: {found}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def test_a():\n    f()", 1),
        ("def test_a():\n    assert f()", 0),
        ("def test_a():\n    assert_close(a, b)", 0),
        ("def test_a():\n    torch.testing.assert_close(a, b)", 0),
        ("def test_a():\n    with pytest.raises(ValueError):\n        f()", 0),
        ("def test_a():\n    if x:\n        assert f()", 1),
        ("def test_a():\n    for x in y:\n        assert f()", 0),
        ("def test_a():\n    torch.equal(a, b)\n    assert c", 1),
        ("def test_a():\n    torch.allclose(a, b)", 2),
        ("def test_a():\n    a == b\n    assert c", 1),
        ("def helper():\n    f()", 0),
        ("class T:\n    def test_a(self):\n        f()", 1),
    ],
)
def test_test_check_catches(source, found):
    assert len(faults(ast.parse(source))) == found
