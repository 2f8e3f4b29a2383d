"""The documentation page of every pass, generated from its docstring, options and golden case."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.passes.registry import PASSES
from octavo.passes.spec import options_of

if TYPE_CHECKING:
    from octavo.ir.facts import Fact
    from octavo.passes.base import Pass

_CASE_END = "// -----\n"


def pages(goldens: Path) -> dict[str, str]:
    """File name → Markdown; `goldens` may hold `NAME.txt`, whose first case is the example."""
    return {f"{name}.md": _page(pass_, goldens) for name, pass_ in PASSES.items()}


def differing(folder: Path, expected: dict[str, str]) -> tuple[str, ...]:
    """Pages that a folder lacks, has in another form, or has although no pass needs them."""
    present = {p.name: p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.md"))}
    names = sorted(expected.keys() | present.keys())
    return tuple(name for name in names if expected.get(name) != present.get(name))


def write_pages(folder: Path, expected: dict[str, str]) -> None:
    """Make the folder hold exactly these pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.md"):
        if stale.name not in expected:
            stale.unlink()
    for name, text in expected.items():
        (folder / name).write_text(text, encoding="utf-8")


def summary(pass_: type[Pass]) -> str:
    """The first sentence of a pass's docstring."""
    return inspect.cleandoc(pass_.__doc__ or "").partition("\n\n")[0].replace("\n", " ")


def _page(pass_: type[Pass], goldens: Path) -> str:
    # Each bold heading of a docstring starts a paragraph of its own.
    text = inspect.cleandoc(pass_.__doc__ or "").replace("\n**", "\n\n**")
    parts = [f"# {pass_.name}", text, _options(pass_), _facts(pass_)]
    if example := _example(pass_.name, goldens):
        parts.append(f"## Example\n\n```\n{example}\n```")
    return "\n\n".join(parts) + "\n"


def _options(pass_: type[Pass]) -> str:
    options = options_of(pass_)
    if not options:
        return "## Options\n\nNone."
    # A bar ends a table cell, even inside code.
    rows = [
        f"| `{name}` | {kind.replace('|', ' or ')} | `{default}` |"
        for name, (kind, default) in options.items()
    ]
    return "\n".join(["## Options\n", "| option | type | default |", "|--|--|--|", *rows])


def _facts(pass_: type[Pass]) -> str:
    rows = (
        ("Requires", pass_.requires),
        ("Produces", pass_.produces),
        ("Preserves", pass_.preserves),
    )
    lines = [
        f"- {label}: {', '.join(map(_fact_name, kinds)) or 'nothing'}" for label, kinds in rows
    ]
    return "## Facts\n\n" + "\n".join(lines)


def _fact_name(kind: type[Fact]) -> str:
    return "every fact" if kind.__name__ == "Fact" else kind.__name__


def _example(name: str, goldens: Path) -> str:
    path = goldens / f"{name}.txt"
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8").partition(_CASE_END)[0].strip()
