"""ONNX Runtime on CPU as data: every row is tested against the runtime."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from octavo.backends.conditions import (
    attribute,
    float_constant,
    float_inputs,
    gemm_conditions,
    group,
    rank,
)
from octavo.ir.target import Condition, KernelRow, Target

if TYPE_CHECKING:
    import onnx_ir

MICROSOFT = "com.microsoft"


def _leaves(value: onnx_ir.Value) -> bool:
    """Whether a value is a graph output, as it is or in another shape."""
    readers = (node for node in value.consumers() if node.op_type in _VIEWS)
    return value.is_graph_output() or any(_leaves(node.outputs[0]) for node in readers)


_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_INNER = Condition(
    "an output inside the graph: probabilities below 1/512 would leave it as 0",
    lambda node: not _leaves(node.outputs[0]),
)
_PLAIN_LSTM = Condition(
    "default activations, no peephole, no clip, forward or bidirectional, batch second",
    lambda node: (
        not {"activations", "clip", "input_forget"} & set(node.attributes)
        and node.attributes.get_int("layout", 0) == 0
        and (len(node.inputs) < 5 or node.inputs[4] is None)
        and (len(node.inputs) < 8 or node.inputs[7] is None)
    ),
)
_INTEGER_CONV = (f"{MICROSOFT}::QLinearConv", "QLinearConv")
_INTEGER_MATMUL = (
    "QLinearMatMul",
    f"{MICROSOFT}::MatMulIntegerToFloat",
    f"{MICROSOFT}::QGemm",
)
# Of 2-bit codes, those in blocks of 16 or 256 are multiplied as floats: exact, and slow.
_BLOCKS = (16, 32, 64, 128, 256)
_DYNAMIC_MATMUL = (f"{MICROSOFT}::DynamicQuantizeMatMul", f"{MICROSOFT}::MatMulIntegerToFloat")


def _conv(kind: str, speed: float, note: str = "") -> KernelRow:
    conditions = (float_constant(1), group(kind))
    return KernelRow(
        "Conv", "static", _INTEGER_CONV, weights=(1,), weight_axis=0, blocks=_BLOCKS, bias=2,
        conditions=conditions, speed=speed, note=note,
    )  # fmt: skip


def _elementwise(
    op_type: str,
    kernel: str,
    *conditions: Condition,
    fixed: tuple[float, float] | None = None,
) -> KernelRow:
    operands = {"Add": (0, 1), "Mul": (0, 1), "Concat": (), "Where": (1, 2)}.get(op_type, (0,))
    return KernelRow(
        op_type, "static", (f"{MICROSOFT}::{kernel}",), operands, variadic=not operands,
        fixed_range=fixed,
        conditions=(float_inputs(*operands), *conditions), speed=0.6,
    )  # fmt: skip


def _movement(op_type: str, *conditions: Condition, kernel: str = "") -> KernelRow:
    kernels = (op_type, kernel) if kernel else (op_type,)
    return KernelRow(
        op_type, "static", kernels, (0,), same_params=True,
        conditions=(float_inputs(0), *conditions), speed=0.3,
    )  # fmt: skip


def _gemm(transposed: int) -> KernelRow:
    return KernelRow(
        "Gemm", "static", _INTEGER_MATMUL, weights=(1,), weight_axis=1 - transposed,
        blocks=_BLOCKS, bias=2, output="either", conditions=gemm_conditions(transposed), speed=0.32,
    )  # fmt: skip


def _storage(
    op_type: str, weights: tuple[int, ...], axis: int, *conditions: Condition
) -> KernelRow:
    return KernelRow(
        op_type, "storage", (), (), weights=weights, weight_axis=axis, output="float",
        blocks=(0,) if op_type == "Gather" else (0, *_BLOCKS),
        conditions=(*map(float_constant, weights), *conditions),
        note="stored in 1 to 8 bits or as float16, unpacked when the model loads",
    )  # fmt: skip


_STATIC = (
    _conv("dense", 0.28),
    _conv("depthwise", 0.9, "faster or slower than float by shape: measure"),
    _conv("grouped", 1.95, "slower than float: pays only inside an integer region"),
    KernelRow(
        "MatMul", "static", _INTEGER_MATMUL, weights=(1,), weight_axis=1, blocks=_BLOCKS,
        output="either", conditions=(float_constant(1), rank(1, 2)), speed=0.32,
    ),
    KernelRow(
        "MatMul", "static", _INTEGER_MATMUL, (0, 1), output="either",
        conditions=(float_inputs(0, 1),), speed=0.45, note="both inputs are activations",
    ),
    _gemm(0),
    _gemm(1),
    _elementwise("Add", "QLinearAdd"),
    _elementwise("Mul", "QLinearMul"),
    _elementwise("Concat", "QLinearConcat"),
    _elementwise("Where", "QLinearWhere"),
    _elementwise("AveragePool", "QLinearAveragePool"),
    _elementwise("GlobalAveragePool", "QLinearGlobalAveragePool"),
    _elementwise("Softmax", "QLinearSoftmax", _INNER, fixed=(0.0, 1.0)),
    _elementwise("Sigmoid", "QLinearSigmoid", fixed=(0.0, 1.0)),
    _elementwise("LeakyRelu", "QLinearLeakyRelu"),
    _movement("MaxPool", rank(0, 4), kernel=f"{MICROSOFT}::NhwcMaxPool"),
    _movement("Reshape"),
    _movement("Transpose"),
    _movement("Squeeze"),
    _movement("Unsqueeze"),
    _movement("Flatten", kernel="Reshape"),
    _movement("Slice"),
    _movement("Expand"),
    _movement("Tile"),
    _movement("DepthToSpace"),
    _movement("Resize", attribute("mode", "nearest", "nearest")),
    _movement("Split"),
    _movement("Gather"),
    _movement("GatherElements"),
    _movement("ReduceMax"),
)  # fmt: skip

_DYNAMIC = (
    KernelRow(
        "MatMul", "dynamic", _DYNAMIC_MATMUL, weights=(1,), weight_axis=1, blocks=_BLOCKS,
        output="float", conditions=(float_constant(1), rank(1, 2)), speed=0.33,
    ),
    *(
        KernelRow(
            "Gemm", "dynamic", _DYNAMIC_MATMUL, (0,), weights=(1,), weight_axis=1 - transposed,
            blocks=_BLOCKS, bias=2, output="float", conditions=gemm_conditions(transposed),
            speed=0.33, note="as MatMul and Add",
        )
        for transposed in (0, 1)
    ),
    KernelRow(
        "LSTM", "dynamic", (f"{MICROSOFT}::DynamicQuantizeLSTM",), weights=(1, 2), weight_axis=1,
        blocks=(0,), output="float", speed=0.45,
        conditions=(float_constant(1), float_constant(2), _PLAIN_LSTM),
        note="its error is measured before it is chosen",
    ),
)  # fmt: skip

_TABLE = (float_constant(0), attribute("axis", 0, 0), rank(0, 2))
_WEIGHT_ONLY = (
    KernelRow(
        "Gather", "weight-only", (f"{MICROSOFT}::GatherBlockQuantized",), (), weights=(0,),
        blocks=_BLOCKS, output="float", conditions=_TABLE, speed=2.5,
        note="rows of blocks, dequantized when they are looked up",
    ),
    *(KernelRow(
        op_type, "weight-only", (f"{MICROSOFT}::MatMulNBits",), (), weights=(1,), weight_axis=axis,
        blocks=_BLOCKS, bias=bias, output="float", conditions=conditions, speed=0.9,
        note="fast for one row (decoding), slower than dynamic for many; the kernel's codes have "
        "2, 4 or 8 bits, others become the next of these when the model loads",
    )
    for op_type, axis, bias, conditions in (
        ("MatMul", 1, None, (float_constant(1), rank(1, 2))),
        ("Gemm", 1, 2, gemm_conditions(0)),
        ("Gemm", 0, 2, gemm_conditions(1)),
    )),
)  # fmt: skip

_STORAGE = (
    _storage("Conv", (1,), 0),
    _storage("ConvTranspose", (1,), 1, attribute("group", 1, 1)),
    _storage("ConvTranspose", (1,), 0),
    _storage("MatMul", (1,), -1),
    _storage("Gemm", (1,), 0, attribute("transB", 0, 1)),
    _storage("Gemm", (1,), 1, attribute("transB", 0, 0)),
    _storage("Gather", (0,), 0, *_TABLE[1:]),
    *(_storage(op_type, (1, 2), 1) for op_type in ("LSTM", "GRU", "RNN")),
)

_FLOAT_ONLY = "onnxruntime has no integer kernel for it: a quantizer around it only adds work"
_NEVER = tuple(
    (op_type, _FLOAT_ONLY)
    for op_type in (
        "ConvTranspose", "GRU", "RNN", "Sub", "Div", "ReduceMean", "Pad", "HardSwish",
        "HardSigmoid", "Tanh", "Elu", "Gelu", "Erf", "Exp", "Sqrt", "Pow", "Max", "Min", "TopK",
        "LogSoftmax", "Einsum", "LayerNormalization", "RMSNormalization", "Relu", "Clip",
        "InstanceNormalization", "BatchNormalization", "Attention", "PRelu",
    )
)  # fmt: skip

ORT_CPU = Target(
    name="ort-cpu",
    runtime="onnxruntime CPUExecutionProvider",
    rows=(*_STATIC, *_DYNAMIC, *_WEIGHT_ONLY, *_STORAGE),
    fused_activations=("Relu", "Clip"),
    activation_dtype="u8",
    weight_bits=8,
    opset=21,
    ir_version=10,
    never=_NEVER,
)

# Without VNNI the u8·s8 kernel adds pairs of products in saturating 16 bits: 7-bit weights cannot.
ORT_CPU_AVX2 = replace(ORT_CPU, name="ort-cpu-avx2", weight_bits=7)

TARGETS = {target.name: target for target in (ORT_CPU, ORT_CPU_AVX2)}
