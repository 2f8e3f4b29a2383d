"""How one FakeQuant becomes the form whose integer kernel ONNX Runtime knows.

Values derived from `v` are called `v_q` (codes) and `v_dq` (dequantized, one per reader), so
that the audit finds a planned node's kernel by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.backends.ort_edits import input_array, input_of, insert, producer_of, replace
from octavo.backends.ort_packing import (
    codes_of,
    fake_behind,
    plain_shape,
    scale_of,
    stem,
    turned_codes,
)
from octavo.ir.fake_quant import constant, params_of
from octavo.ir.kernel_codes import kernel_params
from octavo.ir.packing import sizes_name
from octavo.ir.quant import PerAxis, PerBlock, broadcast_params

if TYPE_CHECKING:
    from octavo.ir.quant import QuantParams

MICROSOFT = "com.microsoft"


@final
@dataclass(frozen=True)
class Reader:
    """A node that reads a quantized value as input `index`, `turned` through a Transpose."""

    node: onnx_ir.Node
    index: int
    turned: bool = False


Readers = Sequence[Reader]


def quantize_activation(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> None:
    """`x → Q → DQ`, with a DQ of its own for every reader: a shared one keeps kernels float."""
    value, params = input_of(fake, 0), params_of(fake)
    numbers = _numbers(graph, value.name or "", params)
    quantized = insert(graph, fake, "QuantizeLinear", [value, *numbers], f"{value.name}_q").outputs[
        0
    ]
    uses = [Reader(use.node, use.idx) for use in fake.outputs[0].uses()]
    _fan_out(graph, uses, [quantized, *numbers], value.name or "", {})
    if fake.outputs[0].is_graph_output():
        replace(graph, fake, "DequantizeLinear", [quantized, *numbers], {})


def quantize_constant(graph: onnx_ir.Graph, fake: onnx_ir.Node, readers: Readers) -> None:
    """A constant as codes with a DQ for every reader; only Conv fuses without a zero point."""
    params, name = kernel_params(params_of(fake)), stem(fake)
    numbers = [scale_of(graph, fake, name, params.scale, params.spec)]
    if any(reader.node.op_type != "Conv" for reader in readers):
        numbers.append(_zero_point(graph, params, name))
    axis = params.spec.granularity.axis if isinstance(params.spec.granularity, PerAxis) else None
    for turned in (False, True):
        found = [reader for reader in readers if reader.turned == turned]
        if found:
            codes = turned_codes(graph, fake) if turned else codes_of(graph, fake)
            attributes = {} if axis is None else {"axis": 1 - axis if turned else axis}
            _fan_out(graph, found, [codes, *numbers], f"{name}{'_t' * turned}", attributes)


def store_constant(graph: onnx_ir.Graph, fake: onnx_ir.Node, readers: Readers) -> None:
    """`Cast(codes) · scale`, which the runtime folds when it loads; after the lookup for Gather."""
    scaled: onnx_ir.Value | None = None
    for reader in readers:
        if reader.node.op_type == "Gather" and reader.index == 0 and not _in_blocks(fake):
            _gather_codes(graph, reader.node, fake)
            continue
        scaled = scaled or _scaled(graph, fake)
        # What turns it folds as well.
        target = reader.node if not reader.turned else producer_of(reader.node, reader.index)
        target.replace_input_with(0 if reader.turned else reader.index, scaled)


def _in_blocks(fake: onnx_ir.Node) -> bool:
    granularity = params_of(fake).spec.granularity
    return isinstance(granularity, PerBlock)


def dynamic_matmul(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """`DynamicQuantizeMatMul`; readers of one value share its quantization instead."""
    dynamic = producer_of(node, 0)
    value = input_of(dynamic, 0)
    codes, scale = _columns(graph, node)
    tail, bias = linear_tail(node)
    shared = _dynamic_codes(value)
    if shared is None and len(dynamic.outputs[0].uses()) > 1:
        shared = _quantize_dynamically(graph, dynamic, value)
    if shared is None:
        inputs = [value, codes, scale, None, bias]
        replace(graph, tail, "DynamicQuantizeMatMul", inputs, domain=MICROSOFT, name=node.name)
    else:
        quantized, input_scale, zero = shared
        inputs = [quantized, codes, input_scale, scale, zero, None, bias]
        replace(graph, tail, "MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=node.name)


def static_matmul(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """`MatMulIntegerToFloat`, for a float output: as Q/DQ its bias would keep the node float."""
    quantized, scale, zero = (input_of(producer_of(node, 0), k) for k in range(3))
    codes, columns = _columns(graph, node)
    tail, bias = linear_tail(node)
    inputs = [quantized, codes, scale, columns, zero, None, bias]
    replace(graph, tail, "MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=node.name)


def portable_matmul(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """A product with a float output as MatMul and Sub: with a float bias it would stay float.

    The runtime makes a Gemm of MatMul and Add, but not of the negative bias.
    """
    tail, bias = linear_tail(node)
    inputs = list(node.inputs[:2])
    if node.op_type == "Gemm":
        inputs[1] = _dequantized_columns(graph, node)
    if bias is None:
        replace(graph, node, "MatMul", inputs, name=node.name)
        return
    assert bias.const_value is not None
    negative = constant(graph, f"{bias.name}_negative", -bias.const_value.numpy())
    product = insert(graph, node, "MatMul", inputs, f"{tail.outputs[0].name}_product")
    product.metadata_props.update(node.metadata_props)
    label, product.name = product.name, node.name
    name = label if tail is node else tail.name
    replace(graph, tail, "Sub", [product.outputs[0], negative], name=name)
    if tail is not node:
        graph.remove(node, safe=True)


def _dequantized_columns(graph: onnx_ir.Graph, node: onnx_ir.Node) -> onnx_ir.Value:
    """The weight of a Gemm as `[K, N]` behind a DequantizeLinear."""
    params = kernel_params(params_of(fake_behind(node.inputs[1])[0]))
    codes, scale = _columns(graph, node)
    name = codes.name or ""
    numbers = [codes, scale, _zero_point(graph, params, name)]
    axis = {"axis": 1} if params.scale.size > 1 else {}
    return insert(graph, node, "DequantizeLinear", numbers, f"{name}_dq", axis).outputs[0]


def linear_tail(node: onnx_ir.Node) -> tuple[onnx_ir.Node, onnx_ir.Value | None]:
    """The node that ends `x·W + b`, and `b` where it is a constant vector."""
    if node.op_type == "Gemm":
        return node, node.inputs[2] if len(node.inputs) > 2 else None
    uses = list(node.outputs[0].uses())
    add = uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None
    if add is None or add.op_type != "Add" or add.domain or add.graph is not node.graph:
        return node, None
    bias = add.inputs[1 - uses[0].idx]
    columns = input_of(node, 1).shape
    if bias is None or bias.const_value is None or columns is None:
        return node, None
    return (add, bias) if list(bias.const_value.shape) == [columns[-1]] else (node, None)


def _columns(graph: onnx_ir.Graph, node: onnx_ir.Node) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """Codes `[K, N]` and their scales; a transposed Gemm weight is turned here."""
    fake, turned = fake_behind(node.inputs[1])
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    if turned:
        codes = codes_of(graph, fake) if transposed else turned_codes(graph, fake)
    else:
        codes = codes_of(graph, fake, (1, 0) if transposed else None)
    params = kernel_params(params_of(fake))
    return codes, scale_of(graph, fake, stem(fake), params.scale, params.spec)


def dynamic_lstm(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """`DynamicQuantizeLSTM`: weights transposed to `[D, in, 4H]`, one scale per gate row."""
    dynamic = producer_of(node, 0)
    inputs: list[onnx_ir.Value | None] = [*node.inputs, *[None] * (8 - len(node.inputs))]
    inputs[0] = input_of(dynamic, 0)
    for index in (1, 2):
        fake = producer_of(node, index)
        params, name = params_of(fake), stem(fake)
        inputs[index] = codes_of(graph, fake, (0, 2, 1))
        directions, rows, _ = plain_shape(fake)
        spread, _ = broadcast_params(params, (directions, rows, 1))
        scale = np.broadcast_to(spread, (directions, rows, 1))[..., 0]
        zero = np.zeros(scale.shape, np.int8)
        inputs += [
            scale_of(graph, node, name, np.ascontiguousarray(scale), params.spec),
            constant(graph, f"zero_s8_{directions}x{rows}", zero),
        ]
    attributes = {
        name: node.attributes[name].value
        for name in ("direction", "hidden_size")
        if name in node.attributes
    }
    replace(graph, node, "DynamicQuantizeLSTM", inputs, attributes, MICROSOFT)


def _fan_out(
    graph: onnx_ir.Graph,
    readers: Readers,
    inputs: Sequence[onnx_ir.Value],
    name: str,
    attributes: dict[str, int],
) -> None:
    for count, reader in enumerate(readers):
        suffix = str(count) if count else ""
        node = insert(
            reader.node.graph or graph,
            reader.node,
            "DequantizeLinear",
            inputs,
            f"{name}_dq{suffix}",
            attributes,
        )
        reader.node.replace_input_with(reader.index, node.outputs[0])


def _numbers(graph: onnx_ir.Graph, name: str, params: QuantParams) -> list[onnx_ir.Value]:
    return [constant(graph, f"{name}_scale", params.scale), _zero_point(graph, params, name)]


def _zero_point(graph: onnx_ir.Graph, params: QuantParams, name: str) -> onnx_ir.Value:
    """A zero point; scalars and all-zero vectors are shared by all that have the same."""
    array = params.zero_point.astype(np.int8 if params.spec.signed else np.uint8)
    dtype = "s8" if params.spec.signed else "u8"
    if array.ndim == 0:
        return constant(graph, f"zero_{dtype}_{int(params.zero_point)}", array)
    shared = f"zero_{dtype}_x{array.size}"
    return constant(graph, f"{name}_zero_point" if array.any() else shared, array)


def _gather_codes(graph: onnx_ir.Graph, node: onnx_ir.Node, fake: onnx_ir.Node) -> None:
    out, params = node.outputs[0].name or "", params_of(fake)
    codes = codes_of(graph, fake)
    rows = insert(graph, node, "Gather", [codes, node.inputs[1]], f"{out}_rows")
    if params.spec.half:
        replace(graph, node, "Cast", [rows.outputs[0]], {"to": 1})
        return
    scale = scale_of(graph, fake, stem(fake), input_array(fake, 1), params.spec)
    if params.scale.size > 1:
        gathered = insert(graph, node, "Gather", [scale, node.inputs[1]], f"{out}_row_scales")
        scale = gathered.outputs[0]
    real = insert(graph, node, "Cast", [rows.outputs[0]], f"{out}_f32", {"to": 1})
    replace(graph, node, "Mul", [real.outputs[0], scale])


def _scaled(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> onnx_ir.Value:
    """The float weight; blocks are scaled with their axis split."""
    codes, name, spec = codes_of(graph, fake), stem(fake), params_of(fake).spec
    if spec.half:
        return insert(graph, fake, "Cast", [codes], f"{name}_f32", {"to": 1}).outputs[0]
    scale = scale_of(graph, fake, name, input_array(fake, 1), spec)
    real = insert(graph, fake, "Cast", [codes], f"{name}_f32", {"to": 1}).outputs[0]
    if fake.op_type != "FakeQuantBlocks":
        return insert(graph, fake, "Mul", [real, scale], f"{name}_dq").outputs[0]
    shape = plain_shape(fake)
    sizes = constant(graph, sizes_name(shape), np.array(shape, np.int64))
    split = insert(graph, fake, "Reshape", [real, input_of(fake, 3)], f"{name}_split")
    scaled = insert(graph, fake, "Mul", [split.outputs[0], scale], f"{name}_scaled")
    return insert(graph, fake, "Reshape", [scaled.outputs[0], sizes], f"{name}_dq").outputs[0]


def _dynamic_codes(value: onnx_ir.Value) -> Sequence[onnx_ir.Value] | None:
    readers = (use.node for use in value.uses())
    return next((n.outputs for n in readers if n.op_type == "DynamicQuantizeLinear"), None)


def _quantize_dynamically(
    graph: onnx_ir.Graph, dynamic: onnx_ir.Node, value: onnx_ir.Value
) -> Sequence[onnx_ir.Value]:
    name = f"{value.name}_q"
    outputs = [onnx_ir.Value(name=n) for n in (name, f"{name}_scale", f"{name}_zero_point")]
    node = onnx_ir.node("DynamicQuantizeLinear", [value], outputs=outputs, name=name)
    graph.insert_before(dynamic, node)
    return node.outputs
