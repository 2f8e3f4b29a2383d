"""Linear operators with a constant weight, and the arithmetic of scaling their channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.passes.rewrite import constant, is_op, only_reader, operand, owned

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.passes.rewrite import Rewrite

    Float64 = NDArray[np.float64]
    Array = NDArray[np.generic]

_FLOATS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.DOUBLE)


@final
@dataclass(frozen=True)
class Linear:
    """`y = op(x, weight) + bias`; `last` computes y: `node`, or the Add that is its bias."""

    node: onnx_ir.Node
    last: onnx_ir.Node

    @property
    def weight(self) -> onnx_ir.Value | None:
        return self.node.inputs[1]

    @property
    def dtype(self) -> np.dtype[np.generic]:
        assert self.weight is not None
        assert self.weight.dtype is not None
        return self.weight.dtype.numpy()

    @property
    def rank(self) -> int | None:
        """The rank of y, `None` where it is unknown."""
        if is_op(self.node, "Gemm"):
            return 2
        known = self.node.outputs[0] if is_op(self.node, "MatMul") else self.weight
        return len(known.shape) if known is not None and known.shape is not None else None

    @property
    def axis(self) -> int:
        """The channel axis of y."""
        return -1 if is_op(self.node, "Gemm", "MatMul") else 1

    @property
    def groups(self) -> int:
        return self.node.attributes.get_int("group", 1)

    @property
    def transposed(self) -> bool:
        """Whether the weight is [N, K] rather than [K, N] (Gemm and MatMul)."""
        return bool(self.node.attributes.get_int("transB", 0))

    @property
    def channels(self) -> int:
        """The number of output channels."""
        shape = self._weight_shape
        if is_op(self.node, "ConvTranspose"):
            return shape[1] * self.groups
        return shape[0] if is_op(self.node, "Conv") or self.transposed else shape[-1]

    @property
    def input_channels(self) -> int:
        shape = self._weight_shape
        if is_op(self.node, "Conv"):
            return shape[1] * self.groups
        return shape[-1] if self.transposed else shape[0]

    @property
    def bias_index(self) -> int:
        """Where `last` takes the bias."""
        return 2 if self.last is self.node else 1 - operand_of_matmul(self.last, self.node)

    @property
    def has_bias_input(self) -> bool:
        return self.last is not self.node or not is_op(self.node, "MatMul")

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        array = constant(self.weight)
        return () if array is None else array.shape

    def why_fixed(self) -> str:
        """Why the weight or bias cannot change, "" where they can."""
        weight, dtype = self.weight, self.weight.dtype if self.weight is not None else None
        if weight is None or constant(weight) is None:
            return f"the weight of '{self.node.name}' is not constant"
        if dtype not in _FLOATS:
            return f"the weight of '{self.node.name}' is {dtype}"
        if not owned(weight):
            return f"the weight of '{self.node.name}' is shared"
        if len(self._weight_shape) != 2 and is_op(self.node, "Gemm", "MatMul"):
            return f"the weight of '{self.node.name}' is not a matrix"
        if self.bias() is None:
            return f"the bias of '{self.node.name}' is not one constant per channel"
        return ""

    def bias(self) -> Float64 | None:
        """The bias, shape `[channels]`; zero where there is none."""
        index = self.bias_index
        value = self.last.inputs[index] if index < len(self.last.inputs) else None
        if value is None:
            return np.zeros(self.channels)
        direct = self.last is self.node and not is_op(self.node, "Gemm")
        rank, axis = (1, 0) if direct else (self.rank, self.axis)
        vector = per_channel(constant(value), rank, axis, self.channels)
        beta = self.node.attributes.get_float("beta", 1.0)
        return None if vector is None else vector * beta

    def scaled(self, scale: Float64) -> Float64:
        """The weight that multiplies output channel c by `scale[c]`."""
        weight = self._float64()
        if is_op(self.node, "ConvTranspose"):  # [I, O/g, k…]
            split = weight.reshape(self.groups, -1, *weight.shape[1:])
            factor = scale.reshape(self.groups, 1, -1, *(1,) * (weight.ndim - 2))
            return (split * factor).reshape(weight.shape)
        if is_op(self.node, "Conv") or self.transposed:
            return weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
        return weight * scale

    def fed(self, scale: Float64, shift: Float64) -> tuple[Float64, Float64]:
        """Weight and bias increment that equal feeding `x * scale + shift` (no padding)."""
        weight = self._float64()
        if is_op(self.node, "Conv"):  # [O, I/g, k…]
            split = weight.reshape(self.groups, -1, *weight.shape[1:])
            blank = (1,) * (weight.ndim - 2)
            by_group = (self.groups, 1, -1, *blank)
            response = (split * shift.reshape(by_group)).reshape(weight.shape[0], -1).sum(axis=1)
            return (split * scale.reshape(by_group)).reshape(weight.shape), response
        alpha = self.node.attributes.get_float("alpha", 1.0)
        if self.transposed:
            return weight * scale, alpha * (weight @ shift)
        return weight * scale[:, None], alpha * (shift @ weight)

    def stored(self, weight: Float64, bias: Float64 | None) -> tuple[Array, Array | None] | None:
        """Weight and bias in the weight's type, `None` where a number does not fit."""
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = weight.astype(self.dtype)
            narrow_bias = None if bias is None else bias.astype(self.dtype)
        finite = np.all(np.isfinite(narrow)) and (
            narrow_bias is None or np.all(np.isfinite(narrow_bias))
        )
        return (narrow, narrow_bias) if finite else None

    def assign(self, rewrite: Rewrite, weight: Array, bias: Array | None) -> None:
        """Replace the weight, and the bias unless it is `None`."""
        rewrite.set_constant(self.node, 1, weight, "weight")
        if bias is not None:
            rewrite.set_constant(self.last, self.bias_index, bias, "bias")
            self.node.attributes.pop("beta", None)

    def _float64(self) -> Float64:
        array = constant(self.weight)
        assert array is not None
        return array.astype(np.float64)


