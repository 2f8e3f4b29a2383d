"""Constants computed once, duplicates computed once, nothing computed that nobody reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir.passes.common as onnx_passes

from octavo.ir.subgraphs import subgraphs
from octavo.passes.recognize_quantized import CODE_TYPES
from octavo.passes.rewrite import constant, owned

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir

    from octavo.passes.rewrite import Rewrite

# A folded constant larger than this would cost more in the file than its node costs at run time.
LIMIT_ENTRIES = 65536
# Nodes that make many entries out of a few are the smaller form of all but the smallest.
LIMIT_EXPANDED = 1024
_EXPANDING = ("ConstantOfShape", "Expand", "Range", "Tile")
# A larger constant with other readers (a tied embedding) stays one constant.
_LIMIT_SHARED = 1024

_VIEWS = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Identity")
# fmt: off
_ELEMENTWISE = frozenset((
    "Abs", "Add", "And", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
    "Cast", "Ceil", "Clip", "Cos", "Div", "Equal", "Erf", "Exp", "Floor", "Greater",
    "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod",
    "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin",
    "Sqrt", "Sub", "Sum", "Tanh", "Where", "Xor",
))
_NO_LARGER = frozenset((
    "Concat", "CumSum", "GatherElements", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ScatterElements", "ScatterND", "Shape", "Size", "Slice", "Trilu",
))
# fmt: on
_REARRANGING = frozenset(("Concat", "Slice", "Split", "Squeeze", "Unsqueeze"))
_PRODUCTS = frozenset(("Gather", "GatherND", "MatMul"))


def tidy(rewrite: Rewrite, *, merge_duplicates: bool) -> None:
    """Fold what is constant, merge what is computed twice, drop what is unused."""
    from onnxscript.optimizer import fold_constants

    model = rewrite.model.ir
    branching = [node for node in model.graph.all_nodes() if _bodies(node)]
    try:
        # The reference evaluator warns on overflow where the runtime would compute it silently.
        with np.errstate(all="ignore"):
            fold_constants(model, onnx_shape_inference=True, should_fold=_worth_folding)
    except RuntimeError as error:
        rewrite.unfolded = str(error)
    onnx_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if merge_duplicates:
        onnx_passes.CommonSubexpressionEliminationPass()(model)
    _forget_removed(branching)
    onnx_passes.RemoveUnusedNodesPass()(model)


def _bodies(node: onnx_ir.Node) -> list[onnx_ir.Graph]:
    return [graph for attribute in node.attributes.values() for graph in subgraphs(attribute)]


def _forget_removed(branching: Sequence[onnx_ir.Node]) -> None:
    """Nodes in the bodies of removed nodes would count as readers of outer values for ever."""
    for body in (body for node in branching if node.graph is None for body in _bodies(node)):
        for reader in body.all_nodes():
            for index in range(len(reader.inputs)):
                reader.replace_input_with(index, None)


def _worth_folding(node: onnx_ir.Node) -> bool:
    """Whether the result is small, or takes the place of its only source; codes stay codes."""
    sources = [v.const_value for v in node.inputs if v is not None and v.const_value is not None]
    if node.domain not in ("", "ai.onnx") or not sources:
        return False
    if node.op_type == "Cast" and sources[0].dtype.name in CODE_TYPES:
        return False
    if node.op_type in _VIEWS and node.inputs[0] is not None and owned(node.inputs[0]):
        return True
    if _only_rearranged(node):
        return True
    if max(tensor.size for tensor in sources) > LIMIT_ENTRIES:
        return False
    entries = _entries(node, [tuple(tensor.shape.numpy()) for tensor in sources])
    limit = LIMIT_EXPANDED if node.op_type in _EXPANDING else LIMIT_ENTRIES
    return entries is not None and entries <= limit


def _only_rearranged(node: onnx_ir.Node) -> bool:
    """Whether weights are cut and joined again, as exporters reorder the gates of an LSTM."""
    if node.op_type not in _REARRANGING or any(
        v is None or v.const_value is None for v in node.inputs
    ):
        return False
    large = [v for v in node.inputs if v is not None and v.const_value and v.const_value.size > 16]
    readers = [use.node for value in large for use in value.uses()]
    return all(reader.op_type in _REARRANGING for reader in readers)


def _entries(node: onnx_ir.Node, shapes: Sequence[tuple[int, ...]]) -> int | None:
    """A bound of the entries that evaluation creates, `None` for operators without one."""
    sizes = [math.prod(shape) for shape in shapes]
    if node.op_type in _NO_LARGER:
        return sum(sizes)
    if node.op_type in _PRODUCTS:
        return math.prod(sizes)
    if node.op_type in _ELEMENTWISE:
        return _broadcast(*shapes)
    operands = [constant(value) for value in node.inputs]
    numbers = [() if array is None else tuple(array.reshape(-1).tolist()) for array in operands]
    match node.op_type:
        case "ConstantOfShape":
            return int(math.prod(numbers[0]))
        case "Expand":
            return _broadcast(shapes[0], numbers[1])
        case "Tile":
            return int(math.prod((*shapes[0], *numbers[1])))
        case "Range" if len(numbers) == 3 and numbers[2][0]:
            return int(1 + abs((numbers[1][0] - numbers[0][0]) / numbers[2][0]))
    return None


def _broadcast(*shapes: tuple[int, ...]) -> int | None:
    try:
        return math.prod(np.broadcast_shapes(*shapes))
    except ValueError:
        return None
