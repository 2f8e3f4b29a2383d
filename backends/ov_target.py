"""OpenVINO on the CPU as data: layers that run in u8 or i8, as its runtime model names them."""

from __future__ import annotations

from octavo.backends.conditions import (
    RESIDUAL,
    attribute,
    float_constant,
    float_inputs,
    gemm_conditions,
    group,
    rank,
)
from octavo.ir.target import Condition, KernelRow, Target

# One layer that computes several nodes: an attention between its projections, a sum and its Relu.
SUBGRAPH = "Subgraph"
BLOCKS = (32, 64, 128)
_MATRIX = ("FullyConnected", "MatMul", "Convolution")


def _conv(kind: str, speed: float) -> KernelRow:
    return KernelRow(
        "Conv", "static", ("Convolution",), weights=(1,), bits=(8,), bias=2, output="either",
        conditions=(float_constant(1), group(kind)), speed=speed,
    )  # fmt: skip


def _matrix(op_type: str, axis: int, bias: int | None, *conditions: Condition) -> KernelRow:
    return KernelRow(
        op_type, "static", _MATRIX, weights=(1,), weight_axis=axis, bits=(8,), bias=bias,
        output="either", conditions=conditions, speed=0.35,
    )  # fmt: skip


def _blocks(op_type: str, axis: int, bias: int | None, *conditions: Condition) -> KernelRow:
    return KernelRow(
        op_type, "weight-only", ("FullyConnected",), (), weights=(1,), weight_axis=axis,
        bits=(4, 8), blocks=BLOCKS, bias=bias, output="float", conditions=conditions, speed=0.7,
        note="computes in float32; fast where reading the weights takes longest",
    )  # fmt: skip


def _movement(op_type: str, *conditions: Condition) -> KernelRow:
    return KernelRow(
        op_type, "static", (), (0,), same_params=True, output="either",
        conditions=(float_inputs(0), *conditions), speed=0.3,
        note="codes or floats: quantizers move through it",
    )  # fmt: skip


def _storage(
    op_type: str, weights: tuple[int, ...], axis: int, *conditions: Condition
) -> KernelRow:
    # Of wider codes the unpacking operators give other numbers in OpenVINO.
    return KernelRow(
        op_type, "storage", (), (), weights=weights, weight_axis=axis, bits=(4, 8),
        blocks=(0,), output="float",
        conditions=(*map(float_constant, weights), *conditions),
        note="stored in 4 or 8 bits or as float16, unpacked when the model loads",
    )  # fmt: skip


_MATMUL = (float_constant(1), rank(1, 2))
_TABLE = (attribute("axis", 0, 0), rank(0, 2))
_ROWS = (
    _conv("dense", 0.35),
    _conv("depthwise", 1.1),
    _conv("grouped", 0.45),
    KernelRow(
        "ConvTranspose", "static", ("Deconvolution",), weights=(1,), weight_axis=1, bits=(8,),
        bias=2, output="either", conditions=(float_constant(1), attribute("group", 1, 1)),
        speed=0.5,
    ),
    _matrix("MatMul", 1, None, *_MATMUL),
    _matrix("Gemm", 1, 2, *gemm_conditions(0)),
    _matrix("Gemm", 0, 2, *gemm_conditions(1)),
    KernelRow(
        "MatMul", "static", ("MatMul", SUBGRAPH), (0, 1), output="either",
        conditions=(float_inputs(0, 1),), speed=0.6,
        note="both inputs are activations; the products of an attention are one layer",
    ),
    KernelRow(
        "Add", "static", ("Eltwise", SUBGRAPH, *_MATRIX), (0, 1), output="either",
        conditions=(float_inputs(0, 1), RESIDUAL), speed=0.6,
        note="joins the convolution that makes one operand",
    ),
    KernelRow(
        "GlobalAveragePool", "static", ("Reduce", "Pooling"), output="either",
        conditions=(float_inputs(0),), speed=0.6,
    ),
    KernelRow(
        "AveragePool", "static", ("Pooling",), output="either", conditions=(float_inputs(0),),
        speed=0.6,
    ),
    KernelRow(
        "Concat", "static", (), (), variadic=True, output="either", same_params=True,
        conditions=(rank(0, 4),), speed=0.5, note="all operands share one scale",
    ),
    _movement("MaxPool", rank(0, 4)),
    *(_movement(op_type) for op_type in (
        "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split",
    )),
    _blocks("MatMul", 1, None, *_MATMUL),
    _blocks("Gemm", 1, 2, *gemm_conditions(0)),
    _blocks("Gemm", 0, 2, *gemm_conditions(1)),
    _storage("Conv", (1,), 0),
    _storage("ConvTranspose", (1,), 1, attribute("group", 1, 1)),
    _storage("MatMul", (1,), -1),
    _storage("Gemm", (1,), 0, attribute("transB", 0, 1)),
    _storage("Gemm", (1,), 1, attribute("transB", 0, 0)),
    _storage("Gather", (0,), 0, *_TABLE),
    *(_storage(op_type, (1, 2), 1) for op_type in ("LSTM", "GRU", "RNN")),
)  # fmt: skip

_FLOAT = "OpenVINO computes it in float32: a quantizer around it only adds work"
_NEVER = tuple(
    (op_type, _FLOAT)
    for op_type in (
        "LSTM", "GRU", "RNN", "Sub", "Div", "Mul", "ReduceMean", "HardSwish", "HardSigmoid",
        "Sigmoid", "Softmax", "Tanh", "Gelu", "Erf", "Exp", "Sqrt", "Pow", "LayerNormalization",
        "InstanceNormalization", "Attention", "PRelu", "LeakyRelu", "Resize", "Pad", "Relu", "Clip",
    )
)  # fmt: skip

OPENVINO = Target(
    name="openvino",
    runtime="OpenVINO CPU",
    rows=_ROWS,
    fused_activations=("Relu", "Clip"),
    activation_dtype="s8",
    unsigned_where_positive=True,
    weight_bits=8,
    opset=21,
    ir_version=10,
    never=_NEVER,
    zero_points=False,
    fused_sums=("Conv",),
    fused_quantizers=True,
)

TARGETS = {OPENVINO.name: OPENVINO}
