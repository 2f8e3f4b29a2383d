"""Why ONNX Runtime kept a node float: the first of its fusion rules that the graph breaks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

import onnx

from octavo.backends.ort_target import ORT_CPU

if TYPE_CHECKING:
    from octavo.ir.artifact import PlannedNode
    from octavo.ir.target import KernelRow

UNKNOWN = "onnxruntime kept it float"
_SATURATION = "its activation does not saturate where the quantizer behind it does"


def why_float(planned: PlannedNode, kernel: str, graph: onnx.GraphProto) -> str:
    """The reason in words, for a planned node that runs as the float `kernel`.

    `graph` is the lowered one, before the runtime rewrote it.
    """
    lowered = _Lowered(graph)
    node = next((n for n in graph.node if n.name == planned.node), None)
    row = _row(planned)
    if node is None or row is None:
        return UNKNOWN
    return (
        _operands(node, row, lowered)
        or _output(planned, node, row, lowered)
        or (_SATURATION if kernel.split("::")[-1].startswith("Fused") else "")
        or UNKNOWN
    )


@final
@dataclass(frozen=True)
class _Lowered:
    graph: onnx.GraphProto

    @cached_property
    def producers(self) -> Mapping[str, onnx.NodeProto]:
        return {name: node for node in self.graph.node for name in node.output}

    @cached_property
    def readers(self) -> Mapping[str, Sequence[onnx.NodeProto]]:
        readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                readers[name].append(node)
        return readers

    @cached_property
    def constants(self) -> Mapping[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self.graph.initializer}

    def dequantizer(self, value: str) -> onnx.NodeProto | None:
        node = self.producers.get(value)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def float_value(self, value: str) -> str:
        """The value before Q and DQ, where these make a graph output."""
        dequantizer = self.dequantizer(value)
        quantizer = self.producers.get(dequantizer.input[0]) if dequantizer else None
        return quantizer.input[0] if quantizer is not None else value

    def parameters(self, node: onnx.NodeProto) -> list[bytes]:
        """Scale and zero point of a Q or DQ without their names, to compare."""
        found = []
        for name in node.input[1:]:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(self.constants.get(name, tensor))
            tensor.ClearField("name")
            found.append(tensor.SerializeToString(deterministic=True))
        return found


def _row(planned: PlannedNode) -> KernelRow | None:
    """A row that was planned for; rows of one operator differ in whether they read weights."""
    weights = ":" in planned.option
    rows = (r for r in ORT_CPU.rows if (r.op_type, r.kernels) == (planned.op_type, planned.kernels))
    return next((row for row in rows if bool(row.weights) == weights), None)


def _operands(node: onnx.NodeProto, row: KernelRow, lowered: _Lowered) -> str:
    indices = range(len(node.input)) if row.variadic else row.operands
    for name in (node.input[k] for k in indices if k < len(node.input)):
        dequantizer = lowered.dequantizer(name)
        if dequantizer is None:
            return f"input '{name}' is not quantized"
        zero_point = lowered.constants.get(dequantizer.input[-1])
        signed = zero_point is not None and zero_point.data_type == onnx.TensorProto.INT8
        if signed and dequantizer.input[0] not in lowered.constants:
            return f"input '{name}' is int8; uint8 activations fuse"
    return ""


def _output(planned: PlannedNode, node: onnx.NodeProto, row: KernelRow, lowered: _Lowered) -> str:
    value = lowered.float_value(planned.output)
    readers = lowered.readers.get(value, ())
    quantizers = [reader for reader in readers if reader.op_type == "QuantizeLinear"]
    if not quantizers and row.output == "quantized":
        return "no quantizer on the output"
    if not quantizers:
        bare = _lacks_zero_point(node, row, lowered)
        return "a weight without zero point, and no quantizer on the output" if bare else ""
    others = [reader for reader in readers if reader.op_type != "QuantizeLinear"]
    if others:
        return f"'{others[0].name}' reads the output as float"
    if value in {output.name for output in lowered.graph.output}:
        return "the output is a graph output as float"
    source = lowered.dequantizer(node.input[0])
    if row.same_params and source is not None:
        same = lowered.parameters(source) == lowered.parameters(quantizers[0])
        return "" if same else "input and output do not share scale and zero point"
    return ""


def _lacks_zero_point(node: onnx.NodeProto, row: KernelRow, lowered: _Lowered) -> bool:
    made = (lowered.dequantizer(node.input[k]) for k in row.weights)
    return any(dequantizer is not None and len(dequantizer.input) < 3 for dequantizer in made)
