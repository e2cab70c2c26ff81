"""Who may import whom (docs/architecture.md), read from the source of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "framework" / "numagraft"
OPERATORS = ROOT / "operators"

# A component is a module of the package root or a folder of it. Lower layers first; a component may import what stands in
# its own row or above. `operators` and `cli` have rules of their own below.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "sizes"}),
    frozenset({"platform", "runtime", "placement"}),
    frozenset({"native"}),
    frozenset({"report", "doctor", "contract", "registry"}),
    frozenset({"rulefile", "presets", "sharing", "params"}),
    frozenset({"roles", "matching"}),
    frozenset({"planning", "plans"}),
    frozenset(
        {"checkpoints", "skeleton", "crossings", "injection", "preflight", "progress", "tied", "guards", "stats"}
    ),
    frozenset({"loading", "quantizer"}),
    frozenset({"api"}),
    frozenset({"cli"}),
)
OPERATORS_MAY_IMPORT = {"errors", "placement", "contract", "native", "platform", "operators"}
WITHOUT_TORCH = ("errors", "platform", "placement", "runtime", "native", "report", "doctor", "rulefile", "presets")


def component_of(module: str) -> str:
    """`numagraft.rulefile.rules` -> `rulefile`; the root itself -> ``."""
    return module.split(".")[1] if "." in module else ""


def sources() -> list[tuple[str, Path]]:
    found = [("numagraft", path) for path in PACKAGE.rglob("*.py")]
    return found + [("numagraft.operators", path) for path in OPERATORS.rglob("*.py")]


def module_name(root: str, path: Path) -> str:
    base = PACKAGE if root == "numagraft" else OPERATORS
    parts = [part for part in path.relative_to(base).with_suffix("").parts if part != "__init__"]
    return ".".join([root, *parts])


def imports_of(text: str) -> list[tuple[int, str, bool]]:
    """(line, module, at import time) for every absolute import of numagraft and torch in a source text."""
    tree = ast.parse(text)
    type_checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in type_checking:
            continue
        eager = id(node) not in late
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, eager) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "numagraft":
                found += [(node.lineno, f"numagraft.{alias.name}", eager) for alias in node.names]
            else:
                found.append((node.lineno, node.module, eager))
    return found


def violations(module: str, text: str) -> list[str]:
    """Every import in `text` (the source of `module`) that the layers forbid."""
    own = component_of(module)
    height = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    wrong = []
    for line, name, eager in imports_of(text):
        root = name.split(".")[0]
        if root in ("torch", "transformers") and own in WITHOUT_TORCH and eager:
            wrong.append(f"{module}:{line} imports {name}, but {own} imports no torch")
        if root != "numagraft":
            continue
        target = component_of(name)
        if target == "_native":
            if own != "native":
                wrong.append(f"{module}:{line} imports {name}; only numagraft.native may")
        elif own == "operators":
            if target not in OPERATORS_MAY_IMPORT:
                wrong.append(f"{module}:{line} imports {name}; operators may import {sorted(OPERATORS_MAY_IMPORT)}")
        elif target == "operators":
            wrong.append(f"{module}:{line} imports {name}; operators are named only in the registry's table")
        elif own and target in height and own in height and height[target] > height[own]:
            wrong.append(f"{module}:{line} imports {name}, a layer above {own}")
    return wrong


def test_every_component_has_a_layer():
    known = {name for layer in LAYERS for name in layer} | {"", "__main__", "operators"}
    found = {component_of(module_name(root, path)) for root, path in sources()}
    assert found <= known, f"give these a layer in this test and in docs/architecture.md: {sorted(found - known)}"


@pytest.mark.parametrize(("root", "path"), sources(), ids=lambda value: value if isinstance(value, str) else value.name)
def test_imports_go_down(root, path):
    assert violations(module_name(root, path), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("numagraft.errors", "import numagraft.api"),
        ("numagraft.platform.detect", "import torch"),
        ("numagraft.planning", "from numagraft._native import Runtime"),
        ("numagraft.planning", "from numagraft.operators.linear import Linear"),
        ("numagraft.operators.linear", "from numagraft.planning import Plan"),
        ("numagraft.placement", "def f():\n    from numagraft import api"),
    ],
)
def test_a_forbidden_import_is_seen(module, text):
    assert violations(module, text)


def test_allowed_imports_are_not_reported():
    assert violations("numagraft.planning", "from numagraft.placement import Placement\nimport torch") == []
    assert violations("numagraft.platform.x", "def f():\n    import torch") == []


@pytest.mark.parametrize("component", WITHOUT_TORCH)
def test_importing_it_loads_no_torch(component):
    code = f"import numagraft.{component}, sys; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert shown == "False"


NATIVE = ROOT / "native"
NATIVE_LAYERS = ("system", "memory", "threads", "kernels", "ops", "bindings")
NATIVE_MAY_INCLUDE = {
    "system": {"system"},
    "memory": {"memory", "system"},
    "threads": {"threads", "memory", "system"},
    "kernels": {"kernels", "system"},
    "ops": {"ops", "kernels", "threads", "memory", "system"},
    "bench": {"bench", "kernels", "threads", "memory", "system"},
    "bindings": {"bindings", "bench", "ops", "kernels", "threads", "memory", "system"},
}


def native_violations(folder: str, text: str) -> list[str]:
    wrong = []
    for line in text.splitlines():
        if not line.startswith("#include"):
            continue
        target = line.split()[1].strip('<>"')
        top = target.split("/")[0]
        if top in NATIVE_MAY_INCLUDE and top not in NATIVE_MAY_INCLUDE[folder]:
            wrong.append(f"{folder} includes {target}")
        if top in ("torch", "ATen", "c10") or (top in ("pybind11", "Python.h") and folder != "bindings"):
            wrong.append(f"{folder} includes {target}")
    return wrong


@pytest.mark.parametrize(
    "path",
    [path for suffix in ("h", "cpp", "inc") for path in NATIVE.rglob(f"*.{suffix}")],
    ids=lambda path: str(path.relative_to(NATIVE)),
)
def test_native_includes_go_down(path):
    assert native_violations(path.relative_to(NATIVE).parts[0], path.read_text()) == []


def test_a_forbidden_include_is_seen():
    assert native_violations("kernels", '#include "threads/runtime.h"')
    assert native_violations("ops", "#include <pybind11/pybind11.h>")
    assert native_violations("bindings", "#include <torch/torch.h>")
