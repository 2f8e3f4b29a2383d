"""The proof of what OpenVINO runs: its runtime model and one profile, held against the plan."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import onnx

from octavo.backends.bench import bench
from octavo.backends.latency_rows import latency_rows
from octavo.backends.ov_session import environment, open_session
from octavo.backends.ov_target import OPENVINO, SUBGRAPH
from octavo.ir.artifact import Artifact, Audit, AuditRow, PlannedNode
from octavo.ir.backend import Timing
from octavo.ir.facts import Latencies
from octavo.ir.latency_table import NOMINAL_SECONDS_PER_BYTE

if TYPE_CHECKING:
    from pathlib import Path

    from octavo.backends.ov_session import Layer
    from octavo.ir.calibration import Feed

_ROUNDS = 20
# MatMul → Mul → Q → DQ → Softmax → Q → DQ → MatMul, as the lowered file spells it out.
_DEEPEST = 10
_INTEGER = ("u8", "i8")
_PACKED = (*_INTEGER, "u4", "i4")
_QUANTIZER = "FakeQuantize"
_WEIGHTED = {row.op_type for row in OPENVINO.rows if row.weights}


def audit(artifact: Artifact, feed: Feed, *, threads: int = 1) -> Audit:
    """Load the artifact as production does, run it, and find the layer of every planned node.

    A planned integer node passes if one of its layers has the type that was planned and computes
    in u8 or i8; one of blocks if its layer keeps the weight in the bits it was given.
    """
    options = artifact.session_options
    session = open_session(artifact.path, threads=threads, config=options, profiled=True)
    layers = session.layers(feed, 3)
    merged = _Merged.of(artifact, _Owned.of(artifact.planned, layers))
    rows = tuple(_row(n, merged.layers(n.absorbed_by or n.node)) for n in artifact.planned)
    kernels = Counter(f"{layer.kind} {layer.precision}" for layer in layers)
    return Audit(rows, (), dict(sorted(kernels.items())), environment(threads))


def _row(planned: PlannedNode, layers: Sequence[Layer]) -> AuditRow:
    accepted = [layer for layer in layers if _fulfils(planned, layer)]
    shown = next(iter(accepted or layers), None)
    missed = bool(planned.kernels) and not accepted
    reason = planned.reason
    if missed and shown is None:
        reason = "no layer has its name or its output"
    elif missed and shown is not None:
        reason = f"openvino runs it as {shown.kind} in {shown.precision} ({shown.kernel})"
    return AuditRow(
        node=planned.node,
        op_type=planned.op_type,
        option=planned.option,
        kernel=f"{shown.kind} {shown.precision}" if shown else "merged",
        ok=not missed,
        reason=reason,
        seconds=sum(layer.seconds for layer in layers) if layers else None,
    )


def _fulfils(planned: PlannedNode, layer: Layer) -> bool:
    if layer.kind not in planned.kernels:
        return False
    if planned.option.startswith("weight-only"):
        return layer.weights in _PACKED
    return layer.precision in _INTEGER


@final
@dataclass(frozen=True)
class _Owned:
    """Layers by the planned nodes they compute, and the seconds of each decision.

    A layer counts for every node it was made of, and its seconds for one: the first with weights.
    """

    layers: Mapping[str, Sequence[Layer]]
    seconds: Mapping[str, float]

    @staticmethod
    def of(planned: Sequence[PlannedNode], layers: Sequence[Layer]) -> _Owned:
        heads: dict[str, str] = {}
        for node in planned:
            for name in (node.node, node.output, f"{node.output}_q"):
                heads.setdefault(name, node.absorbed_by or node.node)
        weighted = {node.node for node in planned if node.op_type in _WEIGHTED}
        by_node: dict[str, list[Layer]] = defaultdict(list)
        seconds: dict[str, float] = defaultdict(float)
        for layer in layers:
            owners = list(dict.fromkeys(_owners(layer, heads)))
            if layer.kind == _QUANTIZER or not owners:
                continue
            for owner in owners:
                by_node[owner].append(layer)
            first = next((name for name in owners if name in weighted), owners[0])
            seconds[first] += layer.seconds
        return _Owned(by_node, seconds)


@final
@dataclass(frozen=True)
class _Merged:
    """Layers of every planned node; of one without its own, the attention it is part of.

    `readers` are the nodes of the lowered file by the values they read, `made` its values by node.
    """

    owned: _Owned
    readers: Mapping[str, Sequence[str]]
    made: Mapping[str, Sequence[str]]

    @staticmethod
    def of(artifact: Artifact, owned: _Owned) -> _Merged:
        readers: dict[str, list[str]] = defaultdict(list)
        made: dict[str, Sequence[str]] = {}
        for node in onnx.load(artifact.path, load_external_data=False).graph.node:
            made[node.name] = list(node.output)
            for value in node.input:
                readers[value].append(node.name)
        return _Merged(owned, readers, made)

    def layers(self, node: str) -> Sequence[Layer]:
        """The layers of a planned node; none where it is part of no layer that says so."""
        waiting = [node]
        for _ in range(_DEEPEST):
            found = [layer for name in waiting for layer in self.owned.layers.get(name, ())]
            if waiting == [node] and found:
                return found
            if found:
                return [layer for layer in found if layer.kind == SUBGRAPH]
            values = (value for name in waiting for value in self.made.get(name, ()))
            waiting = [reader for value in values for reader in self.readers.get(value, ())]
        return ()


def _owners(layer: Layer, heads: Mapping[str, str]) -> Iterator[str]:
    """Decisions that a layer names; what is derived from `n` is called `n_original` or `n/…`."""
    for name in layer.names:
        known = name.removesuffix("_original")
        while known and known not in heads:
            known = known.rpartition("/")[0]
        if known:
            yield heads[known]


def measure_latencies(source: Path, artifact: Artifact, feed: Feed, *, threads: int) -> Latencies:
    """Seconds of planned nodes as float, from the source, and as planned.

    A decision counts with the nodes its layer includes. A node without weights that has no layer
    is part of another one, and takes none; one with weights that is not found has no entry.
    """
    planned = artifact.planned
    before = open_session(source, threads=threads, profiled=True).layers(feed, _ROUNDS)
    after = open_session(
        artifact.path, threads=threads, config=artifact.session_options, profiled=True
    ).layers(feed, _ROUNDS)
    seconds = _Owned.of(planned, before).seconds, _Owned.of(planned, after).seconds
    by_node = latency_rows(planned, *seconds, _WEIGHTED)
    # Its quantizers are part of the layers around them, or move one float like any other layer.
    return Latencies(
        by_node, NOMINAL_SECONDS_PER_BYTE, NOMINAL_SECONDS_PER_BYTE, environment(threads)
    )


def time_nodes(
    artifacts: Sequence[Artifact], feed: Feed, *, threads: int, seconds_limit: float
) -> list[Timing]:
    """Shares of profiled runs, times the seconds of files that run in turns without a profiler."""
    by_path = {artifact.path: artifact.session_options for artifact in artifacts}
    walls = bench(
        list(by_path),
        feed,
        threads=threads,
        seconds_limit=seconds_limit,
        sessions=lambda file: open_session(file, threads=threads, config=by_path[file]),
        described=environment(threads),
    )
    timed = []
    for artifact, row in zip(artifacts, walls.rows, strict=True):
        options = artifact.session_options
        session = open_session(artifact.path, threads=threads, config=options, profiled=True)
        layers = session.layers(feed, _ROUNDS)
        timed.append(_timing(artifact, layers, row.median_seconds))
    return timed


def _timing(artifact: Artifact, layers: Sequence[Layer], seconds: float) -> Timing:
    """Scale layers to the seconds of a run; what no node owns is spread over those that do."""
    owned = _Owned.of(artifact.planned, layers).seconds
    scale = seconds / (sum(owned.values()) or 1.0)
    return Timing(seconds, {name: own * scale for name, own in owned.items()}, {})
