"""The proof of what runs: the optimized graph and one real run, held against the plan."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

import onnx

from octavo.backends.ort_profile import KernelTime, Subject, origin, profile
from octavo.backends.ort_reasons import why_float
from octavo.backends.ort_session import environment
from octavo.backends.ort_target import MICROSOFT, ORT_CPU
from octavo.ir.artifact import Artifact, Audit, AuditRow, PlannedNode

if TYPE_CHECKING:
    from pathlib import Path

    from octavo.backends.ort_profile import Profile
    from octavo.ir.calibration import Feed

_ROUNDS = 3
# Fewer elements than this cost nothing to dequantize or unpack on every run.
_SMALL_ELEMENTS = 4096
_BITS, _BLOCKS, _ACCURACY = (2, 4, 8), (16, 32, 64, 128, 256), 4
_INTEGER_PREFIXES = ("QLinear", "QGemm", "MatMulInteger")
# Kernels the runtime puts between others; they prove nothing about a planned node.
_CARRIERS = ("QuantizeLinear", "DequantizeLinear", "Cast", "ReorderInput", "ReorderOutput")
_MOVEMENT = frozenset(row.op_type for row in ORT_CPU.rows if row.same_params)
_CODES = ("uint8", "int8")


def audit(artifact: Artifact, feed: Feed, *, threads: int = 1) -> Audit:
    """Load the artifact as production does, run it, and find the kernel of every planned node.

    A planned integer node passes if one of its kernels runs on codes. Movement that was merged
    into a neighbour passes; any other planned node without a kernel fails. Findings concern the
    whole graph: work on constants in every run, slow operand types, wrong kernel attributes.
    """
    subject = Subject(artifact.path, artifact.session_options, read_graph=True)
    (found,) = profile([subject], feed, threads=threads, rounds=_ROUNDS)
    runtime = _Runtime(found, artifact.path)
    heads = {n.node: runtime.row(n) for n in artifact.planned if not n.absorbed_by}
    rows = [
        runtime.absorbed_row(node, heads[node.absorbed_by])
        if node.absorbed_by
        else heads[node.node]
        for node in artifact.planned
    ]
    return Audit(
        rows=tuple(rows),
        findings=tuple(runtime.findings()),
        kernels=dict(sorted(Counter(map(_kernel, runtime.nodes)).items())),
        environment=environment(threads),
    )


def _kernel(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


@final
@dataclass(frozen=True)
class _Runtime:
    """The optimized graph with its times, beside the lowered file it was made from."""

    profile: Profile
    path: Path

    @cached_property
    def nodes(self) -> Sequence[onnx.NodeProto]:
        return list(self.profile.graph.node) if self.profile.graph else []

    @cached_property
    def lowered(self) -> onnx.GraphProto:
        return onnx.load(self.path, load_external_data=False).graph

    @cached_property
    def times(self) -> Mapping[str, KernelTime]:
        return {kernel.node: kernel for kernel in self.profile.kernels}

    @cached_property
    def constants(self) -> Mapping[str, onnx.TensorProto]:
        return {t.name: t for t in self.profile.graph.initializer} if self.profile.graph else {}

    @cached_property
    def producers(self) -> Mapping[str, onnx.NodeProto]:
        return {name: node for node in self.nodes for name in node.output}

    @cached_property
    def roots(self) -> Mapping[str, str]:
        """The float value by every value that Q and DQ derive from it."""
        weights = {t.name for t in self.lowered.initializer}
        roots: dict[str, str] = {}
        for node in self.lowered.node:
            moves = node.op_type in ("QuantizeLinear", "DequantizeLinear")
            if moves and node.input[0] not in weights:
                roots[node.output[0]] = roots.get(node.input[0], node.input[0])
        return roots

    @cached_property
    def by_name(self) -> Mapping[str, Sequence[onnx.NodeProto]]:
        """Kernels by the nodes and values of the lowered file that they may stand for."""
        found: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in {origin(node.name), *(self.root(o) for o in node.output)}:
                found[name].append(node)
        return found

    def root(self, value: str) -> str:
        return self.roots.get(value, value)

    def candidates(self, planned: PlannedNode) -> list[onnx.NodeProto]:
        """The kernels that compute a planned node, without what only carries its result."""
        found = [
            *self.by_name.get(planned.node, ()),
            *self.by_name.get(self.root(planned.output), ()),
        ]
        moved = () if planned.op_type in _MOVEMENT else tuple(_MOVEMENT)
        unique = {node.name: node for node in found}.values()
        return [node for node in unique if node.op_type not in (*_CARRIERS, *moved)]

    def row(self, planned: PlannedNode) -> AuditRow:
        candidates = self.candidates(planned)
        kernel, reason = self.verdict(planned, candidates)
        timed = [self.times[n.name].seconds for n in candidates if n.name in self.times]
        return AuditRow(
            node=planned.node,
            op_type=planned.op_type,
            option=planned.option,
            kernel=kernel,
            ok=not reason,
            reason=reason or planned.reason,
            seconds=sum(timed) if timed else None,
        )

    def verdict(
        self, planned: PlannedNode, candidates: Sequence[onnx.NodeProto]
    ) -> tuple[str, str]:
        """The kernel, and why it is not what was planned (empty: it is)."""
        # The runtime swaps and merges movement; whichever kernel carries the result will do.
        wanted = _MOVEMENT if planned.op_type in _MOVEMENT else frozenset[str]()
        wanted = wanted | frozenset(planned.kernels)
        accepted = [n for n in candidates if _kernel(n) in wanted and self.on_codes(n)]
        shown = accepted or candidates
        kernel = _kernel(shown[0]) if shown else ""
        if accepted or not planned.kernels:
            return kernel or "merged", ""
        if not candidates:
            merged = planned.op_type in _MOVEMENT
            return ("merged", "") if merged else ("", "no kernel has its name or its output")
        return kernel, why_float(planned, kernel, self.lowered)

    def on_codes(self, node: onnx.NodeProto) -> bool:
        """Whether a kernel that exists for floats too was given codes."""
        if node.domain or node.op_type.startswith(_INTEGER_PREFIXES):
            return True
        time = self.times.get(node.name)
        return time is not None and any(dtype in _CODES for dtype, _ in time.inputs)

    def absorbed_row(self, planned: PlannedNode, head: AuditRow) -> AuditRow:
        """What a kernel absorbs shares its verdict; it may still run on its own, as float."""
        own = [n for n in self.by_name.get(planned.node, ()) if n.op_type == planned.op_type]
        return AuditRow(
            node=planned.node,
            op_type=planned.op_type,
            option=planned.option,
            kernel=_kernel(own[0]) if own else head.kernel,
            ok=head.ok,
            reason=f"runs on its own behind {planned.absorbed_by}" if own else planned.reason,
        )

    def findings(self) -> Iterator[str]:
        for node in self.nodes:
            yield from self.constant_work(node)
            yield from self.slow_operands(node)
            yield from _wrong_attributes(node)

    def constant_work(self, node: onnx.NodeProto) -> Iterator[str]:
        """Dequantizing or unpacking a weight again in every run."""
        used = [name for name in node.input if name]
        if not used or any(name not in self.constants for name in used):
            return
        elements = max(math.prod(self.constants[name].dims) for name in used)
        if elements >= _SMALL_ELEMENTS:
            yield (
                f"{node.op_type} '{node.name}' converts the {elements} elements of '{used[0]}' "
                "in every run"
            )

    def slow_operands(self, node: onnx.NodeProto) -> Iterator[str]:
        """Signed activations, and unsigned weights: both have kernels, several times slower."""
        if not node.op_type.startswith(_INTEGER_PREFIXES) and node.op_type not in _DYNAMIC:
            return
        for index, name in enumerate(node.input):
            if self.value_type(name) == "int8" and name not in self.constants:
                yield f"{_kernel(node)} '{node.name}' reads the int8 activation '{name}'"
            tensor = self.constants.get(name)
            if tensor is None or index not in _WEIGHT_INPUT.get(node.op_type, ()):
                continue
            if tensor.data_type == onnx.TensorProto.UINT8:
                yield f"{_kernel(node)} '{node.name}' reads the uint8 weight '{name}'"

    def value_type(self, name: str) -> str:
        node = self.producers.get(name)
        time = self.times.get(node.name) if node is not None else None
        if node is None or time is None or len(time.outputs) != len(node.output):
            return ""
        return time.outputs[list(node.output).index(name)][0]


_DYNAMIC = ("DynamicQuantizeMatMul",)
_WEIGHT_INPUT = {
    "QLinearConv": (3,), "QLinearMatMul": (3,), "QGemm": (3,), "MatMulIntegerToFloat": (1,),
    "DynamicQuantizeMatMul": (1,),
}  # fmt: skip


def _wrong_attributes(node: onnx.NodeProto) -> Iterator[str]:
    if node.op_type != "MatMulNBits" or node.domain != MICROSOFT:
        return
    values = {a.name: a.i for a in node.attribute}
    wanted = {"bits": _BITS, "block_size": _BLOCKS, "accuracy_level": (_ACCURACY,)}
    for name, allowed in wanted.items():
        if values.get(name, 0) not in allowed:
            yield f"MatMulNBits '{node.name}' has {name} = {values.get(name, 0)}: slow or inexact"
