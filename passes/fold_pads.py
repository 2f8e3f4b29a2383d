"""Pad with zeros as the padding of the convolutions and poolings that read it, where exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.passes.merge_activations import bounds_of
from octavo.passes.rewrite import constant, is_op, scalar

if TYPE_CHECKING:
    from octavo.passes.rewrite import Rewrite


def fold_pad(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """Pad that pads nothing goes; Pad of spatial zeros becomes `pads` of its reader."""
    pads = _pads(node)
    if pads is None:
        return False
    if not any(pads):
        return rewrite.drop(node) and rewrite.done("pad-folded", node, "pads nothing")
    readers = [reader for reader, _ in node.outputs[0].uses()]
    reasons = [_why_not(node, reader, pads) for reader in readers]
    if not readers or any(reasons):
        return rewrite.miss(node, next(filter(None, reasons), "nothing reads it"))
    for reader in readers:
        _widen(reader, pads)
    names = ", ".join(f"'{reader.name}'" for reader in readers)
    return rewrite.drop(node) and rewrite.done("pad-folded", node, f"pads of {names}")


def _widen(reader: onnx_ir.Node, pads: tuple[int, ...]) -> None:
    half = len(pads) // 2
    spatial = [*pads[2:half], *pads[half + 2 :]]
    own = reader.attributes.get_ints("pads", [0] * len(spatial))
    total = [a + b for a, b in zip(spatial, own, strict=True)]
    reader.attributes["pads"] = onnx_ir.AttrInt64s("pads", total)
    reader.attributes.pop("auto_pad", None)
    if is_op(reader, "AveragePool"):
        reader.attributes["count_include_pad"] = onnx_ir.AttrInt64("count_include_pad", 1)


def _pads(node: onnx_ir.Node) -> tuple[int, ...] | None:
    """`[begin…, end…]` for every axis of a constant Pad."""
    if len(node.inputs) < 2:
        given = node.attributes.get_ints("pads")
        return None if given is None else tuple(given)
    array = constant(node.inputs[1])
    if array is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
        return None
    return tuple(int(p) for p in array)


def _why_not(pad: onnx_ir.Node, reader: onnx_ir.Node, pads: tuple[int, ...]) -> str:
    half, name = len(pads) // 2, reader.name
    if pad.outputs[0].is_graph_output():
        return "its output is a graph output"
    if not is_op(reader, "Conv", "AveragePool", "MaxPool"):
        return f"'{name}' has no padding"
    if pad.attributes.get_string("mode", "constant") != "constant":
        return "it repeats the border"
    filler = scalar(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else 0.0
    if filler != 0.0 or pad.attributes.get_float("value", 0.0) != 0.0:
        return "it does not pad with a constant zero"
    if min(pads) < 0 or any((*pads[:2], *pads[half : half + 2])):
        return "it crops, or pads the batch or the channels"
    if reader.inputs[0] is not pad.outputs[0]:
        return f"'{name}' does not read it as its data"
    if reader.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return f"'{name}' computes its padding from the padded shape"
    return "" if is_op(reader, "Conv") else _why_not_pool(pad, reader, pads)


def _why_not_pool(pad: onnx_ir.Node, reader: onnx_ir.Node, pads: tuple[int, ...]) -> str:
    """Windows must stay in place, touch real entries, and see zeros where zeros were."""
    half, attributes = len(pads) // 2, reader.attributes
    kernel = attributes.get_ints("kernel_shape", ())
    own = attributes.get_ints("pads", [0] * 2 * len(kernel))
    if attributes.get_int("ceil_mode", 0) or any(
        d != 1 for d in attributes.get_ints("dilations", ())
    ):
        return f"'{reader.name}' rounds its shape up or is dilated"
    total = np.array([*pads[2:half], *pads[half + 2 :]]) + own
    if np.any(total >= np.array([*kernel, *kernel])):
        return f"the padding is as large as the window of '{reader.name}'"
    if is_op(reader, "AveragePool"):
        excluded = any(own) and not attributes.get_int("count_include_pad", 0)
        return f"'{reader.name}' does not count its own padding" if excluded else ""
    producer = pad.inputs[0].producer() if pad.inputs[0] is not None else None
    bounds = bounds_of(producer)[1] if producer is not None else None
    if bounds is None or bounds[0] < 0.0:
        return f"'{reader.name}' would see less than the zeros, its input may be negative"
    return "" if len(reader.outputs) == 1 else f"'{reader.name}' returns indices"
