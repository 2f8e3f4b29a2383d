"""What an option costs: an analytic estimate that says it is one, and measured seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.facts import Latencies, Method, Option
    from octavo.ir.model import Model
    from octavo.ir.target import Target

# What the runtime spends around one kernel.
CALL_SECONDS = 1e-6


@final
@dataclass(frozen=True)
class AnalyticCost:
    """Multiply-accumulates and bytes at nominal rates, times the target row's relative speed.

    `sizes` gives the elements of values by name, for models with symbolic dimensions.
    """

    target: Target
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return "analytic"

    def seconds(self, node: onnx_ir.Node, method: Method) -> float | None:
        if method in ("float", "storage"):
            return self._float_seconds(node)
        row = self.target.support(node, method).row
        if row is None:
            return None
        seconds = self._float_seconds(node) * row.speed
        operand = node.inputs[0] if method in ("dynamic", "float8") else None
        return seconds + (0.0 if operand is None else self.boundary_seconds(operand))

    def option_seconds(self, node: onnx_ir.Node, option: Option) -> float | None:
        """Seconds of a node under an option: the width of a stored weight does not count."""
        return self.seconds(node, option.method)

    def boundary_seconds(self, value: onnx_ir.Value) -> float:
        call = 0.0 if self.target.fused_quantizers else CALL_SECONDS
        return call + 4 * self.elements(value) / self.target.bytes_per_second

    def elements(self, value: onnx_ir.Value) -> int:
        """Elements of a value; a dimension that nothing tells counts as 1."""
        known = self.sizes.get(value.name or "")
        if known is not None:
            return known
        return math.prod(d if isinstance(d, int) else 1 for d in value.shape or ())

    def macs(self, node: onnx_ir.Node) -> int:
        """Multiply-accumulates of a linear node, 0 for every other operator."""
        if node.op_type in ("LSTM", "GRU", "RNN"):
            return self._recurrent_macs(node)
        if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            return 0
        left, right = node.inputs[0], node.inputs[1]
        shape = _dims(right)
        if left is None or len(shape) < 2:
            return 0
        if node.op_type == "Conv":
            return self.elements(node.outputs[0]) * math.prod(shape[1:])
        if node.op_type == "ConvTranspose":
            return self.elements(left) * math.prod(shape[1:])
        transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
        return self.elements(node.outputs[0]) * shape[-1 if transposed else -2]

    def _recurrent_macs(self, node: onnx_ir.Node) -> int:
        """Every output row of `[steps, directions, batch, H]` reads a row of W and of R."""
        rows = self.elements(node.outputs[0]) // max(1, node.attributes.get_int("hidden_size", 1))
        weights = [_dims(value) for value in node.inputs[1:3]]
        return rows * sum(math.prod(shape[1:]) for shape in weights if len(shape) == 3)

    def _float_seconds(self, node: onnx_ir.Node) -> float:
        values = [v for v in (*node.inputs, *node.outputs) if v is not None]
        moved = sum(4 * self.elements(v) for v in values if not v.is_initializer())
        rates = self.target
        computed = self.macs(node) / rates.macs_per_second
        return CALL_SECONDS + computed + moved / rates.bytes_per_second


def _dims(value: onnx_ir.Value | None) -> list[int]:
    if value is None or value.shape is None:
        return []
    return [d if isinstance(d, int) else 1 for d in value.shape]


@final
@dataclass(frozen=True)
class MeasuredCost:
    """Seconds from a latency table; what it lacks is the analytic estimate times `scale`."""

    latencies: Latencies
    analytic: AnalyticCost
    scale: float

    @staticmethod
    def of(model: Model, latencies: Latencies, analytic: AnalyticCost) -> MeasuredCost:
        """A cost model whose estimates are scaled to the median measured node."""
        ratios = [
            measured["float"] / estimate
            for node in model.graph
            if "float" in (measured := latencies.by_node.get(node.name or "", {}))
            and (estimate := analytic.seconds(node, "float"))
        ]
        return MeasuredCost(latencies, analytic, median(ratios) if ratios else 1.0)

    @property
    def source(self) -> str:
        return f"measured on {self.latencies.environment}"

    def seconds(self, node: onnx_ir.Node, method: Method) -> float | None:
        measured = self.latencies.by_node.get(node.name or "", {})
        known = measured.get("float" if method == "storage" else method)
        if known is not None:
            return known
        estimate = self.analytic.seconds(node, method)
        if estimate is None:
            return None
        # The node's own float seconds tell more than the median of all nodes.
        own = self.analytic.seconds(node, "float")
        scale = measured["float"] / own if own and "float" in measured else self.scale
        return estimate * scale

    def option_seconds(self, node: onnx_ir.Node, option: Option) -> float | None:
        return self.seconds(node, option.method)

    def boundary_seconds(self, value: onnx_ir.Value) -> float:
        rates = self.latencies
        per_byte = (rates.quantize_seconds_per_byte + rates.dequantize_seconds_per_byte) / 2
        return CALL_SECONDS + 4 * self.analytic.elements(value) * per_byte

    def macs(self, node: onnx_ir.Node) -> int:
        return self.analytic.macs(node)

    def elements(self, value: onnx_ir.Value) -> int:
        return self.analytic.elements(value)
