"""Files with float4 weights, made ready for a runtime that has no such type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.ir.constants import constant_behind
from octavo.ir.fake_quant import constant
from octavo.ir.mapped import reading

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_DEQUANTIZE = "DequantizeLinear"
_FLOAT4 = onnx_ir.DataType.FLOAT4E2M1


def runnable(path: Path) -> Path | bytes:
    """The file itself, or where it holds float4 weights a model with the numbers they stand for."""
    model = onnx_ir.load(path)
    graph, found = model.graph, False
    for node in [n for n in graph if n.op_type == _DEQUANTIZE]:
        codes = constant_behind(node.inputs[0])
        if codes is not None and codes.dtype == _FLOAT4:
            _replace(graph, node, codes)
            found = True
    return onnx_ir.to_proto(model).SerializeToString() if found else path


def scale_behind(value: onnx_ir.Value | None) -> onnx_ir.TensorProtocol | None:
    """A constant scale, also one that is dequantized itself from constants, per tensor."""
    made = value.producer() if value is not None else None
    if made is None or made.op_type != _DEQUANTIZE:
        return constant_behind(value)
    codes, unit = constant_behind(made.inputs[0]), constant_behind(made.inputs[1])
    if codes is None or unit is None or unit.size != 1:
        return None
    real = reading(codes, lambda array: array.astype(np.float32)) * unit.numpy()
    return onnx_ir.Tensor(real.astype(unit.dtype.numpy()), unit.dtype)


def _replace(graph: onnx_ir.Graph, node: onnx_ir.Node, codes: onnx_ir.TensorProtocol) -> None:
    """The weight itself in the place of what dequantizes it."""
    scale = scale_behind(node.inputs[1])
    if scale is None:
        return
    axis, size = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    real = reading(codes, lambda array: _real(array, scale.numpy(), axis, size))
    made = node.outputs[0]
    name, made.name = made.name or "", f"{made.name}_before"
    value = constant(graph, name, real)
    onnx_ir.convenience.replace_all_uses_with(made, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _real(
    codes: NDArray[np.generic], scale: NDArray[np.floating], axis: int, size: int
) -> NDArray[np.floating]:
    """What DequantizeLinear computes, in the type of the scale."""
    if size:
        spread = np.repeat(scale, size, axis=axis)
        scale = np.take(spread, np.arange(codes.shape[axis]), axis=axis)
    elif scale.size > 1:
        scale = scale.reshape([-1 if k == axis % codes.ndim else 1 for k in range(codes.ndim)])
    return np.asarray(codes.astype(scale.dtype) * scale)
