"""The constant behind an input, also where a tied weight is read through a Transpose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.ir.mapped import reading

if TYPE_CHECKING:
    from onnx_ir import TensorProtocol


def constant_behind(value: onnx_ir.Value | None) -> TensorProtocol | None:
    """The tensor of a constant, or of the matrix that a Transpose turns into `value`.

    Size and dtype are those of `value`; the shape is only where `is_turned` is false.
    """
    source = matrix_source(value)
    if source is not None:
        return source.const_value
    return value.const_value if value is not None else None


def own_constant(value: onnx_ir.Value, graph: onnx_ir.Graph) -> onnx_ir.Value:
    """`value` itself if it is a constant, else an initializer that holds the turned matrix.

    The turned matrix is computed when it is read, and not kept.
    """
    source = matrix_source(value)
    if source is None or source.const_value is None:
        return value
    tensor, name = source.const_value, f"{source.name}_turned"
    if name in graph.initializers:
        return graph.initializers[name]
    rows, columns = tensor.shape.numpy()
    turned = onnx_ir.LazyTensor(
        lambda: onnx_ir.Tensor(reading(tensor, lambda a: np.array(a.T, order="C")), name=name),
        dtype=tensor.dtype,
        shape=onnx_ir.Shape((columns, rows)),
        name=name,
    )
    made = onnx_ir.Value(name=name, shape=turned.shape, type=value.type, const_value=turned)
    graph.register_initializer(made)
    return made


def matrix_source(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """The constant matrix that a Transpose turns into `value`, `None` for any other value."""
    made = value.producer() if value is not None else None
    if made is None or made.op_type != "Transpose" or made.domain:
        return None
    source, order = made.inputs[0], made.attributes.get_ints("perm", [1, 0])
    if source is None or source.const_value is None or list(order or []) != [1, 0]:
        return None
    return source if len(source.const_value.shape) == 2 else None
