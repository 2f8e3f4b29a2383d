"""How laws of values pass through a graph, operator by operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.facts import Norms
from octavo.passes.input_laws import InputLaw, laws_of
from octavo.passes.rewrite import constant, scalar
from octavo.passes.value_laws import Array, Law, added, either, multiplied

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.model import Model

_erf = np.vectorize(math.erf, otypes=[np.float64])
Function = Callable[[Array], Array]


def _sigmoid(x: Array) -> Array:
    found: Array = 0.5 * (1 + np.tanh(x / 2))
    return found


ELEMENTWISE: Mapping[str, Function] = {
    "Relu": lambda x: np.maximum(x, 0),
    "Sigmoid": _sigmoid,
    "Tanh": np.tanh,
    "Erf": _erf,
    "Gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "Softplus": lambda x: np.logaddexp(0, x),
    "Abs": np.abs,
    "Neg": np.negative,
    "Exp": lambda x: np.exp(np.minimum(x, 700)),
}
_SAME = ("Identity", "Dropout", "Cast", "MaxPool", "AveragePool", "GlobalAveragePool")
_SAME_CHANNELS = (*_SAME, "GlobalMaxPool", "Resize", "Upsample", "SpaceToDepth")
_MOVED = (
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Split", "Expand", "Tile",
    "Transpose", "DepthToSpace", "ReduceMean", "ReduceMax", "ReduceMin",
)  # fmt: skip


@final
@dataclass
class Propagation:
    """Laws by value name, found in the graph's order; `why` says for the others what is missing.

    A normal law ends `reach` deviations from its mean. The law of a normalization's output
    replaces what comes out of the operators before it.
    """

    model: Model
    reach: float
    laws: dict[str, Law] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def run(self, inputs: Mapping[str, InputLaw]) -> None:
        """From the laws of the graph inputs to those of everything else."""
        norms = (self.model.find(Norms) or Norms({})).by_value
        for name, given in laws_of(self.model, inputs).items():
            found = Law.normal(
                None, np.array([given.mean]), np.array([given.deviation]), self.reach
            )
            self.laws[name] = found.within(np.array([given.low]), np.array([given.high]))
        for node in self.model.graph:
            computed = self._node(node)
            for value in node.outputs:
                name = value.name or ""
                norm, rank = norms.get(name), _rank(value)
                law = Law.of_norm(norm, rank, self.reach) if norm and rank else computed
                if law is not None and law.finite:
                    self.laws[name] = law
                else:
                    self.why[name] = self._reason(node)

    def _reason(self, node: onnx_ir.Node) -> str:
        for value in node.inputs:
            if value is not None and value.name in self.why:
                return self.why[value.name or ""]
        return f"nothing bounds what {node.op_type} '{node.name}' gives"

    def _law(self, value: onnx_ir.Value | None, rank: int) -> Law | None:
        if value is None:
            return None
        array = constant(value)
        if array is not None and array.size and array.dtype.kind == "f":
            return Law.of_constant(array, rank)
        return self.laws.get(value.name or "")

    def _node(self, node: onnx_ir.Node) -> Law | None:
        """The law of a node's outputs; None where its operator or its inputs tell none."""
        rank = _rank(node.outputs[0]) if node.outputs else 0
        laws = [self._law(value, rank) for value in node.inputs]
        first = laws[0] if laws else None
        kind = node.op_type if node.domain in ("", "ai.onnx") else ""
        if kind in ("Softmax", "LogSoftmax"):
            return _softmax(node) if kind == "Softmax" else None
        if kind == "Gather" and (table := constant(node.inputs[0])) is not None:
            return _row_law(table, rank) if table.dtype.kind == "f" and table.size else None
        if kind in ("Concat", "Max", "Min", "Where"):
            return self._several(node, laws)
        if first is None:
            return None
        if kind in ("Conv", "Gemm", "MatMul"):
            return self._linear(node, laws, rank)
        if kind in ("Add", "Sub", "Mul", "Div"):
            return self._arithmetic(kind, first, laws[1])
        return self._unary(node, kind, first)

    def _unary(self, node: onnx_ir.Node, kind: str, law: Law) -> Law | None:
        if kind in ELEMENTWISE:
            return law.through(ELEMENTWISE[kind])
        if kind in ("Clip", "HardSigmoid", "LeakyRelu", "Elu"):
            return law.through(_parametric(node, kind))
        if kind in _SAME_CHANNELS:
            return law
        if kind == "Pad":
            return either((law, law.times(0.0)))
        return _moved(node, kind, law) if kind in _MOVED else None

    def _arithmetic(self, kind: str, first: Law, second: Law | None) -> Law | None:
        if second is None:
            return None
        if kind in ("Add", "Sub"):
            return added(first, second if kind == "Add" else second.times(-1.0), self.reach)
        if kind == "Mul":
            return multiplied(first, second)
        if np.any((second.low <= 0) & (second.high >= 0)):
            return None
        return multiplied(first, second.through(lambda x: 1 / x))

    def _several(self, node: onnx_ir.Node, laws: list[Law | None]) -> Law | None:
        used = laws[1:] if node.op_type == "Where" else laws
        known = [law for law in used if law is not None]
        return either(known) if known and len(known) == len(used) else None

    def _linear(self, node: onnx_ir.Node, laws: list[Law | None], rank: int) -> Law | None:
        law, weight = laws[0], constant(node.inputs[1])
        assert law is not None
        if weight is None:
            return self._product(node, law, laws[1])
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if node.op_type == "Conv":
            return _convolution(node, law, weight, bias, self.reach)
        if weight.ndim != 2:
            return None
        rows = weight if node.attributes.get_int("transB", 0) else weight.T
        own = law if law.axis == _rank(node.inputs[0]) - 1 else law.merged()
        shift = bias.reshape(-1) if bias is not None and bias.size == len(rows) else None
        return own.linear(rows[:, :, None], shift, rank - 1, self.reach)

    def _product(self, node: onnx_ir.Node, left: Law, right: Law | None) -> Law | None:
        """Of two computed matrices: a mean of rows after a Softmax, else a sum of products."""
        read = node.inputs[0]
        shape = read.shape if read is not None else None
        if right is None:
            return None
        if read is not None and _is_softmax(read):
            return right.merged()
        size = shape[-1] if shape is not None and len(shape) else None
        if not isinstance(size, int):
            return None
        one = multiplied(left.merged(), right.merged())
        return Law.normal(None, one.mean * size, one.deviation * math.sqrt(size), self.reach)


