"""Which kernels a model file runs, and the seconds each takes, from the runtime's own profile."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import onnx

from octavo.backends.latency_rows import latency_rows
from octavo.backends.ort_session import environment, make_session
from octavo.backends.ort_target import ORT_CPU
from octavo.ir.facts import Latencies
from octavo.ir.memory import release_memory

if TYPE_CHECKING:
    from octavo.backends.ort_session import Session
    from octavo.ir.artifact import PlannedNode
    from octavo.ir.calibration import Feed

_KERNEL_TIME = "_kernel_time"
# What optimizers append to the name of the node (or, before `_nchwc`, of the value) they replace.
_SUFFIXES = re.compile(r"(_token_\d+|_nchwc|/duplicated|/MatMul\w+Fusion/?)+$")
# Moving a float32 at memory speed: the rate where a profile has no such kernel.
_NOMINAL_SECONDS_PER_BYTE = 1 / 8e9
# Conv → Q → DQ → activation → Add, as the lowered file spells it out.
_DEEPEST_FUSION = 4
_WEIGHTED = {row.op_type for row in ORT_CPU.rows if row.weights}


@final
@dataclass(frozen=True)
class KernelTime:
    """One kernel of one run: its node in the optimized graph, seconds, and tensor types.

    `names` are the node and values of the model file that it may stand for; `inputs` and
    `outputs` are pairs of type and element count, as ("float", 150528).
    """

    node: str
    op_type: str
    seconds: float
    names: frozenset[str]
    inputs: tuple[tuple[str, int], ...]
    outputs: tuple[tuple[str, int], ...]


@final
@dataclass(frozen=True)
class Profile:
    """What ran, and the optimized graph (without large weights) where it was asked for."""

    kernels: tuple[KernelTime, ...]
    graph: onnx.GraphProto | None


@final
@dataclass(frozen=True)
class Subject:
    """A file to profile, the session configuration it relies on, whether to read its graph."""

    file: Path
    config: Mapping[str, str] = field(default_factory=dict)
    read_graph: bool = False


Estimator = Callable[[Sequence[float]], float]


def origin(node_name: str) -> str:
    """A name of the optimized graph without what the optimizers appended."""
    return _SUFFIXES.sub("", node_name)


def profile(
    subjects: Sequence[Subject], feed: Feed, *, threads: int = 1, rounds: int = 5
) -> list[Profile]:
    """Run every file once per round, after one warm-up round; the least seconds of each kernel.

    Other work on the machine only ever adds time, so the least is the best estimate. A kernel in
    a loop body counts with all its calls of one run.
    """
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        profiles = _run(subjects, feed, Path(folder), threads, 1 + rounds)
    release_memory()
    return profiles


def _run(
    subjects: Sequence[Subject], feed: Feed, folder: Path, threads: int, runs: int
) -> list[Profile]:
    paths = graph_files(subjects, folder)
    sessions = [
        profiled(subject, path, threads) for subject, path in zip(subjects, paths, strict=True)
    ]
    calls = [s.bound({n: feed[n] for n in s.inputs if n in feed}) for s in sessions]
    for _ in range(runs):
        for call in calls:
            call()
    return [
        read_profile(session, path if subject.read_graph else None, runs, min)
        for session, subject, path in zip(sessions, subjects, paths, strict=True)
    ]


def graph_files(subjects: Sequence[Subject], folder: Path) -> list[Path]:
    """Where the optimized graph of each subject goes; its profile lies beside it."""
    return [folder / f"{index}.onnx" for index in range(len(subjects))]


def profiled(subject: Subject, graph: Path, threads: int) -> Session:
    """A session that profiles every run until `read_profile` ends that."""
    return make_session(
        subject.file,
        threads=threads,
        config=subject.config,
        profile_prefix=graph.with_suffix(".profile"),
        optimized_path=graph if subject.read_graph else None,
    )


def read_profile(
    session: Session, optimized: Path | None, runs: int, typical: Estimator
) -> Profile:
    """End profiling; what `runs` runs took by kernel, the first one left out as a warm-up.

    `typical` makes one figure of a kernel's seconds in every run.
    """
    graph = onnx.load(optimized, load_external_data=False).graph if optimized else None
    outputs = {node.name: tuple(node.output) for node in graph.node} if graph else {}
    by_node: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in json.loads(session.end_profiling().read_bytes()):
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL_TIME):
            by_node[event["name"].removesuffix(_KERNEL_TIME)].append(event)
    kernels = (
        _kernel_time(name, outputs.get(name, ()), events, runs, typical)
        for name, events in by_node.items()
    )
    return Profile(tuple(kernels), graph)


def _kernel_time(
    name: str,
    outputs: Iterable[str],
    events: list[dict[str, Any]],
    runs: int,
    typical: Estimator,
) -> KernelTime:
    per_run = max(1, len(events) // runs)
    timed = [event["dur"] for event in events[per_run:]] or [event["dur"] for event in events]
    arguments = events[-1]["args"]
    return KernelTime(
        node=name,
        op_type=arguments["op_name"],
        seconds=per_run * typical(timed) * 1e-6,
        names=frozenset((origin(name), *outputs)),
        inputs=_tensors(arguments.get("input_type_shape", [])),
        outputs=_tensors(arguments.get("output_type_shape", [])),
    )


def _tensors(described: Iterable[Mapping[str, list[int]]]) -> tuple[tuple[str, int], ...]:
    return tuple((dtype, math.prod(shape)) for one in described for dtype, shape in one.items())


def measure_latencies(
    source: Path,
    lowered: Path,
    planned: Sequence[PlannedNode],
    feed: Feed,
    *,
    threads: int = 1,
    rounds: int = 5,
) -> Latencies:
    """Seconds of planned nodes as float, from the source, and as planned, from the lowered file.

    A decision counts with the nodes its kernel absorbs, which then take none of their own. A
    node without weights that has no kernel is part of another one, and takes none; one with
    weights that is not found has no entry. What the runtime inserts between kernels is not
    attributed; the rates of Q and DQ, per byte of the float tensor, are for boundaries.
    """
    subjects = [Subject(source), Subject(lowered, read_graph=True)]
    before, after = profile(subjects, feed, threads=threads, rounds=rounds)
    owners = Owners.of(planned, lowered)
    seconds = owners.seconds(before.kernels), owners.seconds(after.kernels)
    return Latencies(
        by_node=latency_rows(planned, *seconds, _WEIGHTED),
        quantize_seconds_per_byte=_rate(after, "QuantizeLinear"),
        dequantize_seconds_per_byte=_rate(after, "DequantizeLinear"),
        environment=environment(threads),
    )


@final
@dataclass(frozen=True)
class Owners:
    """Which decision a kernel belongs to: by the names it is made of, else by what it computes.

    `weighted` are the decisions on operators with weights; `producers` the nodes of the lowered
    file by the values they produce.
    """

    by_name: Mapping[str, str]
    weighted: frozenset[str]
    producers: Mapping[str, onnx.NodeProto]

    @staticmethod
    def of(planned: Sequence[PlannedNode], lowered: Path) -> Owners:
        by_name: dict[str, str] = {}
        for node in planned:
            for name in (node.node, node.output, f"{node.output}_q"):
                by_name.setdefault(name, node.absorbed_by or node.node)
        weighted = frozenset(node.node for node in planned if node.op_type in _WEIGHTED)
        graph = onnx.load(lowered, load_external_data=False).graph
        return Owners(by_name, weighted, {v: node for node in graph.node for v in node.output})

    def seconds(self, kernels: Sequence[KernelTime]) -> dict[str, float]:
        """Seconds by decision, over the kernels that belong to one."""
        seconds: dict[str, float] = defaultdict(float)
        fused = []
        for kernel in kernels:
            owners = sorted(self.by_name[n] for n in kernel.names if n in self.by_name)
            weighted = (name for name in owners if name in self.weighted)
            owner = next(weighted, next(iter(owners), None))
            # A fused kernel is called after the last value it computes, an activation or a sum.
            if owner not in self.weighted and kernel.op_type.removeprefix("Fused") in _WEIGHTED:
                fused.append(kernel)
            elif owner is not None:
                seconds[owner] += kernel.seconds
        for kernel in fused:
            owner = self._above(kernel.names, set(seconds))
            if owner is not None:
                seconds[owner] += kernel.seconds
        return dict(seconds)

    def _above(self, names: Iterable[str], timed: set[str]) -> str | None:
        """The nearest decision with weights upstream that has no kernel yet."""
        level = [self.producers[name] for name in names if name in self.producers]
        for _ in range(_DEEPEST_FUSION):
            above = (name for node in level for name in node.input)
            level = [self.producers[name] for name in above if name in self.producers]
            owned = (self.by_name.get(node.name) for node in level)
            free = (owner for owner in owned if owner in self.weighted and owner not in timed)
            if (found := next(free, None)) is not None:
                return found
        return None


def _rate(profile: Profile, op_type: str) -> float:
    """Seconds per byte of the float tensor, over all kernels of the operator."""
    found = [k for k in profile.kernels if k.op_type == op_type and k.outputs]
    moved = sum(4 * k.outputs[0][1] for k in found)
    return sum(k.seconds for k in found) / moved if moved else _NOMINAL_SECONDS_PER_BYTE
