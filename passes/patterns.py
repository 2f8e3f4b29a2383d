"""Patterns that select nodes: a name, a glob, `re:REGEX`, or `type:OP`."""

from __future__ import annotations

import difflib
import fnmatch
import re
from typing import TYPE_CHECKING

from octavo.ir.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir

    from octavo.ir.model import Model


def select(model: Model, patterns: Sequence[str]) -> dict[str, str]:
    """Node name → the first pattern that selects it; a pattern without a match is an error."""
    selected: dict[str, str] = {}
    for pattern in patterns:
        matches = _matcher(pattern)
        found = [node.name or "" for node in model.graph if matches(node)]
        if not found:
            raise _unmatched(model, pattern)
        for name in found:
            selected.setdefault(name, pattern)
    return selected


def chosen(model: Model, only: Sequence[str], keep: Sequence[str]) -> list[onnx_ir.Node]:
    """The nodes that `only` selects (all where it is empty) and `keep` does not, in order.

    Raises UsageError where the two leave nothing.
    """
    kept = select(model, keep)
    wanted = select(model, only) if only else None
    found = [
        node
        for node in model.graph
        if node.name not in kept and (wanted is None or node.name in wanted)
    ]
    if not found and wanted:
        name, pattern = next(iter(wanted.items()))
        raise UsageError(
            f"every node that '{pattern}' selects is to be kept",
            where=f"node '{name}'",
            why=f"the pattern '{kept[name]}' of keep selects it too",
            hint="leave the node out of one of the two",
        )
    return found


def _matcher(pattern: str) -> Callable[[onnx_ir.Node], bool]:
    kind, _, rest = pattern.partition(":")
    if kind == "type" and rest:
        return lambda node: node.op_type == rest
    if kind == "re" and rest:
        try:
            compiled = re.compile(rest)
        except re.error as error:
            message = f"'{pattern}' is not a regular expression"
            raise UsageError(message, why=str(error)) from None
        return lambda node: compiled.search(node.name or "") is not None
    return lambda node: node.name == pattern or fnmatch.fnmatchcase(node.name or "", pattern)


def _unmatched(model: Model, pattern: str) -> UsageError:
    by_type = pattern.startswith("type:")
    known = {f"type:{n.op_type}" if by_type else n.name or "" for n in model.graph}
    close = difflib.get_close_matches(pattern, sorted(known), n=3, cutoff=0.3)
    return UsageError(
        f"the pattern '{pattern}' selects no node",
        where=model.source.name,
        hint=f"did you mean {' or '.join(close)}?" if close else "octavo inspect lists the nodes",
    )
