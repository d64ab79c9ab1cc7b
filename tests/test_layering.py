"""The structure of the package: what may import what, and that tests can fail.

Six rules:

1. A package imports only from packages above it in `PACKAGES`.
2. Inside a package no modules import each other in a circle.
3. Nothing imports from the root: `residrop/__init__.py` only lists names for users.
4. `common`, `schedule` and the command line's entry need no torch.
5. The packages up to `subnetworks` import nothing at the top of a file but Python, torch, numpy and safetensors.
6. Only `__main__` imports `cli`.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import residrop

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "residrop"
FILES = sorted(SOURCE.rglob("*.py"))
TEST_FILES = sorted(TESTS.rglob("*.py"))

PACKAGES = (
    *("common", "schedule", "functional", "rules", "blocks", "engines", "models", "surgery", "inference", "theory"),
    *("subnetworks", "data", "training", "research", "cli"),
)
WITHOUT_TORCH = ("common", "schedule")
LIGHT = PACKAGES[: PACKAGES.index("subnetworks") + 1]
ALLOWED = {"torch", "numpy", "safetensors", "residrop", *sys.stdlib_module_names}
# these modules are glue for another library, and are imported by whoever has it
GLUE = {"engines.integrations.lightning", "engines.integrations.transformers"}


def module_of(path: Path, root: Path = SOURCE) -> str:
    """Dotted name of a source file below residrop; "" is residrop/__init__.py."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(tree: ast.AST, *, top: bool = False) -> Iterator[str]:
    """Absolute dotted names of everything imported in a file, or at the `top` of it, outside of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types(node))):
            yield from imports(node, top=top)


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def ours(tree: ast.AST, *, top: bool = False) -> list[str]:
    """The same for residrop's own names, without "residrop."."""
    return [name.removeprefix("residrop").removeprefix(".") for name in imports(tree, top=top) if is_ours(name)]


def is_ours(name: str) -> bool:
    return name.split(".")[0] == "residrop"


def violations(tree: ast.AST, module: str) -> list[str]:
    """What a file imports from the root, or from a package that is not above its own."""
    mine = module.split(".")[0]
    place = PACKAGES.index(mine) if mine in PACKAGES else len(PACKAGES)
    above = (*PACKAGES[:place], mine)
    return [name or "residrop" for name in ours(tree) if name.split(".")[0] not in above]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def by_path(path: Path) -> str:
    return str(path.relative_to(TESTS.parent))


every_file = pytest.mark.parametrize("path", [path for path in FILES if module_of(path)], ids=by_path)


def test_the_package_holds_the_packages_and_nothing_else():
    names = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert names == {*PACKAGES, "__init__.py", "__main__.py", "py.typed"}


@every_file
def test_imports_go_down(path):
    assert not violations(parsed(path), module_of(path))


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("from residrop.rules.base import Rule", "blocks.attach", 0),
        ("from residrop.blocks.attach import attach", "rules.base", 1),
        ("from residrop import functional", "rules.base", 0),
        ("from residrop import attach", "rules.base", 1),
        ("from residrop import Rule", "cli", 1),
        ("import residrop", "cli", 1),
        ("import residrop.rules", "cli", 0),
        ("def f():\n    import residrop.cli", "rules.base", 1),
        ("from residrop.models.blocks import conv", "models.cifar", 0),
        ("from residrop.training import loop", "models.cifar", 1),
        ("import math, torch", "rules.base", 0),
        ("from residrop.unknown import x", "cli", 1),
        ("from residrop.cli import main", "__main__", 0),
    ],
)
def test_layering_check_catches(source, module, found):
    assert len(violations(ast.parse(source), module)) == found


def links(module: str, top: bool) -> set[str]:
    """The modules that a module imports."""
    found = set()
    for name in ours(parsed(MODULES[module]), top=top):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name and name != module:
            found.add(name)
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes on or before a circle of a graph; none if there is no circle."""
    left = dict(graph)
    while free := [node for node, to in left.items() if not any(other in left for other in to)]:
        for node in free:
            del left[node]
    return sorted(left)


def test_no_circles():
    """Not even through the `__init__.py` of the packages that are imported on the way."""
    assert not circle({module: links(module, top=True) for module in MODULES})


def test_circle_check_catches():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def depth_of(graph: dict[str, set[str]]) -> int:
    @cache
    def depth(node: str) -> int:
        return 1 + max((depth(other) for other in graph[node]), default=0)

    return max(map(depth, graph))


def test_at_most_thirteen_layers():
    graph = {package: set() for package in PACKAGES}
    for module in filter(None, MODULES):
        mine = module.split(".")[0]
        if mine in graph:
            graph[mine] |= {other.split(".")[0] for other in links(module, top=False)} - {mine}
    assert depth_of(graph) <= 13


def test_names_of_the_root_are_those_that_type_checkers_see():
    (block,) = [node for node in parsed(SOURCE / "__init__.py").body if is_for_types(node)]
    seen = set(imports(block))
    assert seen == {f"{module}.{name}" for module, names in residrop._NAMES.items() for name in names}
    assert all(getattr(residrop, name) is not None for names in residrop._NAMES.values() for name in names)
    assert set(residrop._PACKAGES) == set(PACKAGES) - {"cli"}
    with pytest.raises(AttributeError, match="module 'residrop' has no attribute 'atach'"):
        residrop.atach  # noqa: B018


# What importing costs


@pytest.mark.parametrize("path", [p for p in FILES if module_of(p).split(".")[0] in LIGHT], ids=by_path)
def test_the_core_needs_nothing_but_torch_numpy_and_safetensors(path):
    roots = {name.split(".")[0] for name in imports(parsed(path), top=True)}
    package, module = module_of(path).split(".")[0], module_of(path)
    allowed = ALLOWED - ({"torch", "numpy"} if package in WITHOUT_TORCH else set())
    assert roots <= allowed or module in GLUE, f"import {roots - allowed} inside the functions that need them"


def loaded(code: str) -> set[str]:
    """The top-level modules, and torch._dynamo, that a fresh interpreter has loaded after `code`."""
    report = (
        "import sys; print(*{m.split('.')[0] for m in sys.modules} | {m for m in sys.modules if m == 'torch._dynamo'})"
    )
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


SLOW_TO_IMPORT = {"scipy", "torchvision", "torchmetrics", "matplotlib", "sklearn", "pyarrow", "torch._dynamo"}
RUN = "import sys, residrop.cli\ntry:\n    residrop.cli.main({!r})\nexcept SystemExit:\n    pass"


def test_importing_residrop_loads_nothing_slow():
    names = "from residrop import apply, attach, predict, fold, create, StochasticDepth, Swapout, observe, recalibrate"
    found = loaded(names)
    assert "torch" in found
    assert not found & SLOW_TO_IMPORT


@pytest.mark.parametrize("arguments", [["--help"], ["trian"], []])
def test_help_and_mistyped_commands_need_no_torch(arguments):
    assert not loaded(RUN.format(arguments)) & {"torch", *SLOW_TO_IMPORT}


def test_help_of_train_needs_no_torchvision_and_no_compiler():
    assert not loaded(RUN.format(["train", "--help"])) & SLOW_TO_IMPORT


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