def linear_before(value: onnx_ir.Value | None) -> Linear | None:
    """The linear operator that computes a value."""
    producer = value.producer() if value is not None else None
    if producer is None:
        return None
    if is_op(producer, "Conv", "ConvTranspose", "Gemm", "MatMul"):
        return Linear(producer, producer)
    matmul = _biased_matmul(producer)
    return None if matmul is None else Linear(matmul, producer)


def linear_after(node: onnx_ir.Node) -> Linear | None:
    """The linear operator that a node is, with the Add that is its bias."""
    if is_op(node, "MatMul"):
        add = only_reader(node.outputs[0])
        return Linear(node, add if add is not None and _biased_matmul(add) is node else node)
    return Linear(node, node) if is_op(node, "Conv", "Gemm") else None


def per_channel(
    array: NDArray[np.generic] | None, rank: int | None, axis: int, channels: int
) -> Float64 | None:
    """A constant that broadcasts along `axis` of a rank-`rank` value, as shape `[channels]`.

    `None` where it varies along another axis or would enlarge the value.
    """
    if array is None or array.dtype.kind not in "fiu":
        return None
    rank = rank if rank is not None else 1
    if array.ndim > rank:
        return None
    full = array.reshape((1,) * (rank - array.ndim) + array.shape)
    if full.size != full.shape[axis] or full.size not in (1, channels):
        return None
    return np.broadcast_to(full.reshape(-1).astype(np.float64), channels)


def operand_of_matmul(add: onnx_ir.Node, matmul: onnx_ir.Node) -> int:
    """Which input of an Add is the product."""
    return 0 if add.inputs[0] is matmul.outputs[0] else 1


def _biased_matmul(add: onnx_ir.Node) -> onnx_ir.Node | None:
    if not is_op(add, "Add") or (index := operand(add, constant)) < 0:
        return None
    value = add.inputs[index]
    producer = value.producer() if value is not None else None
    alone = value is not None and only_reader(value) is add
    return producer if alone and is_op(producer, "MatMul") else None
