"""Seconds of planned nodes from two profiles of any runtime: the source's and the artifact's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.ir.artifact import PlannedNode


def latency_rows(
    planned: Sequence[PlannedNode],
    float_seconds: Mapping[str, float],
    lowered_seconds: Mapping[str, float],
    weighted: Collection[str],
) -> dict[str, dict[str, float]]:
    """Seconds by node and method; `weighted` are the operators that have weights.

    A node without weights that has no kernel is part of another one, and takes none; one with
    weights that is not found has no entry.
    """
    rows: dict[str, dict[str, float]] = {}
    for node in planned:
        method = node.option.partition(":")[0]
        found = {"float": float_seconds.get(node.node)}
        if method not in ("float", "storage") and not node.absorbed_by:
            found[method] = lowered_seconds.get(node.node)
        missing = None if node.op_type in weighted and not node.absorbed_by else 0.0
        known = {m: missing if s is None else s for m, s in found.items()}
        rows[node.node] = {m: s for m, s in known.items() if s is not None}
    return rows
