"""Weights of per-channel levels: indices of few bits that a GatherElements looks up at load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.backends.ort_edits import input_array, input_of, insert, replace
from octavo.backends.ort_packing import emit, halve_constant, short_name
from octavo.ir.fake_quant import constant
from octavo.ir.levels import binary_parts, sign_table, stored_levels
from octavo.ir.packing import pack, parts, sizes_name, steps
from octavo.ir.quant import QuantSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.quant import QuantType

_INT32 = 6
# Two levels of a channel are no more numbers than their alpha and offset.
_LEAST_BITS = 2


def store_levels(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """Packed indices and the table of levels, in float16 where that holds them exactly."""
    weight, levels = input_array(node, 0), input_array(node, 1)
    axis, bits = node.attributes.get_int("axis", 0), node.attributes.get_int("bits", 1)
    codes, table, along = stored_levels(weight, levels, axis, bits)
    dtype: QuantType = f"s{bits}"  # type: ignore[assignment]
    spec, name = QuantSpec(dtype), input_of(node, 0).name or ""
    name = name.removesuffix("_rounded")
    made = steps(codes.shape, spec)
    signed = emit(graph, node, pack(codes, spec), parts(spec), made, f"{name}_q")
    to = {"to": _INT32}
    indices = insert(graph, node, "Cast", [signed], short_name(graph), to).outputs[0]
    numbers = _binary_table(graph, node, name, levels, along)
    numbers = numbers or _table(graph, node, name, table)
    looked_up = insert(
        graph, node, "GatherElements", [numbers, indices], short_name(graph), {"axis": along}
    )
    sizes = constant(graph, sizes_name(weight.shape), np.array(weight.shape, np.int64))
    replace(graph, node, "Reshape", [looked_up.outputs[0], sizes])


def _binary_table(
    graph: onnx_ir.Graph, node: onnx_ir.Node, name: str, levels: NDArray[np.float32], along: int
) -> onnx_ir.Value | None:
    """The product of float16 alpha and offset with signs, where that is the table exactly."""
    halves = binary_parts(levels)
    bits = levels.shape[1].bit_length() - 1
    if halves is None or bits < _LEAST_BITS:
        return None
    both = np.concatenate([halves[0], halves[1][:, None]], axis=1)
    turned = along == 0
    signs = sign_table(bits)
    stored = constant(graph, f"{name}_alpha", np.ascontiguousarray(both.T if turned else both))
    signed = constant(
        graph, f"signs{bits}" + ("t" if turned else ""),
        np.ascontiguousarray(signs.T if turned else signs),
    )  # fmt: skip
    cast = insert(graph, node, "Cast", [stored], short_name(graph), {"to": 1}).outputs[0]
    operands = [signed, cast] if turned else [cast, signed]
    return insert(graph, node, "MatMul", operands, short_name(graph)).outputs[0]


def _table(
    graph: onnx_ir.Graph, node: onnx_ir.Node, name: str, table: NDArray[np.float32]
) -> onnx_ir.Value:
    value = constant(graph, f"{name}_table", table)
    return halve_constant(graph, value, node) or value
