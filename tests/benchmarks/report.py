"""Rows of results with their goals, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, final

from rich.console import Console
from rich.table import Table

Unit = Literal["bytes", "seconds", "speed", "score"]
_DIGITS = {"speed": 2, "seconds": 2, "score": 4, "bytes": 0}


@final
@dataclass(frozen=True)
class Goal:
    """A limit that a value has to reach or must not exceed."""

    limit: float
    at_least: bool

    def met(self, value: float, unit: Unit) -> bool:
        """Whether the value, as it is printed, keeps to the limit."""
        value, limit = round(float(value), _DIGITS[unit]), round(self.limit, _DIGITS[unit])
        return value >= limit if self.at_least else value <= limit


@final
@dataclass(frozen=True)
class Row:
    """One quantity of one model, by column (`FP32`, `octavo`, peers), with a goal for octavo."""

    quantity: str
    unit: Unit
    values: Mapping[str, float]
    goal: Goal | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        return self.goal.met(self.values["octavo"], self.unit) if self.goal else None

    def to_json(self) -> dict[str, object]:
        values = {name: float(value) for name, value in self.values.items()}
        return {**asdict(self), "values": values, "met": self.met}


def show(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Print the rows of one model."""
    columns = list(dict.fromkeys(name for row in rows for name in (*row.values, *row.notes)))
    table = Table("", *columns, "goal", "met", title=title, title_justify="left")
    for row in rows:
        cells = [_cell(row, name) for name in columns]
        table.add_row(row.quantity, *cells, _goal(row), _MET[row.met])
    console.print(table)


_MET = {True: "yes", False: "[red]NO[/red]", None: ""}


def _cell(row: Row, column: str) -> str:
    if column not in row.values:
        return row.notes.get(column, "")
    note = row.notes.get(column)
    return _format(row.values[column], row.unit) + (f" ({note})" if note else "")


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    return ("≥ " if row.goal.at_least else "≤ ") + _format(row.goal.limit, row.unit)


def _format(value: float, unit: Unit) -> str:
    if unit == "bytes":
        return f"{value / 1e6:.3f} MB"
    if unit == "speed":
        return f"{value:.2f}x"
    return f"{value:.2f} s" if unit == "seconds" else f"{value:.4f}"
