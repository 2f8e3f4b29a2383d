"""Imports point down, cli → {passes, backends, models} → ir, and heavy ones wait."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "ir": {"ir"},
    "passes": {"passes", "ir"},
    "backends": {"backends", "ir"},
    "models": {"models", "ir"},
    "cli": {"cli", "passes", "backends", "models", "ir"},
}
# Third parties that only some modules may touch.
ONLY_IN = {
    "onnxruntime": {"backends"},
    "typer": {"cli", "models"},
    **{name: {"cli"} for name in ("rich", "jinja2", "matplotlib")},
}
HEAVY = (
    *("numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich", "torch", "networkx"),
    *("jinja2", "matplotlib"),
)
FILES = [
    (layer, path)
    for layer in MAY_IMPORT
    for path in sorted((ROOT / layer).glob("octavo/*.py" if layer == "cli" else "*.py"))
] + [("cli", path) for path in sorted((ROOT / "cli").glob("*.py"))]
IDS = [str(path.relative_to(ROOT)) for _, path in FILES]


def _imports(nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names that import statements among the nodes load."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
    return names


def _on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no function bodies, no type checking."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _on_import(child)


def test_every_layer_has_files() -> None:
    assert {layer for layer, _ in FILES} == MAY_IMPORT.keys()
    assert ("cli", ROOT / "cli" / "octavo" / "__init__.py") in FILES


@pytest.mark.parametrize(("layer", "path"), FILES, ids=IDS)
def test_imports_point_down(layer: str, path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name in _imports(ast.walk(tree)):
        package, _, rest = name.partition(".")
        if package == "octavo" and rest and rest != "api":
            assert rest.partition(".")[0] in MAY_IMPORT[layer], name
        assert layer in ONLY_IN.get(package, MAY_IMPORT), name
        assert package not in MAY_IMPORT, f"{name}: import octavo.{name}"


def _may_load_torch(layer: str, path: Path) -> bool:
    """Modules that load torch when imported; nobody may import them when imported."""
    return layer == "models" or (layer == "ir" and path.name.startswith("torch_"))


@pytest.mark.parametrize(("layer", "path"), FILES, ids=IDS)
def test_torch_is_imported_only_when_it_is_needed(layer: str, path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    anywhere = {name.partition(".")[0] for name in _imports(ast.walk(tree))}
    at_import = _imports(_on_import(tree))
    if "torch" in anywhere:
        assert _may_load_torch(layer, path) or path.name in ("read_torch.py", "read_pt2.py")
    if not _may_load_torch(layer, path):
        assert not {name for name in at_import if name.partition(".")[0] == "torch"}
        assert not {name for name in at_import if name.startswith("octavo.ir.torch_")}


@pytest.mark.parametrize("statement", ["import octavo", "import octavo.cli.main"])
def test_starting_up_loads_nothing_heavy(statement: str) -> None:
    loaded = f"{statement}, sys; print(*(n for n in {HEAVY} if n in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.split() == []
