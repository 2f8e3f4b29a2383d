"""Spatial data movement of codes, written for the channels-last layout integer kernels run in.

ONNX Runtime runs a quantized region channels-last, where its own Resize and DepthToSpace copy
byte by byte. Seen channels-last, nearest upsampling is a Concat of whole pixels, then of whole
rows, and DepthToSpace a Transpose of whole pixels. The layout Transposes around them meet those
of the neighbouring kernels and vanish.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.ir.fake_quant import constant
from octavo.ir.packing import sizes_name

if TYPE_CHECKING:
    from collections.abc import Sequence

_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
KERNELS = ("Transpose", "Reshape", "Concat")


def move_pixels(graph: onnx_ir.Graph, node: onnx_ir.Node) -> str | None:
    """Rewrite a quantized Resize or DepthToSpace; the value that holds its codes, or `None`."""
    codes, quantize = _codes_around(node)
    factor = _upsampling(node) if node.op_type == "Resize" else _block(node)
    channels = _channels(codes)
    if codes is None or quantize is None or factor is None or channels is None:
        return None
    build = _Builder(graph, quantize, quantize.outputs[0].name or "")
    pixels = build.add("Transpose", [codes], "last", perm=_TO_LAST)
    if node.op_type == "Resize":
        moved = _repeat(build, pixels, factor, channels)
    else:
        moved = _spread(build, pixels, factor, channels)
    result = build.add("Transpose", [moved], "first", perm=_TO_FIRST)
    name = quantize.outputs[0].name
    quantize.outputs[0].replace_all_uses_with(result)
    quantize.outputs[0].name, result.name = None, name
    return name


class _Builder:
    """Adds nodes before one node; their names start with the value they make."""

    def __init__(self, graph: onnx_ir.Graph, before: onnx_ir.Node, name: str) -> None:
        self._graph, self._before, self._name = graph, before, name

    def add(
        self,
        op_type: str,
        inputs: Sequence[onnx_ir.Value],
        label: str,
        **attributes: int | tuple[int, ...],
    ) -> onnx_ir.Value:
        node = onnx_ir.node(op_type, inputs, attributes, name=f"{self._name}_{label}")
        node.outputs[0].name = node.name
        self._graph.insert_before(self._before, node)
        return node.outputs[0]

    def sizes(self, *values: int) -> onnx_ir.Value:
        return constant(self._graph, sizes_name(values), np.array(values, np.int64))


def _repeat(build: _Builder, pixels: onnx_ir.Value, factor: int, channels: int) -> onnx_ir.Value:
    """`[N, H, W, C]` to `[N, fH, fW, C]`, every pixel `f` times in both directions."""
    wide = build.add("Concat", [pixels] * factor, "columns", axis=3)
    row = build.add("Reshape", [wide, build.sizes(0, 0, -1, channels)], "wide")
    flat = build.add("Reshape", [row, build.sizes(0, 0, 1, -1)], "flat")
    tall = build.add("Concat", [flat] * factor, "rows", axis=2)
    shape = build.add("Shape", [pixels], "shape")
    target = build.add("Mul", [shape, build.sizes(1, factor, factor, 1)], "target")
    return build.add("Reshape", [tall, target], "tall")


def _spread(build: _Builder, pixels: onnx_ir.Value, block: int, channels: int) -> onnx_ir.Value:
    """`[N, H, W, b·b·C]` to `[N, bH, bW, C]` (DCR order: block row, block column, channel)."""
    depth = channels // (block * block)
    split = build.add("Reshape", [pixels, build.sizes(0, 0, 0, block, block * depth)], "split")
    swapped = build.add("Transpose", [split], "swapped", perm=(0, 1, 3, 2, 4))
    shape = build.add("Shape", [pixels], "shape")
    grown = build.add("Mul", [shape, build.sizes(1, block, block, 1)], "grown")
    target = build.add("Div", [grown, build.sizes(1, 1, 1, block * block)], "target")
    return build.add("Reshape", [swapped, target], "spread")


def _codes_around(node: onnx_ir.Node) -> tuple[onnx_ir.Value | None, onnx_ir.Node | None]:
    """The codes a node reads through its DQ, and the Q behind it, alone with equal parameters."""
    made = node.inputs[0].producer() if node.inputs[0] is not None else None
    uses = list(node.outputs[0].uses())
    if made is None or made.op_type != "DequantizeLinear" or len(uses) != 1:
        return None, None
    quantize = uses[0].node
    same = quantize.op_type == "QuantizeLinear" and _numbers(quantize) == _numbers(made)
    return (made.inputs[0], quantize) if same else (None, None)


def _numbers(node: onnx_ir.Node) -> list[bytes]:
    tensors = [value.const_value for value in node.inputs[1:] if value is not None]
    return [tensor.tobytes() for tensor in tensors if tensor is not None]


def _channels(codes: onnx_ir.Value | None) -> int | None:
    """Channels of the value that was quantized to `codes`; the codes carry no shape."""
    made = codes.producer() if codes is not None else None
    shape = made.inputs[0].shape if made is not None and made.inputs[0] is not None else None
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        return None
    return shape[1]


def _upsampling(node: onnx_ir.Node) -> int | None:
    """The whole factor of a nearest upsampling of both image axes that repeats pixels."""
    given = [value is not None for value in (*node.inputs, None, None)]
    scales = node.inputs[2].const_value if given[2] and not given[3] and node.inputs[2] else None
    text = node.attributes.get_string
    floors = (
        text("coordinate_transformation_mode", "half_pixel") == "asymmetric"
        and text("nearest_mode", "round_prefer_floor") == "floor"
    )
    if scales is None or not floors or text("mode", "nearest") != "nearest":
        return None
    values = scales.numpy().tolist()
    whole = len(values) == 4 and values[:2] == [1, 1] and values[2] == values[3]
    return int(values[2]) if whole and values[2] == int(values[2]) and values[2] > 1 else None


def _block(node: onnx_ir.Node) -> int | None:
    order = node.attributes.get_string("mode", "DCR")
    return node.attributes["blocksize"].as_int() if order == "DCR" else None
