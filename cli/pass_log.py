"""The log of passes for people: one row a pass, and one pass in full."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.cli.render import format_bytes, format_seconds, print_json, print_message, print_table
from octavo.ir.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from octavo.passes.record import PassRecord

_COLUMNS = ("#", "pass", "status", "time", "peak", "nodes", "weights", "applied", "missed")


def inspect_log(path: Path, number: int | None, as_json: bool) -> None:
    """Print the log file, or one of its passes (`number` counts from 1)."""
    from octavo.passes.record import read_records

    header, records = read_records(path)
    if number is not None and number > len(records):
        raise UsageError(f"there is no pass {number}", where=str(path), hint=f"1 to {len(records)}")
    chosen = records if number is None else records[number - 1 : number]
    if as_json:
        print_json({"header": header.to_json(), "passes": [r.to_json() for r in chosen]})
    elif number is None:
        print_message(f"{header.pipeline}\non {header.source.name}, seed {header.seed}")
        print_table(_COLUMNS, [_cells(record) for record in records])
    else:
        _print_pass(chosen[0])


def _cells(record: PassRecord) -> tuple[object, ...]:
    kinds = [remark.kind for remark in record.remarks]
    before, after = record.before, record.after
    return (
        record.index + 1,
        record.spec,
        record.status,
        format_seconds(record.seconds),
        format_bytes(record.peak_bytes or None),
        _change(str(sum(before.nodes.values())), str(sum(after.nodes.values()))),
        _change(format_bytes(before.weight_bytes), format_bytes(after.weight_bytes)),
        kinds.count("applied"),
        kinds.count("missed"),
    )


def _print_pass(record: PassRecord) -> None:
    print_message(
        f"pass {record.index + 1}: {record.spec}\n"
        f"{record.status}, {format_seconds(record.seconds)} and "
        f"{format_seconds(record.verify_seconds)} to verify, "
        f"peak {format_bytes(record.peak_bytes or None) or 'not measured'}"
    )
    for label, names in (("facts added", record.facts_added), ("dropped", record.facts_dropped)):
        if names:
            print_message(f"{label}: {', '.join(names)}")
    before, after = record.before.nodes, record.after.nodes
    operators = [
        (op_type, before.get(op_type, 0), after.get(op_type, 0))
        for op_type in sorted(before.keys() | after.keys())
        if before.get(op_type, 0) != after.get(op_type, 0)
    ]
    changes = {"-": record.diff.removed, "+": record.diff.added, "~": record.diff.changed}
    tables: tuple[tuple[tuple[str, ...], list[tuple[object, ...]]], ...] = (
        (("operator", "before", "after"), [*operators]),
        (("", "node"), [(mark, name) for mark, names in changes.items() for name in names]),
        (("counter", "times"), [*record.counters.items()]),
        (("remark", "where", "text"), [(r.kind, r.where, r.text) for r in record.remarks]),
    )
    for columns, rows in tables:
        if rows:
            print_table(columns, rows)


def _change(before: str, after: str) -> str:
    return after if before == after else f"{before} → {after}"
