"""Float16 for everything that is not integer: TensorRT 11 does not choose types by itself.

Graph inputs and outputs keep their types. Operators that sum or exponentiate stay float32, as do
values that calibration saw beyond half of what float16 holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.backends.ort_edits import insert, unique
from octavo.ir.mapped import reading

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from octavo.ir.facts import Ranges

    _Use = tuple[onnx_ir.Node, int]

_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
# A mask of -1e38 does what it did as -2^15: nothing is left of e^-32768.
_MASK = 2.0**15
_SAFE = _LARGEST / 2
# Sums and powers of float16 numbers leave its range, or its 11 bits.
_WIDE = frozenset((
    "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Softmax", "LogSoftmax", "Softplus", "CumSum",
    "LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization",
    "LpNormalization", "ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceProd", "ReduceLogSum", "ReduceLogSumExp", "STFT", "DFT", "GridSample", "Range",
))  # fmt: skip
# Their types are said by attributes, or fixed.
_TYPED = frozenset((
    "Cast", "CastLike", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform",
    "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "NonMaxSuppression",
    "If", "Loop", "Scan", "Constant", "OneHot", "MelWeightMatrix", "HannWindow",
))  # fmt: skip
_ANY_TYPE = ("Shape", "Size")
# Region and scales of Resize are float32 whatever it resizes.
_FLOAT_INPUTS = {"Resize": (1, 2), "Upsample": (1,)}


def compute_in_half(graph: onnx_ir.Graph, ranges: Ranges | None) -> None:
    """Convert the graph in place; casts appear where the two types meet."""
    _Conversion.of(graph, ranges).run()


@final
@dataclass(frozen=True)
class _Conversion:
    """A graph, and the nodes of it that read and write float16."""

    graph: onnx_ir.Graph
    half: frozenset[onnx_ir.Node]

    @staticmethod
    def of(graph: onnx_ir.Graph, ranges: Ranges | None) -> _Conversion:
        beyond = {
            name
            for name, found in (ranges.by_value if ranges is not None else {}).items()
            if max(-found.observed_low, found.observed_high) > _SAFE
        }
        return _Conversion(graph, frozenset(n for n in graph if _may_be_half(n, beyond)))

    def run(self) -> None:
        for value in list(_values(self.graph)):
            if value.dtype != onnx_ir.DataType.FLOAT:
                continue
            if value.const_value is not None and not value.is_graph_input():
                self._constant(value)
            else:
                self._activation(value)

    def _wants_half(self, node: onnx_ir.Node, index: int) -> bool:
        return node in self.half and index not in _FLOAT_INPUTS.get(node.op_type, ())

    def _constant(self, value: onnx_ir.Value) -> None:
        """A float16 copy for the readers that want one, in place where all of them do."""
        uses: list[_Use] = [(use.node, use.idx) for use in value.uses()]
        wanting = [use for use in uses if self._wants_half(*use)]
        if not wanting or value.const_value is None:
            return
        array = reading(value.const_value, _halved)
        name = f"{value.name}"
        if len(wanting) == len(uses) and not value.is_graph_output():
            value.const_value = onnx_ir.Tensor(array, name=name)
            value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT16)
            return
        copy = onnx_ir.Value(
            name=unique(self.graph, f"{name}_f16"),
            shape=value.shape,
            type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT16),
        )
        copy.const_value = onnx_ir.Tensor(array, name=copy.name)
        self.graph.register_initializer(copy)
        _redirect(wanting, copy)

    def _activation(self, value: onnx_ir.Value) -> None:
        producer = value.producer()
        made = producer is not None and producer in self.half
        readers: dict[bool, list[_Use]] = {True: [], False: []}
        for use in value.uses():
            if use.node.op_type not in _ANY_TYPE:
                readers[self._wants_half(use.node, use.idx)].append((use.node, use.idx))
        if made:
            value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT16)
        if made and value.is_graph_output():
            value = self._keep_output(value)
        if found := readers[not made]:
            cast = self._cast(value, not made, f"{value.name}_f{32 if made else 16}")
            _redirect(found, cast)

    def _keep_output(self, value: onnx_ir.Value) -> onnx_ir.Value:
        """The output keeps its name and type; what makes it in float16 gets another name."""
        name = value.name or ""
        value.name = unique(self.graph, f"{name}_half")
        cast = self._cast(value, False, f"{name}_float")
        cast.name, cast.shape = name, value.shape
        self.graph.outputs[:] = [cast if out is value else out for out in self.graph.outputs]
        return value

    def _cast(self, value: onnx_ir.Value, half: bool, name: str) -> onnx_ir.Value:
        dtype = onnx_ir.DataType.FLOAT16 if half else onnx_ir.DataType.FLOAT
        before = next(iter(self.graph))
        cast = insert(self.graph, before, "Cast", [value], name, {"to": int(dtype)}).outputs[0]
        producer = value.producer()
        if producer is not None:
            made = cast.producer()
            assert made is not None
            self.graph.remove(made)
            self.graph.insert_after(producer, made)
        cast.type, cast.shape = onnx_ir.TensorType(dtype), value.shape
        return cast


def _values(graph: onnx_ir.Graph) -> Iterable[onnx_ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _redirect(uses: Iterable[_Use], value: onnx_ir.Value) -> None:
    for node, index in uses:
        node.replace_input_with(index, value)


def _may_be_half(node: onnx_ir.Node, beyond: set[str]) -> bool:
    if node.op_type in _WIDE or node.op_type in _TYPED or node.domain not in ("", "ai.onnx"):
        return False
    if _dequantizes_float4(node):
        return False
    values = [v for v in (*node.inputs, *node.outputs) if v is not None]
    floats = [v for v in values if v.dtype == onnx_ir.DataType.FLOAT]
    if not floats or any(v.name in beyond for v in floats):
        return False
    return all(v.const_value is None or reading(v.const_value, _fits) for v in floats)


def _dequantizes_float4(node: onnx_ir.Node) -> bool:
    """Whether a node makes a weight of float4 codes, or their scales: float16 is short for both."""
    if node.op_type != "DequantizeLinear":
        return False
    readers = [use.node for use in node.outputs[0].uses() if use.idx == 1]
    codes = (reader.inputs[0] for reader in (node, *readers))
    return any(v is not None and v.dtype == onnx_ir.DataType.FLOAT4E2M1 for v in codes)


def _fits(array: NDArray[np.float32]) -> bool:
    """Whether float16 holds the numbers, or may do without: masks, and single tiny summands."""
    if array.size == 1:
        # A small constant keeps a division from zero: it must not become one.
        return not 0 < abs(float(array.reshape(()))) < _SMALLEST * 16
    magnitude = np.abs(array[np.isfinite(array)])
    return bool(magnitude.max(initial=0.0) <= _LARGEST)


def _halved(array: NDArray[np.float32]) -> NDArray[np.float16]:
    if array.size == 1:
        array = np.clip(array, -_MASK, _MASK)
    return np.asarray(array, np.float16)
