"""Channels-last elementwise arithmetic computed channels-first, where the convolutions are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.passes.rewrite import constant, is_op

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.passes.rewrite import Rewrite

ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Relu", "Clip", "LeakyRelu", "Elu"),
    *("Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf", "Abs", "Neg", "Exp", "Sqrt"),
)
_CHANNELS_LAST, _CHANNELS_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def sink_transpose(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """`f(Transpose(x), constant)` becomes `Transpose(f(x, constant'))`, bit for bit.

    Only from channels-first to channels-last, which converters from TensorFlow write around every
    convolution: sunk far enough, the Transpose meets its inverse.
    """
    sources = [_channels_first(value) for value in node.inputs]
    others = [_permuted(v) for v, s in zip(node.inputs, sources, strict=True) if s is None and v]
    if not any(sources) or any(array is None for array in others):
        return False
    for index, (value, source) in enumerate(zip(node.inputs, sources, strict=True)):
        if source is not None:
            rewrite.bypass(node, index, source)
        elif value is not None and (array := _permuted(value)) is not None and array.size > 1:
            rewrite.set_constant(node, index, array, "channels_first")
    rewrite.transpose_output(node, _CHANNELS_LAST, "channels_first")
    return rewrite.done("transpose-sunk", node, "computed channels-first")


def _channels_first(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """What a value is the channels-last Transpose of."""
    producer = value.producer() if value is not None else None
    if producer is None or not is_op(producer, "Transpose"):
        return None
    perm = list(producer.attributes.get_ints("perm", ()))
    return producer.inputs[0] if perm == _CHANNELS_LAST else None


def _permuted(value: onnx_ir.Value) -> NDArray[np.generic] | None:
    """A constant that broadcasts against channels-last values, for channels-first ones."""
    array = constant(value)
    if array is None or array.ndim > 4:
        return None
    return array.reshape((1,) * (4 - array.ndim) + array.shape).transpose(_CHANNELS_FIRST)
