"""The model that calibration runs: it shows extremes and a sample of values, never the values.

Moving whole activations out of the runtime costs several times the inference; their extremes
and an even sample cost a fraction of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.ir.fake_quant import DOMAIN, constant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model

# Whole rows of the last axis are taken, because the runtime copies rows and not elements; an odd
# step meets all rows of an image in turn.
_FUNCTIONS = (
    """<opset_import: ["" : 21], domain: "octavo">
    RangeProbe (x, step, begin, end) => (low, high, sample) {
        low = ReduceMin <keepdims = 0> (x)
        high = ReduceMax <keepdims = 0> (x)
        rows = Flatten <axis = -1> (x)
        sample = Slice (rows, begin, end, begin, step)
    }""",
    """<opset_import: ["" : 21], domain: "octavo">
    RangeStep (x, limit, flat, one) => (step) {
        vector = Reshape (x, flat)
        elements = Shape (vector)
        parts = Div (elements, limit)
        step = BitwiseOr (parts, one)
    }""",
)
_PREFIX = "octavo_range"


@final
@dataclass(frozen=True)
class RangeProbe:
    """A clone of a model whose outputs are the extremes and a sample of some of its values."""

    model: Model
    values: tuple[str, ...]

    @property
    def outputs(self) -> list[str]:
        """Names to ask the evaluator for."""
        return [name for index in range(len(self.values)) for name in _outputs(index)]

    def read(self, arrays: Mapping[str, NDArray[np.generic]], index: int) -> Observation:
        """What one feed showed of the value at `index` of `values`."""
        low, high, sample = (arrays[name] for name in _outputs(index))
        return Observation(sample.ravel().astype(np.float32, copy=False), float(low), float(high))


@final
@dataclass(frozen=True)
class Observation:
    """A sample of a value in one feed, `[n]` float32, and the extremes of all of it."""

    sample: NDArray[np.float32]
    low: float
    high: float


def build_probe(model: Model, values: Sequence[str], limit: int, feed: Feed) -> RangeProbe:
    """Probe float values of rank 1 and up: some `limit` elements of each in feeds like `feed`."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    probe = model.clone()
    builder = _Builder(probe.graph, limit, _symbols(probe, feed))
    named = {v.name: v for v in probe.graph.inputs}
    named |= {v.name: v for node in probe.graph for v in node.outputs}
    outputs = [builder.probe(named[name], index) for index, name in enumerate(values)]
    probe.graph.outputs.clear()
    probe.graph.outputs.extend(output for three in outputs for output in three)
    for function in map(_function, _FUNCTIONS):
        probe.ir.functions[function.identifier()] = function
    probe.ir.opset_imports[DOMAIN] = 1
    RemoveUnusedNodesPass()(probe.ir)
    return RangeProbe(probe, tuple(values))


@final
@dataclass(frozen=True)
class _Builder:
    graph: onnx_ir.Graph
    limit: int
    sizes: Mapping[str, int]

    def probe(self, value: onnx_ir.Value, index: int) -> Sequence[onnx_ir.Value]:
        """Low, high and sample of one value."""
        if value.dtype != onnx_ir.DataType.FLOAT:
            value = self._add("Cast", [value], index, {"to": onnx_ir.DataType.FLOAT}, "")[0]
        inputs = [value, self._step(value, index), self._number(0), self._number(2**62)]
        outputs = self._add("RangeProbe", inputs, index, count=3)
        for output, name in zip(outputs, _outputs(index), strict=True):
            output.name = name
            output.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        return outputs

    def _step(self, value: onnx_ir.Value, index: int) -> onnx_ir.Value:
        """Known when the model is built where the shape is, or else when it runs."""
        elements = _elements(value, self.sizes)
        if elements is not None:
            return self._number(elements // self.limit | 1)
        numbers = [self._number(number) for number in (self.limit, -1, 1)]
        return self._add("RangeStep", [value, *numbers], index)[0]

    def _number(self, number: int) -> onnx_ir.Value:
        return constant(self.graph, f"{_PREFIX}_{number}", np.array([number], np.int64))

    def _add(
        self,
        op_type: str,
        inputs: Sequence[onnx_ir.Value],
        index: int,
        attributes: Mapping[str, int] | None = None,
        domain: str = DOMAIN,
        count: int = 1,
    ) -> Sequence[onnx_ir.Value]:
        name = f"{_PREFIX}_{op_type}_{index}"
        node = onnx_ir.node(
            op_type, inputs, attributes, domain=domain, num_outputs=count, name=name
        )
        for k, output in enumerate(node.outputs):
            output.name = f"{name}_{k}"
        self.graph.append(node)
        return node.outputs


def _symbols(model: Model, feed: Feed) -> dict[str, int]:
    """The sizes that a feed gives to symbolic dimensions."""
    return {
        dim.value: size
        for value in model.graph.inputs
        if value.shape is not None and value.name is not None and value.name in feed
        for dim, size in zip(value.shape, feed[value.name].shape, strict=True)
        if isinstance(dim, onnx_ir.SymbolicDim) and dim.value is not None
    }


def _elements(value: onnx_ir.Value, sizes: Mapping[str, int]) -> int | None:
    if value.shape is None:
        return None
    dims = [dim if isinstance(dim, int) else sizes.get(dim.value or "") for dim in value.shape]
    known = [dim for dim in dims if dim is not None]
    return math.prod(known) if len(known) == len(dims) else None


def _outputs(index: int) -> tuple[str, str, str]:
    return (f"{_PREFIX}_low_{index}", f"{_PREFIX}_high_{index}", f"{_PREFIX}_sample_{index}")


def _function(text: str) -> onnx_ir.Function:
    import onnx.parser

    return onnx_ir.serde.deserialize_function(onnx.parser.parse_function(text))
