"""A language model that gives the logits of the last position alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.ir.constants import constant_behind
from octavo.passes.rewrite import Rewrite

if TYPE_CHECKING:
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

# Each position of `[B, T, C]` by itself, beside constants without positions.
_ONE_BY_ONE = ("Add", "Cast", "Div", "Identity", "MatMul", "Mul", "Sub", "Tanh")


def last_logits(model: Model, ctx: PassContext) -> Model:
    """The model with `[B, 1, tokens]` for a first output `[B, T, tokens]`.

    What only the first output reads, and works on every position by itself, runs on the last one:
    the product with the head takes a good part of a small model's time and most of its memory.
    The model itself where its output is no such product.
    """
    own = model.clone()
    output = own.graph.outputs[0]
    steps = []
    value = output
    while (read := _position_by_position(value, output)) is not None:
        steps.append(read)
        value = read[1]
    products = [at for at, (node, _) in enumerate(steps) if node.op_type == "MatMul"]
    if not products:
        return model
    node, value = steps[products[-1]]
    rewrite = Rewrite(own, ctx)
    last = onnx_ir.Value(name=rewrite.fresh("last_position"), type=value.type)
    gather = onnx_ir.Node(
        "", "Gather", [value, None], [onnx_ir.AttrInt64("axis", 1)],
        outputs=[last], name=last.name,
    )  # fmt: skip
    own.graph.insert_before(node, gather)
    rewrite.set_constant(gather, 1, np.array([-1]), "index")
    node.replace_input_with(list(node.inputs).index(value), last)
    for made, _ in steps[: products[-1] + 1]:
        made.outputs[0].shape = None
    return own


def _position_by_position(
    value: onnx_ir.Value, output: onnx_ir.Value
) -> tuple[onnx_ir.Node, onnx_ir.Value] | None:
    """The node that makes a value nobody else reads from one other, and that other."""
    node = value.producer()
    readers = 0 if value is output else 1
    if node is None or node.domain or node.op_type not in _ONE_BY_ONE:
        return None
    if len(value.uses()) != readers or (value.is_graph_output() and value is not output):
        return None
    moving = [v for v in node.inputs if v is not None and constant_behind(v) is None]
    fixed = [t for v in node.inputs if (t := constant_behind(v)) is not None]
    if len(moving) != 1 or (node.op_type == "MatMul" and moving[0] is not node.inputs[0]):
        return None
    most = 2 if node.op_type == "MatMul" else 1
    return (node, moving[0]) if all(len(t.shape) <= most for t in fixed) else None
