"""TensorRT on NVIDIA parts as data: what runs in int8, and what each part has besides.

One target per compute capability, `tensorrt-sm86` for 8.6; `tensorrt` is what all of them run.
Sources: NvInfer.h of TensorRT 11 for types and shapes, the build of TensorRT for RTX for what
parses and compiles. The speeds are nominal: nothing was measured on these parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.backends.conditions import (
    RESIDUAL,
    attribute,
    float_constant,
    gemm_conditions,
    group,
    rank,
)
from octavo.ir.float4 import BLOCK as FLOAT4_BLOCK
from octavo.ir.target import Condition, KernelRow, Target

if TYPE_CHECKING:
    import onnx_ir

# Tensor cores multiply float8 numbers 16 channels at a time, under filters of this many entries.
_FLOAT8_CHANNELS, _FLOAT8_FILTER = 16, 32
# TensorRT documents 64 and 128 for weights of 4 bits.
BLOCKS = (64, 128)
NEWEST_OPSET, NEWEST_IR_VERSION = 25, 13


@final
@dataclass(frozen=True)
class Part:
    """One compute capability: nominal dense float16 rate and memory rate, and what it has.

    Every part has int8 kernels and weights of 4 bits; `sparse` is 2:4 in its tensor cores.
    """

    capability: tuple[int, int]
    macs_per_second: float
    bytes_per_second: float
    fp8: bool = False
    nvfp4: bool = False
    sparse: bool = True

    @property
    def name(self) -> str:
        """`sm86` for 8.6."""
        return "sm{}{}".format(*self.capability)

    @property
    def features(self) -> tuple[str, ...]:
        """The number formats, in words."""
        optional = {"fp8": self.fp8, "nvfp4": self.nvfp4, "2:4 sparsity": self.sparse}
        return ("int8", "int4 weights", *(name for name, has in optional.items() if has))


PARTS = (
    Part((8, 0), 156e12, 1.5e12),
    Part((8, 6), 62e12, 0.6e12),
    Part((8, 9), 120e12, 0.9e12, fp8=True),
    Part((9, 0), 490e12, 3.3e12, fp8=True),
    Part((12, 0), 200e12, 1.8e12, fp8=True, nvfp4=True),
)


def _divisible(block: int) -> Condition:
    text = f"rows of the weight that are whole blocks of {block}"
    return Condition(text, lambda node: _rows(node) % block == 0)


def _rows(node: onnx_ir.Node) -> int:
    weight = node.inputs[1]
    rows = weight.shape[node.attributes.get_int("transB", 0)] if weight and weight.shape else 1
    return rows if isinstance(rows, int) else 1


def _fits_tensor_cores(node: onnx_ir.Node) -> bool:
    weight = node.inputs[1]
    outputs, inputs, *filter_ = weight.shape.numpy() if weight and weight.shape else (1, 1)
    whole = outputs % _FLOAT8_CHANNELS == inputs % _FLOAT8_CHANNELS == 0
    return whole and math.prod(filter_) < _FLOAT8_FILTER


_TENSOR_CORES = Condition(
    f"channels in multiples of {_FLOAT8_CHANNELS}, a filter of fewer than {_FLOAT8_FILTER} entries",
    _fits_tensor_cores,
)


def _conv(kind: str, speed: float) -> KernelRow:
    return KernelRow(
        "Conv", "static", ("Conv",), weights=(1,), bits=(8,), bias=2, output="either",
        conditions=(float_constant(1), group(kind)), speed=speed,
    )  # fmt: skip


def _matrix(op_type: str, axis: int, bias: int | None, *conditions: Condition) -> KernelRow:
    return KernelRow(
        op_type, "static", (op_type,), weights=(1,), weight_axis=axis, bits=(8,), bias=bias,
        output="either", conditions=conditions, speed=0.55,
    )  # fmt: skip


def _float8(op_type: str, axis: int, bias: int | None, *conditions: Condition) -> KernelRow:
    return KernelRow(
        op_type, "float8", (op_type,), weights=(1,), weight_axis=axis, bits=(8,), bias=bias,
        output="float", conditions=conditions, speed=0.55,
        note="operand and weight are float8 numbers, sums and output float16",
    )  # fmt: skip


def _blocks(op_type: str, axis: int, bias: int | None, *conditions: Condition) -> KernelRow:
    return KernelRow(
        op_type, "weight-only", (op_type,), (), weights=(1,), weight_axis=axis, bits=(4,),
        blocks=BLOCKS, bias=bias, output="float",
        conditions=(*conditions, _divisible(BLOCKS[0])), speed=0.6,
        note="float16 compute; faster where reading the weights takes longest, as in decoding",
    )  # fmt: skip


def _float4(op_type: str, axis: int, bias: int | None, *conditions: Condition) -> KernelRow:
    return KernelRow(
        op_type, "float4", (op_type,), (), weights=(1,), weight_axis=axis, bits=(4,),
        blocks=(FLOAT4_BLOCK,), bias=bias, output="float",
        conditions=(*conditions, _divisible(FLOAT4_BLOCK)), speed=0.6,
        note="NVFP4: float4 numbers in blocks of 16 with float8 scales; float16 compute",
    )  # fmt: skip


_MATMUL = (float_constant(1), rank(1, 2))
_ROWS = (
    _conv("dense", 0.5),
    _conv("depthwise", 0.8),
    _conv("grouped", 0.8),
    KernelRow(
        "ConvTranspose", "static", ("ConvTranspose",), weights=(1,), weight_axis=1, bits=(8,),
        bias=2, output="either", conditions=(float_constant(1), attribute("group", 1, 1)),
        speed=0.6,
    ),
    _matrix("MatMul", 1, None, *_MATMUL),
    _matrix("Gemm", 1, 2, *gemm_conditions(0)),
    _matrix("Gemm", 0, 2, *gemm_conditions(1)),
    KernelRow(
        "Add", "static", ("Add",), (0, 1), output="either", conditions=(RESIDUAL,), speed=0.5,
        note="joins the convolution that makes one operand; the other is quantized",
    ),
    KernelRow(
        "Concat", "static", ("Concat",), (), variadic=True, output="either", same_params=True,
        conditions=(rank(0, 4),), speed=0.5, note="all operands share one scale",
    ),
    _blocks("MatMul", 1, None, *_MATMUL),
    _blocks("Gemm", 1, 2, *gemm_conditions(0)),
    _blocks("Gemm", 0, 2, *gemm_conditions(1)),
)  # fmt: skip
_FLOAT8_ROWS = (
    _float8("Conv", 0, 2, float_constant(1), group("dense"), _TENSOR_CORES),
    _float8("MatMul", 1, None, *_MATMUL),
    _float8("Gemm", 1, 2, *gemm_conditions(0)),
    _float8("Gemm", 0, 2, *gemm_conditions(1)),
)
_FLOAT4_ROWS = (
    _float4("MatMul", 1, None, *_MATMUL),
    _float4("Gemm", 1, 2, *gemm_conditions(0)),
    _float4("Gemm", 0, 2, *gemm_conditions(1)),
)

_MOVES = "it runs in the type of its input: quantizers move through it"
_FLOAT = "it runs in float16 or float32; Q and DQ around it would only add work"
_NEVER = (
    *((op_type, _MOVES) for op_type in (
        "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Expand",
        "Tile", "DepthToSpace", "SpaceToDepth", "Split", "Gather", "Relu", "Clip",
    )),
    *((op_type, _FLOAT) for op_type in (
        "LSTM", "GRU", "RNN", "Sub", "Div", "Mul", "ReduceMean", "GlobalAveragePool", "HardSwish",
        "AveragePool", "Softmax", "Sigmoid", "Tanh", "Gelu", "Erf", "LayerNormalization",
        "RMSNormalization", "InstanceNormalization", "Attention", "PRelu", "Resize", "Pad",
    )),
)  # fmt: skip


def _target(name: str, part: Part, features: tuple[str, ...], runtime: str) -> Target:
    return Target(
        name=name,
        runtime=runtime,
        rows=(
            *_ROWS,
            *(_FLOAT8_ROWS if part.fp8 else ()),
            *(_FLOAT4_ROWS if part.nvfp4 else ()),
        ),
        fused_activations=("Relu", "Clip"),
        activation_dtype="s8",
        weight_bits=8,
        opset=21,
        ir_version=10,
        never=_NEVER,
        half_scales=True,
        half_constants=True,
        zero_points=False,
        fused_sums=("Conv",),
        fused_quantizers=True,
        features=features,
        macs_per_second=part.macs_per_second,
        bytes_per_second=part.bytes_per_second,
    )


_RUNTIME = "TensorRT 11"
PART_OF = {"tensorrt": PARTS[0], **{f"tensorrt-{part.name}": part for part in PARTS}}
TARGETS = {
    "tensorrt": _target("tensorrt", PARTS[0], PARTS[0].features, f"{_RUNTIME}, any part"),
    **{
        name: _target(
            name, part, part.features,
            f"{_RUNTIME}, compute capability {'.'.join(map(str, part.capability))}",
        )
        for name, part in PART_OF.items()
        if name != "tensorrt"
    },
}  # fmt: skip