def _rank(value: onnx_ir.Value | None) -> int:
    return value.shape.rank() if value is not None and value.shape is not None else 0


def _is_softmax(value: onnx_ir.Value) -> bool:
    maker = value.producer()
    return maker is not None and maker.op_type == "Softmax"


def _softmax(node: onnx_ir.Node) -> Law:
    """Probabilities; of how many is known where the shape says so."""
    shape = node.outputs[0].shape
    size = shape[-1] if shape is not None and len(shape) else None
    mean = 1.0 / size if isinstance(size, int) and size else 0.1
    zero, one = np.zeros(1), np.ones(1)
    return Law(None, np.array([mean]), np.array([math.sqrt(mean * (1 - mean))]), zero, one)


def _row_law(table: Array, rank: int) -> Law:
    """Rows of a table: any number of a column."""
    return Law.among(table, table.ndim - 1).on(rank - 1)


def _parametric(node: onnx_ir.Node, kind: str) -> Function:
    read = node.attributes.get_float
    if kind == "Clip":
        bounds = [scalar(value) for value in (*node.inputs[1:3], None, None)[:2]]
        low, high = (-np.inf if bounds[0] is None else bounds[0]), bounds[1]
        return lambda x: np.clip(x, low, np.inf if high is None else high)
    if kind == "HardSigmoid":
        slope, shift = read("alpha", 0.2), read("beta", 0.5)
        return lambda x: np.clip(slope * x + shift, 0, 1)
    slope = read("alpha", 0.01 if kind == "LeakyRelu" else 1.0)
    if kind == "LeakyRelu":
        return lambda x: np.where(x < 0, slope * x, x)
    return lambda x: np.where(x < 0, slope * np.expm1(np.minimum(x, 0)), x)


def _convolution(
    node: onnx_ir.Node, law: Law, weight: Array, bias: Array | None, reach: float
) -> Law | None:
    groups, channels = node.attributes.get_int("group", 1), weight.shape[1]
    own = law if law.axis == 1 and len(law.mean) == groups * channels else law.merged()
    return own.linear(weight.reshape(len(weight), channels, -1), bias, 1, reach, groups)


def _moved(node: onnx_ir.Node, kind: str, law: Law) -> Law:
    """Elements in other places; the channels stay where the shape says that they do."""
    before, after = node.inputs[0], node.outputs[0]
    if law.axis is None or before is None or before.shape is None or after.shape is None:
        return law.merged()
    if kind == "Transpose":
        order = list(node.attributes.get_ints("perm", ()) or range(len(before.shape))[::-1])
        return law.on(order.index(law.axis))
    size = len(law.mean)
    rest = list(before.shape)[law.axis + 1 :]
    kept = law.axis < len(after.shape) and after.shape[law.axis] == size
    ones = kind in ("Reshape", "Flatten", "Squeeze") and all(dim == 1 for dim in rest)
    if kept and (ones or kind in ("ReduceMean", "ReduceMax", "ReduceMin", "Expand")):
        return law
    last = law.axis == len(before.shape) - 1 and after.shape[-1] == size
    if last and kind in ("Reshape", "Slice", "Gather", "Expand", "ReduceMean"):
        return law.on(len(after.shape) - 1)
    return law.merged()
