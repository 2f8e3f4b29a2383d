"""What one pass did, as data; the log is these records and nothing else."""

from __future__ import annotations

import json
import typing
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

import onnx_ir

from octavo.ir.errors import UsageError
from octavo.ir.model import Source, weight_bytes
from octavo.ir.versions import versions
from octavo.passes.base import Remark

if TYPE_CHECKING:
    from collections.abc import Iterable

    from octavo.ir.model import Model

Json = dict[str, object]
FORMAT = 1


@final
@dataclass(frozen=True)
class Header:
    """The first line of a log: what ran on what, with which versions and seed."""

    pipeline: str
    source: Source
    target: str
    seed: int
    versions: dict[str, str] = field(default_factory=versions)
    format: int = FORMAT

    def to_json(self) -> Json:
        """The header without the folder of the source, which concerns nobody else."""
        source = replace(self.source, name=Path(self.source.name).name)
        return asdict(replace(self, source=source))


@final
@dataclass(frozen=True)
class GraphSummary:
    """A model in numbers: node count by operator, weight bytes, weight bytes by dtype."""

    fingerprint: str
    nodes: dict[str, int]
    weight_bytes: int
    bytes_by_dtype: dict[str, int]


@final
@dataclass(frozen=True)
class GraphDiff:
    """Node names that one pass added, removed, or rewired (same name, other line)."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


@final
@dataclass(frozen=True)
class PassRecord:
    """The whole story of one pass run; `seconds` excludes verification."""

    index: int
    spec: str
    status: Literal["changed", "unchanged", "failed"]
    seconds: float
    verify_seconds: float
    peak_bytes: int
    before: GraphSummary
    after: GraphSummary
    diff: GraphDiff
    facts_added: tuple[str, ...] = ()
    facts_dropped: tuple[str, ...] = ()
    counters: dict[str, int] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()
    damage: float | None = None

    def to_json(self) -> Json:
        return asdict(self)

    @staticmethod
    def from_json(line: typing.Any) -> PassRecord:
        """The record that `to_json` wrote; KeyError or TypeError where it did not."""
        kept = {
            "before": GraphSummary(**line["before"]),
            "after": GraphSummary(**line["after"]),
            "diff": GraphDiff(**{kind: tuple(names) for kind, names in line["diff"].items()}),
            "facts_added": tuple(line["facts_added"]),
            "facts_dropped": tuple(line["facts_dropped"]),
            "remarks": tuple(Remark(**remark) for remark in line["remarks"]),
        }
        return PassRecord(**{**line, **kept})


def line(entry: Header | PassRecord) -> str:
    """A header or a record as one line of a log."""
    return json.dumps(entry.to_json()) + "\n"


def write_records(path: Path, header: Header, records: Iterable[PassRecord]) -> None:
    """Write a whole log; `JsonLog` writes the same lines while passes run."""
    path.write_text(line(header) + "".join(map(line, records)), encoding="utf-8")


def read_records(path: Path) -> tuple[Header, tuple[PassRecord, ...]]:
    """The header and the records of a log file.

    Raises UsageError where the file is missing or is no log of this format.
    """
    try:
        with path.open(encoding="utf-8") as file:
            first, *lines = map(json.loads, file)
        if first["format"] != FORMAT:
            message = f"{path.name} has format {first['format']}, this octavo reads {FORMAT}"
            raise UsageError(message, where=str(path))
        header = Header(**{**first, "source": Source(**first["source"])})
        return header, tuple(map(PassRecord.from_json, lines))
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path.name} is not a pass log"
        raise UsageError(message, where=str(path), why=f"{type(error).__name__}: {error}") from None


def summarise(model: Model) -> GraphSummary:
    """Counts and bytes of a model, subgraphs included."""
    nodes: Counter[str] = Counter()
    by_dtype: Counter[str] = Counter()
    seen: set[int] = set()
    for graph in (model.graph, *model.graph.subgraphs()):
        nodes.update(qualified(node) for node in graph)
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                by_dtype[tensor.dtype.name] += tensor.nbytes
    ordered = dict(sorted(nodes.items()))
    return GraphSummary(
        model.fingerprint, ordered, weight_bytes(model), dict(sorted(by_dtype.items()))
    )


def structural_diff(before: Model, after: Model) -> GraphDiff:
    """What changed between two models, by node name."""
    old, new = _by_name(before), _by_name(after)
    return GraphDiff(
        added=tuple(sorted(new.keys() - old.keys())),
        removed=tuple(sorted(old.keys() - new.keys())),
        changed=tuple(sorted(n for n in old.keys() & new.keys() if old[n] != new[n])),
    )


def qualified(node: onnx_ir.Node) -> str:
    """`Conv` for the standard domain, `com.microsoft::QGemm` for others."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def _by_name(model: Model) -> dict[str, tuple[object, ...]]:
    return {
        node.name or "": (
            qualified(node),
            tuple(v.name if v is not None else None for v in node.inputs),
            tuple(v.name for v in node.outputs),
            tuple(f"{k}={a.value!r}" for k, a in sorted(node.attributes.items()) if not a.is_ref()),
        )
        for node in model.graph
    }
