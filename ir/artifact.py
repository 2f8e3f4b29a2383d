"""What a compilation leaves on disk, and the proof of what runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from octavo.ir.calibration import Feed


@final
@dataclass(frozen=True)
class PlannedNode:
    """One source node as lowering left it.

    `output` is the name of the value that carries its result in the lowered graph, by which the
    runtime's fused kernel is found; `absorbed_by` names the node whose kernel includes it.
    `kernels` are the `domain::op_type` names that fulfil the plan (empty: any float kernel).
    """

    node: str
    op_type: str
    option: str
    reason: str
    output: str
    kernels: tuple[str, ...]
    weight_bytes: int
    source_bytes: int
    absorbed_by: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


def with_absorbed(planned: Sequence[PlannedNode]) -> list[PlannedNode]:
    """The planned nodes, each followed by those its kernel includes."""
    absorbed: dict[str, list[PlannedNode]] = {}
    for node in planned:
        absorbed.setdefault(node.absorbed_by, []).append(node)
    return [n for head in absorbed.get("", ()) for n in (head, *absorbed.get(head.node, ()))]


@final
@dataclass(frozen=True)
class Artifact:
    """A lowered model on disk, its planned nodes and the session options it relies on.

    `beside` are texts by file name that the target's users want beside the model.
    """

    path: Path
    target: str
    planned: tuple[PlannedNode, ...]
    session_options: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of all emitted files."""
        return sum(f.stat().st_size for f in self.path.parent.glob(self.path.name + "*"))


@final
@dataclass(frozen=True)
class AuditRow:
    """Which kernel a planned node got; `ok` is false when it is not what was planned."""

    node: str
    op_type: str
    option: str
    kernel: str
    ok: bool
    reason: str
    seconds: float | None = None


@final
@dataclass(frozen=True)
class Audit:
    """The proof: one row per planned node, findings on the whole graph, and what was run."""

    rows: tuple[AuditRow, ...]
    findings: tuple[str, ...]
    kernels: Mapping[str, int]
    environment: str

    @property
    def seen(self) -> bool:
        """Whether kernels were seen at all, or only rules were checked."""
        return bool(self.kernels) or not self.rows

    @property
    def ok(self) -> bool:
        return not self.findings and all(row.ok for row in self.rows)

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "ok": self.ok}


@final
@dataclass(frozen=True)
class BenchRow:
    """Latency of one file: median and spread over rounds, and its speed against the first file.

    `speed` is the median over rounds of (seconds of the first file / seconds of this file).
    """

    file: str
    bytes: int
    median_seconds: float
    low_seconds: float
    high_seconds: float
    speed: float


@final
@dataclass(frozen=True)
class Bench:
    """Interleaved latencies: round k times every file once, after warm-up, on `threads` threads.

    Without rounds nothing was timed: rows tell bytes, `environment` says why.
    """

    rows: tuple[BenchRow, ...]
    threads: int
    rounds: int
    shapes: Mapping[str, str]
    environment: str

    @property
    def timed(self) -> bool:
        return self.rounds > 0

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@final
@dataclass(frozen=True)
class Probes:
    """Inputs and the outputs an artifact gave for them; `octavo verify` replays them."""

    feeds: tuple[Feed, ...]
    outputs: tuple[Feed, ...]
