"""Fold per-channel scales and shifts (BatchNormalization, Mul, Add …) into linear operators."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.facts import Norm
from octavo.passes.linear import Linear, linear_after, linear_before, per_channel
from octavo.passes.rewrite import constant, is_op, only_reader, operand

if TYPE_CHECKING:
    import onnx_ir

    from octavo.passes.linear import Float64
    from octavo.passes.rewrite import Rewrite


@final
@dataclass(frozen=True)
class Affine:
    """`y = x * scale + shift`, arrays of shape `[C]`."""

    scale: Float64
    shift: Float64


def fold_batchnorm(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """BatchNormalization into the linear operator before it, or into all those after it.

    s = gamma / sqrt(variance + epsilon), w' = w * s, b' = (b - mean) * s + beta. The parameters
    stay as a fact about the value that carries the output's name.
    """
    norm = _batch_norm(node)
    if isinstance(norm, str):
        return rewrite.miss(node, norm)
    affine, before = _affine_of_norm(norm), linear_before(node.inputs[0])
    output = _name(node)
    reason = "nothing linear computes its input"
    if before is not None:
        reason = _why_not_before(before, node, affine) or _fold_before(
            node, before, affine, rewrite
        )
        if not reason:
            rewrite.norms[output] = norm
            return rewrite.done("batchnorm-folded", node, f"folded into '{before.node.name}'")
    readers = ", ".join(f"'{use.node.name}'" for use in node.outputs[0].uses())
    late = _why_not_after(node, affine) or _fold_after(node, affine, norm, rewrite)
    if not late:
        return rewrite.done("batchnorm-folded", node, f"folded into {readers}")
    rewrite.norms[output] = norm
    return rewrite.miss(node, f"{reason}; {late}")


def fold_affine(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """Mul, Div, Add, Sub of a constant per channel into the linear operator before it."""
    index = operand(node, constant)
    before = linear_before(node.inputs[index]) if index >= 0 else None
    if before is None or before.last is node or constant(before.weight) is None:
        return False
    affine = _affine_of(node, index, before)
    if affine is None or (not before.has_bias_input and np.any(affine.shift)):
        return False
    if _why_not_before(before, node, affine) or _fold_before(node, before, affine, rewrite):
        return False
    return rewrite.done("affine-folded", node, f"folded into '{before.node.name}'")


def _batch_norm(node: onnx_ir.Node) -> Norm | str:
    """The parameters of a BatchNormalization, or why it cannot be understood."""
    arrays = [constant(value) for value in node.inputs[1:5]]
    gamma, beta, mean, variance = (None if a is None else a.astype(np.float32) for a in arrays)
    if gamma is None or beta is None or mean is None or variance is None:
        return "its parameters are not constant"
    if node.attributes.get_int("training_mode", 0) or any(v.uses() for v in node.outputs[1:]):
        return "it is in training mode"
    if not gamma.ndim == beta.ndim == mean.ndim == variance.ndim == 1:
        return "its parameters are not one number per channel"
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    if not np.all(variance + epsilon > 0):
        return "a variance is negative or not a number"
    return Norm("batch", gamma, beta, mean, variance, epsilon)


def _affine_of_norm(norm: Norm) -> Affine:
    assert norm.mean is not None
    assert norm.variance is not None
    scale = norm.gamma / np.sqrt(norm.variance.astype(np.float64) + norm.epsilon)
    return Affine(scale, norm.beta - norm.mean * scale)


def _affine_of(node: onnx_ir.Node, index: int, before: Linear) -> Affine | None:
    """What an arithmetic node with a constant operand does to each channel of `before`."""
    array = constant(node.inputs[1 - index])
    vector = per_channel(array, before.rank, before.axis, before.channels)
    if vector is None:
        return None
    one, zero = np.ones(before.channels), np.zeros(before.channels)
    match node.op_type, index:
        case "Mul", _:
            return Affine(vector, zero)
        case "Div", 0:
            return Affine(one / vector, zero) if np.all(vector) else None
        case "Add", _:
            return Affine(one, vector)
        case "Sub", 0:
            return Affine(one, -vector)
        case "Sub", _:
            return Affine(-one, vector)
    return None


def _why_not_before(before: Linear | None, node: onnx_ir.Node, affine: Affine) -> str:
    if before is None:
        return "no linear operator with a constant weight computes its input"
    if only_reader(before.last.outputs[0]) is not node:
        return f"'{before.last.name}' has another reader"
    if reason := before.why_fixed():
        return reason
    if is_op(node, "BatchNormalization") and before.axis == -1 and before.rank != 2:
        return f"its channels are not the columns of '{before.node.name}'"
    if affine.scale.size != before.channels:
        return f"it has {affine.scale.size} channels, '{before.node.name}' {before.channels}"
    return ""


def _fold_before(node: onnx_ir.Node, before: Linear, affine: Affine, rewrite: Rewrite) -> str:
    bias = before.bias()
    assert bias is not None
    shifted = bias * affine.scale + affine.shift
    new_bias = shifted if before.has_bias_input and (np.any(shifted) or np.any(bias)) else None
    stored = before.stored(before.scaled(affine.scale), new_bias)
    if stored is None:
        return f"the folded weight of '{before.node.name}' does not fit {before.dtype}"
    before.assign(rewrite, *stored)
    _move_norm(before.last, node, affine, rewrite)
    if before.has_bias_input or not np.any(affine.shift):
        rewrite.absorb(node, before.last)
        return ""
    # MatMul has no bias input, so the shift stays behind as an Add of the same name.
    node.op_type = "Add"
    node.attributes.clear()
    node.resize_inputs(1)
    rewrite.set_constant(node, 1, shifted.astype(before.dtype), "bias")
    return ""


def _name(node: onnx_ir.Node) -> str:
    return node.outputs[0].name or ""


def _move_norm(before: onnx_ir.Node, node: onnx_ir.Node, affine: Affine, rewrite: Rewrite) -> None:
    """A norm folded earlier now describes what comes out of this node."""
    norm = rewrite.norms.pop(before.outputs[0].name or "", None)
    if norm is not None:
        gamma = (norm.gamma * affine.scale).astype(np.float32)
        beta = (norm.beta * affine.scale + affine.shift).astype(np.float32)
        rewrite.norms[_name(node)] = replace(norm, gamma=gamma, beta=beta)


def _why_not_after(node: onnx_ir.Node, affine: Affine) -> str:
    output = node.outputs[0]
    if output.is_graph_output():
        return "its output is a graph output"
    for reader, index in output.uses():
        linear = linear_after(reader)
        if linear is None or index != 0 or reader.graph is not node.graph:
            return f"'{reader.name}' reads it and is no linear operator"
        if reason := linear.why_fixed() or _why_not_exact(linear, affine):
            return reason
    return "" if output.uses() else "nothing reads it"


def _why_not_exact(linear: Linear, affine: Affine) -> str:
    name, attributes = linear.node.name, linear.node.attributes
    if affine.scale.size != linear.input_channels:
        return f"it has {affine.scale.size} channels, '{name}' reads {linear.input_channels}"
    if is_op(linear.node, "MatMul") and linear.rank != 2:
        return f"its channels are not the rows of the weight of '{name}'"
    if attributes.get_int("transA", 0):
        return f"'{name}' transposes its input"
    if not np.any(affine.shift):
        return ""
    if not linear.has_bias_input:
        return f"'{name}' has no bias that could take the shift"
    padded = any(attributes.get_ints("pads", ())) or attributes.get_string(
        "auto_pad", "NOTSET"
    ) not in ("NOTSET", "VALID")
    return f"'{name}' pads with zeros that the shift would change" if padded else ""


def _fold_after(node: onnx_ir.Node, affine: Affine, norm: Norm, rewrite: Rewrite) -> str:
    folded = []
    for reader, _ in node.outputs[0].uses():
        linear = linear_after(reader)
        bias = linear.bias() if linear is not None else None
        assert linear is not None
        assert bias is not None
        weight, increment = linear.fed(affine.scale, affine.shift)
        stored = linear.stored(weight, bias + increment if np.any(increment) else None)
        if stored is None:
            return f"the folded weight of '{reader.name}' does not fit {linear.dtype}"
        folded.append((linear, stored))
    for linear, stored in folded:
        linear.assign(rewrite, *stored)
    # What the next operator reads now is the input, of which the running statistics speak.
    assert norm.mean is not None
    assert norm.variance is not None
    deviation = np.sqrt(norm.variance + norm.epsilon).astype(np.float32)
    described = replace(norm, gamma=deviation, beta=norm.mean)
    rewrite.norms.setdefault(node.inputs[0].name or "", described)  # type: ignore[union-attr]
    rewrite.drop(node)
    return ""
