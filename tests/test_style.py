"""Limits on the sources that no linter of ours checks: sizes, names, printing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ir", "passes", "backends", "models", "cli", "cli/octavo")
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 40
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
IDS = [str(path.relative_to(ROOT)) for path in FILES]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def _lines(function: Function) -> int:
    """Lines of a function without its docstring."""
    assert function.end_lineno is not None
    length = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is None or first.end_lineno is None:
        return length
    return length - (first.end_lineno - first.lineno + 1)


def _undocumented(body: list[ast.stmt], prefix: str = "") -> list[str]:
    """Public functions and classes without a docstring; properties and overrides say it once."""
    missing = []
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            missing += [] if ast.get_docstring(node) else [node.name]
        elif not prefix and not ast.get_docstring(node):
            missing.append(node.name)
    return missing


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, Function)]
    assert {f.name: n for f in functions if (n := _lines(f)) > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_names_say_what_is_inside(path: Path) -> None:
    assert not VAGUE & set(path.stem.split("_"))


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_modules_and_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert _undocumented(tree.body) == []


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_render_prints(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if _prints(n)]
    assert not calls or path == ROOT / "cli" / "render.py"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_nothing_is_left_open(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [mark for mark in ("TODO", "FIXME", "XXX", "NotImplementedError") if mark in text]


def _prints(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
