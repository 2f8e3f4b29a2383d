"""Parameters of a model that was quantized before it came here; its nodes stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np

from octavo.ir.quant import (
    Granularity,
    PerAxis,
    PerBlock,
    PerTensor,
    QuantParams,
    QuantSpec,
    QuantType,
)
from octavo.passes.rewrite import constant, is_op

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray


# fmt: off
_INTEGER_OPS = frozenset((
    "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul",
    "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSigmoid", "QLinearSoftmax",
    "QLinearLeakyRelu", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearWhere",
    "QGemm", "QAttention", "QMoE", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM",
    "MatMulIntegerToFloat", "MatMulNBits", "MatMulBnb4", "GatherBlockQuantized",
    "EmbedLayerNormalizationQuant",
))
# fmt: on
# Of the types that are stored alike the widest, which comes first.
CODE_TYPES: dict[str, QuantType] = {
    QuantSpec(name).onnx_type.name: name
    for name in reversed(get_args(QuantType))
    if not QuantSpec(name).half
}


def is_quantized(node: onnx_ir.Node) -> bool:
    """Whether a node belongs to a model that somebody quantized."""
    if node.domain not in ("", "ai.onnx", "com.microsoft"):
        return False
    return _is_pair(node) or node.op_type in _INTEGER_OPS or _stored_scale(node) is not None


def quantized_values(node: onnx_ir.Node) -> dict[str, QuantParams]:
    """The parameters of the float value that a Q reads, or that a DQ or `Cast · scale` computes."""
    if _is_pair(node):
        quantizes = node.op_type == "QuantizeLinear"
        codes = node.outputs[0] if quantizes else node.inputs[0]
        value = node.inputs[0] if quantizes else node.outputs[0]
        params = _params(node, codes)
    else:
        value, params = node.outputs[0], _stored_params(node)
    return {} if value is None or params is None else {value.name or "": params}


def _is_pair(node: onnx_ir.Node) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear")


def _stored_scale(node: onnx_ir.Node) -> tuple[QuantType, NDArray[np.generic]] | None:
    """Type of the codes and scale of `Mul(Cast(codes), scale)`, both constant."""
    for value, other in zip(node.inputs, reversed(node.inputs), strict=True):
        cast = value.producer() if value is not None else None
        if not is_op(node, "Mul") or cast is None or not is_op(cast, "Cast"):
            continue
        codes, scale = cast.inputs[0], constant(other)
        dtype = CODE_TYPES.get(codes.dtype.name) if codes is not None and codes.dtype else None
        if dtype is not None and scale is not None and constant(codes) is not None:
            return dtype, scale
    return None


def _stored_params(node: onnx_ir.Node) -> QuantParams | None:
    found = _stored_scale(node)
    if found is None:
        return None
    dtype, scale = found[0], found[1].astype(np.float32)
    axes = [axis for axis, size in enumerate(scale.shape) if size > 1]
    if len(axes) > 1 or not np.all(np.isfinite(scale)) or not np.all(scale > 0):
        return None
    spec = QuantSpec(dtype, PerAxis(axes[0]) if axes else PerTensor())
    flat = scale.reshape(-1 if axes else ())
    return QuantParams(spec, flat, np.zeros(flat.shape, np.int32))


def _params(node: onnx_ir.Node, codes: onnx_ir.Value | None) -> QuantParams | None:
    """Parameters of a Q or DQ; `None` where computed or of a type octavo has no name for."""
    found = constant(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    zero = constant(given)
    dtype = CODE_TYPES.get(codes.dtype.name) if codes is not None and codes.dtype else None
    if found is None or dtype is None or (given is not None and zero is None):
        return None
    scale = found.astype(np.float32)
    if not np.all(np.isfinite(scale)) or not np.all(scale > 0):
        return None
    if zero is None:
        zero = np.zeros(scale.shape, np.int32)
    return _with_granularity(node, dtype, scale, zero)


def _with_granularity(
    node: onnx_ir.Node,
    dtype: QuantType,
    scale: NDArray[np.float32],
    zero: NDArray[np.generic],
) -> QuantParams:
    axis, size = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    granularity: Granularity = PerAxis(axis)
    if size:
        granularity = PerBlock(axis, size)
    elif scale.size == 1:
        granularity, scale, zero = PerTensor(), scale.reshape(()), zero.reshape(())
    spec = QuantSpec(dtype, granularity)
    return QuantParams(spec, scale, zero.astype(np.int32))
