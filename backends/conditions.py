"""What rows of target tables ask of a node, shared by the targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.ir.constants import constant_behind
from octavo.ir.target import Condition

if TYPE_CHECKING:
    import onnx_ir


def _constant(node: onnx_ir.Node, index: int) -> onnx_ir.TensorProtocol | None:
    return constant_behind(node.inputs[index]) if index < len(node.inputs) else None


def float_constant(index: int) -> Condition:
    """A weight that the file holds as float32."""

    def holds(node: onnx_ir.Node) -> bool:
        tensor = _constant(node, index)
        return tensor is not None and tensor.dtype.name == "FLOAT" and tensor.size > 0

    return Condition(f"a constant float32 weight as input {index}", holds)


def attribute(name: str, default: object, *allowed: object) -> Condition:
    """An attribute with one of the allowed values; `default` stands for a missing one."""

    def holds(node: onnx_ir.Node) -> bool:
        attribute = node.attributes.get(name)
        return (default if attribute is None else attribute.value) in allowed

    return Condition(f"{name} = {' or '.join(map(str, allowed))}", holds)


def rank(index: int, *ranks: int) -> Condition:
    """An input with one of the ranks."""

    def holds(node: onnx_ir.Node) -> bool:
        value = node.inputs[index] if index < len(node.inputs) else None
        return value is not None and value.shape is not None and value.shape.rank() in ranks

    return Condition(f"input {index} of rank {' or '.join(map(str, ranks))}", holds)


def float_inputs(*indices: int) -> Condition:
    """Inputs (none given: all) of type float32."""

    def holds(node: onnx_ir.Node) -> bool:
        chosen = [node.inputs[k] for k in indices] if indices else list(node.inputs)
        return all(
            v is not None and v.dtype is not None and v.dtype.name == "FLOAT" for v in chosen
        )

    return Condition("float32 inputs", holds)


def group(kind: str) -> Condition:
    """A convolution that is dense, depthwise or grouped."""

    def holds(node: onnx_ir.Node) -> bool:
        weight = _constant(node, 1)
        group = node.attributes.get_int("group", 1)
        if weight is None or group == 1:
            return kind == "dense"
        depthwise = weight.shape[1] == 1 and weight.shape[0] == group
        return kind == ("depthwise" if depthwise else "grouped")

    return Condition(f"{kind} convolution", holds)


def _vector_bias(node: onnx_ir.Node) -> bool:
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    weight, bias = node.inputs[1], _constant(node, 2)
    if weight is None or weight.shape is None or bias is None:
        return False
    columns = weight.shape[0 if node.attributes.get_int("transB", 0) else 1]
    return [bias.size, bias.size] == [columns, *bias.shape.numpy()[-1:]]


VECTOR_BIAS = Condition("no bias, or a constant with one entry per column", _vector_bias)


def gemm_conditions(transposed: int) -> tuple[Condition, ...]:
    """A Gemm that is a matrix product and a bias; its weight may be transposed where given."""
    return (
        float_constant(1),
        attribute("transB", 0, transposed),
        attribute("transA", 0, 0),
        attribute("alpha", 1.0, 1.0),
        attribute("beta", 1.0, 1.0),
        VECTOR_BIAS,
    )


def _from_convolution(node: onnx_ir.Node) -> bool:
    """Whether a convolution makes an operand for this node alone."""
    makers = ((v, v.producer()) for v in node.inputs if v is not None)
    return any(
        made is not None and made.op_type == "Conv" and len(v.uses()) == 1 for v, made in makers
    )


RESIDUAL = Condition("a sum with the output of a convolution", _from_convolution)
