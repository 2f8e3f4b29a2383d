"""LayerNormalization, as one node or spelled out, recorded as a fact; nothing is rewritten."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.facts import Norm
from octavo.passes.rewrite import constant, is_op, only_reader, operand, scalar

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model


def layer_norms(model: Model) -> dict[str, Norm]:
    """Scale and shift of every LayerNorm with constant ones, by the value it computes."""
    found: dict[str, Norm] = {}
    for node in model.graph.all_nodes():
        if is_op(node, "LayerNormalization"):
            gamma = _vector(node.inputs[1])
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            beta = _vector(bias) if bias is not None else None
            epsilon, output = node.attributes.get_float("epsilon", 1e-5), node.outputs[0]
        elif is_op(node, "Div") and (epsilon := _epsilon(node)) > 0.0:
            scaled = _reader(node.outputs[0], "Mul")
            gamma = _constant_operand(scaled)
            shifted = _reader(scaled.outputs[0], "Add") if scaled is not None else None
            beta = _constant_operand(shifted)
            output = (shifted or scaled or node).outputs[0]
        else:
            continue
        if gamma is not None:
            beta = beta if beta is not None else np.zeros_like(gamma)
            found[output.name or ""] = Norm("layer", gamma, beta, epsilon=epsilon)
    return found


def _epsilon(div: onnx_ir.Node) -> float:
    """Epsilon of `centred / Sqrt(ReduceMean(centred²) + epsilon)`, or 0 for any other Div."""
    centred, root = div.inputs[0], _producer(div.inputs[1], "Sqrt")
    subtraction = _producer(centred, "Sub")
    added = _producer(root.inputs[0], "Add") if root is not None else None
    if subtraction is None or added is None:
        return 0.0
    index = operand(added, scalar)
    epsilon = scalar(added.inputs[1 - index]) if index >= 0 else None
    variance = _producer(added.inputs[index], "ReduceMean")
    mean = _producer(subtraction.inputs[1], "ReduceMean")
    if epsilon is None or variance is None or mean is None:
        return 0.0
    if mean.inputs[0] is not subtraction.inputs[0] or not _squares(variance.inputs[0], centred):
        return 0.0
    return epsilon


def _squares(value: onnx_ir.Value | None, centred: onnx_ir.Value | None) -> bool:
    power, product = _producer(value, "Pow"), _producer(value, "Mul")
    if power is not None:
        return power.inputs[0] is centred and scalar(power.inputs[1]) == 2.0
    return product is not None and all(v is centred for v in product.inputs)


def _producer(value: onnx_ir.Value | None, op_type: str) -> onnx_ir.Node | None:
    node = value.producer() if value is not None else None
    return node if is_op(node, op_type) else None


def _reader(value: onnx_ir.Value, op_type: str) -> onnx_ir.Node | None:
    node = only_reader(value)
    return node if is_op(node, op_type) else None


def _constant_operand(node: onnx_ir.Node | None) -> NDArray[np.float32] | None:
    index = operand(node, constant) if node is not None else -1
    return _vector(node.inputs[1 - index]) if node is not None and index >= 0 else None


def _vector(value: onnx_ir.Value | None) -> NDArray[np.float32] | None:
    array = constant(value)
    flat = array is not None and array.size == (array.shape or (1,))[-1]
    return array.reshape(-1).astype(np.float32) if array is not None and flat else None
