"""Weights of per-channel levels: indices of few bits that a GatherElements looks up at load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.backends.ort_edits import input_array, input_of, insert, replace
from octavo.backends.ort_packing import emit, halve_constant
from octavo.ir.fake_quant import constant
from octavo.ir.levels import stored_levels
from octavo.ir.packing import pack, parts, sizes_name, steps
from octavo.ir.quant import QuantSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.quant import QuantType

_INT32 = 6


def store_levels(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """Packed indices and the table of levels, in float16 where that holds them exactly."""
    weight, levels = input_array(node, 0), input_array(node, 1)
    axis, bits = node.attributes.get_int("axis", 0), node.attributes.get_int("bits", 1)
    codes, table, along = stored_levels(weight, levels, axis, bits)
    dtype: QuantType = f"s{bits}"  # type: ignore[assignment]
    spec, name = QuantSpec(dtype), input_of(node, 0).name or ""
    made = steps(codes.shape, spec)
    signed = emit(graph, node, pack(codes, spec), parts(spec), made, f"{name}_q")
    indices = insert(graph, node, "Cast", [signed], f"{name}_indices", {"to": _INT32}).outputs[0]
    numbers = _table(graph, node, name, table)
    looked_up = insert(
        graph, node, "GatherElements", [numbers, indices], f"{name}_found", {"axis": along}
    )
    sizes = constant(graph, sizes_name(weight.shape), np.array(weight.shape, np.int64))
    replace(graph, node, "Reshape", [looked_up.outputs[0], sizes])


def _table(
    graph: onnx_ir.Graph, node: onnx_ir.Node, name: str, table: NDArray[np.float32]
) -> onnx_ir.Value:
    value = constant(graph, f"{name}_table", table)
    return halve_constant(graph, value, node) or value
