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
_TYPES: dict[str, QuantType] = {
    ("INT" if name[0] == "s" else "UINT") + name[1:]: name for name in get_args(QuantType)
}


def is_quantized(node: onnx_ir.Node) -> bool:
    """Whether a node belongs to a model that somebody quantized."""
    return node.op_type in ("QuantizeLinear", "DequantizeLinear") or (
        node.domain in ("", "ai.onnx", "com.microsoft") and node.op_type in _INTEGER_OPS
    )


def quantized_values(node: onnx_ir.Node) -> dict[str, QuantParams]:
    """The parameters of the float value that a Q reads or a DQ computes."""
    if is_op(node, "QuantizeLinear", "DequantizeLinear") or node.domain == "com.microsoft":
        value = node.inputs[0] if node.op_type == "QuantizeLinear" else node.outputs[0]
        codes = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
        params = _params(node, codes)
        if value is not None and params is not None:
            return {value.name or "": params}
    return {}


def _params(node: onnx_ir.Node, codes: onnx_ir.Value | None) -> QuantParams | None:
    """Parameters of a Q or DQ; `None` where computed or of a type octavo has no name for."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or codes is None:
        return None
    found = constant(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    zero = constant(given)
    dtype = _TYPES.get(codes.dtype.name) if codes.dtype is not None else None
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
