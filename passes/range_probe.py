"""The model that calibration runs: it shows extremes and a sample of values, never the values.

Moving whole activations out of the runtime costs several times the inference; their extremes
and an even sample cost a fraction of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.ir.fake_quant import DOMAIN, constant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from octavo.ir.model import Model

# Whole rows of the last axis are taken, because the runtime copies rows and not elements; an odd
# step meets all rows of an image in turn.
_PROBE = """
    <opset_import: ["" : 21], domain: "octavo">
    RangeProbe (x, limit, one, flat, begin, end) => (low, high, sample) {
        real = Cast <to = 1> (x)
        low = ReduceMin <keepdims = 0> (real)
        high = ReduceMax <keepdims = 0> (real)
        vector = Reshape (real, flat)
        size = Shape (vector)
        parts = Div (size, limit)
        step = BitwiseOr (parts, one)
        rows = Flatten <axis = -1> (real)
        sample = Slice (rows, begin, end, begin, step)
    }"""
_KEY = (DOMAIN, "RangeProbe", "")
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


def build_probe(model: Model, values: Sequence[str], limit: int) -> RangeProbe:
    """Probe float values of rank 1 and up, about `limit` elements of each per feed."""
    probe = model.clone()
    graph = probe.graph
    named = {v.name: v for v in graph.inputs} | {v.name: v for n in graph for v in n.outputs}
    arguments = [
        constant(graph, f"{_PREFIX}_{name}", np.array([number], np.int64))
        for name, number in (
            ("limit", limit), ("one", 1), ("flat", -1), ("begin", 0), ("end", 2**62)
        )
    ]  # fmt: skip
    graph.outputs.clear()
    for index, name in enumerate(values):
        outputs = [onnx_ir.Value(name=output) for output in _outputs(index)]
        for output in outputs:
            output.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        inputs = [named[name], *arguments]
        node = onnx_ir.Node(
            DOMAIN, _KEY[1], inputs, outputs=outputs, name=f"{_PREFIX}_probe_{index}"
        )
        graph.append(node)
        graph.outputs.extend(outputs)
    probe.ir.functions[_KEY] = _function()
    probe.ir.opset_imports[DOMAIN] = 1
    return RangeProbe(_only_needed(probe), tuple(values))


def _only_needed(probe: Model) -> Model:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(probe.ir)
    return probe


def _outputs(index: int) -> tuple[str, str, str]:
    return (f"{_PREFIX}_low_{index}", f"{_PREFIX}_high_{index}", f"{_PREFIX}_sample_{index}")


def _function() -> onnx_ir.Function:
    import onnx.parser

    return onnx_ir.serde.deserialize_function(onnx.parser.parse_function(_PROBE))
