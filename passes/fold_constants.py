"""Constants computed once, duplicates computed once, nothing computed that nobody reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir.passes.common as onnx_passes

from octavo.ir.fake_quant import DOMAIN
from octavo.passes.rewrite import constant, owned

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir

# A folded constant larger than this would cost more in the file than its node costs at run time.
LIMIT_ENTRIES = 65536

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
_PRODUCTS = frozenset(("Gather", "GatherND", "MatMul"))


def tidy(model: onnx_ir.Model, *, merge_duplicates: bool) -> None:
    """Lift constants, inline functions, fold what is constant, drop what is unused."""
    from onnxscript.optimizer import fold_constants

    onnx_passes.InlinePass(criteria=lambda function: function.domain != DOMAIN)(model)
    onnx_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    # The reference evaluator warns on overflow where the runtime would compute it silently.
    with np.errstate(all="ignore"):
        fold_constants(model, onnx_shape_inference=True, should_fold=_worth_folding)
    if merge_duplicates:
        onnx_passes.CommonSubexpressionEliminationPass()(model)
    onnx_passes.RemoveUnusedNodesPass()(model)


def _worth_folding(node: onnx_ir.Node) -> bool:
    """Whether the result is small, or takes the place of its only source."""
    sources = [v.const_value for v in node.inputs if v is not None and v.const_value is not None]
    if node.domain not in ("", "ai.onnx") or not sources:
        return False
    if node.op_type in _VIEWS and node.inputs[0] is not None and owned(node.inputs[0]):
        return True
    if max(tensor.size for tensor in sources) > LIMIT_ENTRIES:
        return False
    entries = _entries(node, [tuple(tensor.shape.numpy()) for tensor in sources])
    return entries is not None and entries <= LIMIT_ENTRIES


def _entries(node: onnx_ir.Node, shapes: Sequence[tuple[int, ...]]) -> int | None:
    """A bound of the entries that evaluation creates, `None` for operators without one."""
    sizes = [math.prod(shape) for shape in shapes]
    if node.op_type in _VIEWS or node.op_type in _NO_LARGER:
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
            return math.ceil(abs((numbers[1][0] - numbers[0][0]) / numbers[2][0]))
    return None


def _broadcast(*shapes: tuple[int, ...]) -> int | None:
    try:
        return math.prod(np.broadcast_shapes(*shapes))
    except ValueError:
        return None
