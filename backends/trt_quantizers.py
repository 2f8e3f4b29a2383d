"""What TensorRT asks of QuantizeLinear and DequantizeLinear, node by node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.backends.trt_float4 import scale_behind
from octavo.backends.trt_target import BLOCKS, PARTS
from octavo.ir.conformance import Finding
from octavo.ir.constants import constant_behind
from octavo.ir.float4 import BLOCK as FLOAT4_BLOCK
from octavo.ir.mapped import reading

if TYPE_CHECKING:
    from octavo.backends.trt_target import Part

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
_FP8, _FP4, _INT4 = "FLOAT8E4M3FN", "FLOAT4E2M1", "INT4"
_TYPES = ("INT8", _INT4, _FP8, _FP4)
_WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1}
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten")
_CALIBRATE = "calibrate for symmetric signed codes, with zero point 0"


def quantizer_findings(graph: onnx_ir.Graph, part: Part) -> list[Finding]:
    """Findings on every Q and DQ of a graph, and on the operators that read them."""
    found: list[Finding] = []
    for node in graph:
        if node.op_type in (_Q, _DQ):
            found += _Quantizer(node).findings(part)
        elif node.op_type in _WEIGHTED:
            found += _weighted(node)
        elif node.op_type == "Concat":
            found += _concat(node)
        else:
            found += _codes_elsewhere(node)
    return found


@final
@dataclass(frozen=True)
class _Quantizer:
    node: onnx_ir.Node

    @property
    def name(self) -> str:
        return self.node.name or self.node.outputs[0].name or ""

    @property
    def data(self) -> onnx_ir.TensorProtocol | None:
        """The constant that is quantized or dequantized."""
        return constant_behind(self.node.inputs[0])

    @property
    def scale(self) -> onnx_ir.TensorProtocol | None:
        return scale_behind(self.node.inputs[1])

    @property
    def zero(self) -> onnx_ir.Value | None:
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    @property
    def codes(self) -> str:
        """The type of the codes, empty where nothing tells."""
        if self.zero is not None and (zero := constant_behind(self.zero)) is not None:
            return zero.dtype.name
        if self.node.op_type == _Q:
            number = self.node.attributes.get_int("output_dtype", 0)
            return onnx_ir.DataType(number).name if number else "UINT8"
        if self.data is not None:
            return self.data.dtype.name
        value = self.node.inputs[0]
        made = value.producer() if value is not None else None
        if made is not None and made.op_type == _Q:
            return _Quantizer(made).codes
        return value.dtype.name if value is not None and value.dtype is not None else ""

    @property
    def makes_scales(self) -> bool:
        """Whether other DQs read what it makes as their scales, and nobody else does."""
        uses = list(self.node.outputs[0].uses())
        return bool(uses) and all(u.node.op_type == _DQ and u.idx == 1 for u in uses)

    @property
    def block(self) -> int:
        return self.node.attributes.get_int("block_size", 0)

    def findings(self, part: Part) -> Iterator[Finding]:
        yield from self._types(part)
        yield from self._zero_point()
        yield from self._scale()
        yield from self._granularity()

    def _error(self, rule: str, reason: str, fix: str) -> Finding:
        return Finding(rule, self.name, reason, fix)

    def _types(self, part: Part) -> Iterator[Finding]:
        codes = self.codes
        if codes == "INT32":
            reason = "a DequantizeLinear of int32, as of a quantized bias, does not parse"
            yield self._error("bias", reason, "leave the bias float")
        elif codes == "UINT8":
            reason = "unsigned codes: the parser warns and takes them for signed ones"
            yield self._error("uint8", reason, _CALIBRATE)
        elif codes and codes not in _TYPES:
            fix = "use INT8, or INT4 for weights alone"
            yield self._error("type", f"codes of type {codes}", fix)
        elif (codes == _FP8 and not part.fp8) or (codes == _FP4 and not part.nvfp4):
            if self.makes_scales:  # whose codes are what a part has or has not
                return
            reason = f"{codes} does not run on {part.name}"
            yield self._error("part", reason, _other_part(codes))
        elif codes == _INT4 and (self.node.op_type == _Q or self.data is None):
            reason = "INT4 is a type of weights alone"
            yield self._error("int4-activation", reason, "quantize activations to INT8")
        if self.node.op_type == _DQ and self.data is None and codes in _TYPES:
            yield from self._computed_codes()

    def _computed_codes(self) -> Iterator[Finding]:
        """Codes that something else than a Q makes of constants."""
        value = self.node.inputs[0]
        made = value.producer() if value is not None else None
        if made is None or made.op_type == _Q or made.op_type in _MOVES:
            return
        inputs = [v for v in made.inputs if v is not None]
        if inputs and all(constant_behind(v) is not None for v in inputs):
            reason = f"{made.op_type} makes the codes: a quantized constant may only feed a DQ"
            yield self._error("unpacked", reason, "store the codes as an initializer of their type")

    def _zero_point(self) -> Iterator[Finding]:
        if self.zero is None:
            return
        tensor = constant_behind(self.zero)
        if tensor is None:
            reason = "the zero point is computed: it must be a constant"
            yield self._error("zero-point", reason, _CALIBRATE)
        elif np.any(reading(tensor, lambda array: array.astype(np.float32)) != 0):
            reason = "the zero point is not 0: TensorRT is symmetric"
            yield self._error("zero-point", reason, _CALIBRATE)

    def _scale(self) -> Iterator[Finding]:
        scale = self.scale
        if scale is None:
            reason = "the scale is computed: it must be a constant"
            yield self._error("scale", reason, "use scales from calibration")
        elif not np.all(reading(scale, lambda array: array.astype(np.float32)) > 0):
            reason = "a scale is not positive"
            yield self._error("scale", reason, "use positive scales, 1 where all codes are 0")

    def _granularity(self) -> Iterator[Finding]:
        scale = self.scale
        if scale is None or self.codes not in _TYPES:
            return
        several = scale.size > 1
        if self.node.op_type == _Q and several and self.data is None:
            reason = f"an activation with {scale.size} scales: only one is supported"
            yield self._error("activation-scales", reason, "quantize activations per tensor")
        if self.codes == _FP4 and self.block != FLOAT4_BLOCK:
            has = f"blocks of {self.block}" if self.block else "no blocks"
            reason = f"FLOAT4E2M1 with {has}: TensorRT documents blocks of {FLOAT4_BLOCK} (NVFP4)"
            fix = f"use block_size {FLOAT4_BLOCK} along K, with FLOAT8E4M3FN scales"
            yield self._error("blocks", reason, fix)
        if not self.block:
            return
        if self.codes == "INT8":
            reason = "blocks of INT8: only INT4, FP8 and FP4 have blocks"
            yield self._error("blocks", reason, "use one scale per output channel")
        elif self.codes == _INT4 and self.block not in BLOCKS:
            reason = f"blocks of {self.block}: TensorRT documents {BLOCKS[0]} and {BLOCKS[1]}"
            fix = f"use blocks of {BLOCKS[0]} or {BLOCKS[1]}"
            yield Finding("blocks", self.name, reason, fix, error=False)


def _other_part(codes: str) -> str:
    """What to do about a type that a part does not have."""
    has = [part.name for part in PARTS if (part.nvfp4 if codes == _FP4 else part.fp8)]
    here = "INT4 in blocks of 64 or 128, or INT8" if codes == _FP4 else "INT8"
    return f"use {here} here, or check for a part that has it: {', '.join(has)}"


def _dequantizer(value: onnx_ir.Value | None) -> _Quantizer | None:
    """The DQ that makes a value, through what moves it, or casts what float4 codes stand for."""
    made, cast = value.producer() if value is not None else None, False
    while made is not None and made.op_type in (*_MOVES, "Cast"):
        cast |= made.op_type == "Cast"
        source = made.inputs[0]
        made = source.producer() if source is not None else None
    found = _Quantizer(made) if made is not None and made.op_type == _DQ else None
    return None if found is None or (cast and found.codes != _FP4) else found


def _is_weight(quantizer: _Quantizer) -> bool:
    """Whether a DQ holds a constant, as codes or as floats in front of a Q."""
    if quantizer.data is not None:
        return True
    value = quantizer.node.inputs[0]
    made = value.producer() if value is not None else None
    return made is not None and made.op_type == _Q and _Quantizer(made).data is not None


def _weighted(node: onnx_ir.Node) -> Iterator[Finding]:
    """A weighted operator: formats of both inputs that go together, scales on the right axis."""
    name = node.name or ""
    inputs = list(node.inputs)
    activation = _dequantizer(inputs[0])
    weight = _dequantizer(inputs[_WEIGHTED[node.op_type]])
    if len(inputs) > 2 and (bias := _dequantizer(inputs[2])) is not None and bias.codes != "INT32":
        yield Finding("bias", name, "the bias is quantized", "leave the bias float")
    if weight is None or not _is_weight(weight):
        return
    if activation is not None and weight.codes == _FP4 != activation.codes:
        beside = f"{_FP4} weights beside {activation.codes} activations"
        reason = f"{beside}: the compiler of TensorRT for RTX crashes on them"
        yield Finding("formats", name, reason, "leave the activations float16")
    elif activation is not None and weight.codes == _INT4:
        reason = "INT4 weights beside INT8 activations: there is no such kernel"
        fix = "use INT8 weights, or leave the activations float16"
        yield Finding("w4a8", name, reason, fix)
    elif activation is not None and (activation.codes == _FP8) != (weight.codes == _FP8):
        reason = f"{weight.codes} weights beside {activation.codes} activations: it does not build"
        yield Finding("formats", name, reason, f"quantize both to {weight.codes}")
    yield from _weight_axis(node, weight)
    if activation is None and weight.codes == "INT8" and node.op_type.startswith("Conv"):
        reason = "the weight is quantized and the activation is not: it runs as float"
        yield Finding("half-quantized", name, reason, "quantize the input too", error=False)
    if activation is not None and (reader := _late_quantizer(node)) is not None:
        reason = f"Q before {reader}: they do not fuse with the operator"
        yield Finding("output", name, reason, f"quantize behind {reader}, or not", error=False)


def _weight_axis(node: onnx_ir.Node, weight: _Quantizer) -> Iterator[Finding]:
    scale, made = weight.scale, weight.node
    given = node.inputs[_WEIGHTED[node.op_type]]
    cast = given.producer() if given is not None else None
    if cast is not None and cast.op_type == "Cast":
        given = cast.inputs[0]
    turned = given is not made.outputs[0]
    if scale is None or scale.size == 1 or turned:
        return
    rank = len(made.outputs[0].shape or ()) or _rank(weight)
    channel = _channel_axis(node, rank)
    axis = made.attributes.get_int("axis", 1) % max(1, rank)
    if weight.block:
        if axis != (channel - 1) % 2 or rank != 2:
            reason = f"blocks along axis {axis}, not along the rows that are summed"
            yield Finding("blocks", weight.name, reason, "block weights along K")
    elif axis != channel:
        reason = f"scales along axis {axis}: output channels are axis {channel}"
        yield Finding("weight-axis", weight.name, reason, f"use one scale per index of {channel}")


def _rank(weight: _Quantizer) -> int:
    data = weight.data
    return len(data.shape) if data is not None else 0


def _channel_axis(node: onnx_ir.Node, rank: int) -> int:
    if node.op_type == "MatMul":
        return rank - 1
    if node.op_type == "Gemm":
        return 1 - node.attributes.get_int("transB", 0)
    return 1 if node.op_type == "ConvTranspose" else 0


def _late_quantizer(node: onnx_ir.Node) -> str | None:
    """The activation behind a Q that should stand before it."""
    users = [use.node for use in node.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != _Q:
        return None
    readers = [r.node for use in users[0].outputs[0].uses() for r in use.node.outputs[0].uses()]
    names = {reader.op_type for reader in readers}
    return next((op for op in ("Relu", "BatchNormalization", "Clip") if names == {op}), None)


def _concat(node: onnx_ir.Node) -> Iterator[Finding]:
    scales = set()
    for value in node.inputs:
        made = _dequantizer(value)
        if made is not None and made.scale is not None and made.scale.size == 1:
            scales.add(float(made.scale.numpy().reshape(())))
    if len(scales) > 1:
        reason = f"the operands have {len(scales)} different scales: each is requantized"
        fix = "give all operands of a Concat one scale"
        yield Finding("concat", node.name or "", reason, fix, error=False)


def _codes_elsewhere(node: onnx_ir.Node) -> Iterator[Finding]:
    """Low-bit constants that something else than a DQ reads."""
    if node.op_type in (*_MOVES, "Gather"):
        return
    for value in node.inputs:
        tensor = constant_behind(value)
        if tensor is not None and tensor.dtype.name in (_INT4, "UINT4", "INT2", "UINT2", _FP8):
            reason = f"{node.op_type} reads a {tensor.dtype.name} constant: only a DQ may"
            fix = "let a DequantizeLinear read the constant"
            yield Finding("unpacked", node.name or "", reason, fix)
