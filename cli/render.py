"""Everything the command prints: tables, JSON, messages, errors."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import typer

# The option of every command that prints a table.
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
_WIDE = 10_000
_UNITS = ("B", "kB", "MB", "GB", "TB")


def print_message(text: str) -> None:
    """One line or more on standard output."""
    print(printable(text))


def print_error(text: str) -> None:
    """`error: …` on standard error."""
    print(printable(f"error: {text}"), file=sys.stderr)


def print_warning(text: str) -> None:
    """`warning: …` on standard error."""
    print(printable(f"warning: {text}"), file=sys.stderr)


def print_json(content: object) -> None:
    """A JSON document on standard output; what is no finite number becomes null."""
    print(json.dumps(_finite(content), indent=1, allow_nan=False))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = ""
) -> None:
    """A table with names in full; columns of numbers are aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[printable(str(cell)) for cell in row] for row in rows]
    table = Table(
        title=Text(printable(title)) if title else None,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
    )
    for index, column in enumerate(columns):
        numeric = all(_is_number(row[index]) for row in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    if sys.stdout.isatty():
        Console(highlight=False).print(table, end="\n\n")
        return
    # A pipe has no width: never cut what a program may want to read.
    buffer = io.StringIO()
    Console(file=buffer, width=_WIDE, highlight=False).print(table)
    print("\n".join(line.rstrip() for line in buffer.getvalue().splitlines()), end="\n\n")


def printable(text: str) -> str:
    """The text with control characters escaped: names come from models nobody has checked."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def format_bytes(count: int | None) -> str:
    """`4.9 MB`, in powers of 1000; nothing for an unknown size."""
    if count is None:
        return ""
    size, unit = float(count), 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {_UNITS[unit]}" if unit else f"{count} B"


def format_seconds(seconds: float | None) -> str:
    """`1.23 ms`; nothing for what was not measured."""
    if seconds is None:
        return ""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def _finite(content: object) -> object:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _is_number(cell: str) -> bool:
    return not cell or cell.lstrip("-+")[:1].isdigit()
