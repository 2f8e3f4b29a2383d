"""How one FakeQuant becomes the form whose integer kernel ONNX Runtime knows.

Values derived from `v` are called `v_q` (codes) and `v_dq` (dequantized, one per reader), so
that the audit finds a planned node's kernel by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.backends.ort_edits import input_array, input_of, insert, producer_of, replace
from octavo.backends.ort_packing import codes_of, plain_codes, plain_shape, stem
from octavo.ir.fake_quant import constant, params_of
from octavo.ir.packing import pack_blocks, sizes_name
from octavo.ir.quant import PerAxis, PerBlock, QuantParams, broadcast_params

if TYPE_CHECKING:
    from collections.abc import Sequence

MICROSOFT = "com.microsoft"


def quantize_activation(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> None:
    """`x → Q → DQ`, with a DQ of its own for every reader: a shared one keeps kernels float."""
    value, params = input_of(fake, 0), params_of(fake)
    numbers = _numbers(graph, value.name or "", params)
    quantized = insert(graph, fake, "QuantizeLinear", [value, *numbers], f"{value.name}_q").outputs[
        0
    ]
    _fan_out(graph, fake, [quantized, *numbers], value.name or "", {})


def quantize_constant(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> None:
    """A constant as codes with a DQ for every reader; only Conv fuses without a zero point."""
    params, name = params_of(fake), stem(fake)
    codes = codes_of(graph, fake)
    numbers = [constant(graph, f"{name}_scale", params.scale)]
    if any(use.node.op_type != "Conv" for use in fake.outputs[0].uses()):
        numbers.append(_zero_point(graph, params, name))
    axis = params.spec.granularity.axis if isinstance(params.spec.granularity, PerAxis) else None
    attributes = {} if axis is None else {"axis": axis}
    _fan_out(graph, fake, [codes, *numbers], name, attributes)


def store_constant(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> None:
    """`Cast(codes) · scale`, which the runtime folds when it loads; after the lookup for Gather."""
    codes, name = codes_of(graph, fake), stem(fake)
    scale = constant(graph, f"{name}_scale", input_array(fake, 1))
    scaled: onnx_ir.Value | None = None
    for use in list(fake.outputs[0].uses()):
        if use.node.op_type == "Gather" and use.idx == 0:
            _gather_codes(graph, use.node, codes, scale)
        else:
            scaled = scaled or _scaled(graph, fake, codes, scale, name)
            use.node.replace_input_with(use.idx, scaled)


def dynamic_matmul(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """`DynamicQuantizeMatMul`; readers of one value share its quantization instead."""
    dynamic, fake = producer_of(node, 0), producer_of(node, 1)
    value = input_of(dynamic, 0)
    codes, scale = _columns(graph, node, fake)
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
    codes, columns = _columns(graph, node, producer_of(node, 1))
    tail, bias = linear_tail(node)
    inputs = [quantized, codes, scale, columns, zero, None, bias]
    replace(graph, tail, "MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=node.name)


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


def _columns(
    graph: onnx_ir.Graph, node: onnx_ir.Node, fake: onnx_ir.Node
) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """Codes `[K, N]` and their scales; a transposed Gemm weight is turned here."""
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    codes = codes_of(graph, fake, (1, 0) if transposed else None)
    return codes, constant(graph, f"{stem(fake)}_scale", params_of(fake).scale)


def blocked_matmul(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """`MatMulNBits`: the weight as `[N, K/block]` blocks of 8-, 4- or 2-bit codes."""
    fake = producer_of(node, 1)
    params, name = params_of(fake), stem(fake)
    granularity = params.spec.granularity
    assert isinstance(granularity, PerBlock)
    size, bits = granularity.size, params.spec.bits
    codes, scales = plain_codes(fake, params).astype(np.int8, copy=False), params.scale
    if granularity.axis == 0:
        codes, scales = codes.T, scales.T
    columns, rows = codes.shape
    packed = constant(graph, f"{name}_q", pack_blocks(codes, bits, size))
    scale = constant(graph, f"{name}_scale", np.ascontiguousarray(scales).reshape(-1))
    attributes = {"K": rows, "N": columns, "bits": bits, "block_size": size, "accuracy_level": 4}
    tail, bias = linear_tail(node)
    inputs = [node.inputs[0], packed, scale]
    if bias is not None:
        inputs += [None, None, _vector(graph, bias)]
    replace(graph, tail, "MatMulNBits", inputs, attributes, MICROSOFT, node.name)


def _vector(graph: onnx_ir.Graph, bias: onnx_ir.Value) -> onnx_ir.Value:
    """A constant bias as a vector; Gemm also takes one of shape `[1, N]`."""
    assert bias.const_value is not None
    if len(bias.const_value.shape) == 1:
        return bias
    return constant(graph, f"{bias.name}_vector", bias.const_value.numpy().reshape(-1))


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
            constant(graph, f"{name}_scale", np.ascontiguousarray(scale)),
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
    fake: onnx_ir.Node,
    inputs: Sequence[onnx_ir.Value],
    name: str,
    attributes: dict[str, int],
) -> None:
    output = fake.outputs[0]
    for count, use in enumerate(list(output.uses())):
        suffix = str(count) if count else ""
        node = insert(
            use.node.graph or graph,
            use.node,
            "DequantizeLinear",
            inputs,
            f"{name}_dq{suffix}",
            attributes,
        )
        use.node.replace_input_with(use.idx, node.outputs[0])
    if output.is_graph_output():
        replace(graph, fake, "DequantizeLinear", list(inputs), attributes)


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


def _gather_codes(
    graph: onnx_ir.Graph, node: onnx_ir.Node, codes: onnx_ir.Value, scale: onnx_ir.Value
) -> None:
    out = node.outputs[0].name or ""
    rows = insert(graph, node, "Gather", [codes, node.inputs[1]], f"{out}_rows")
    if scale.const_value is not None and scale.const_value.size > 1:
        gathered = insert(graph, node, "Gather", [scale, node.inputs[1]], f"{out}_row_scales")
        scale = gathered.outputs[0]
    real = insert(graph, node, "Cast", [rows.outputs[0]], f"{out}_f32", {"to": 1})
    replace(graph, node, "Mul", [real.outputs[0], scale])


def _scaled(
    graph: onnx_ir.Graph,
    fake: onnx_ir.Node,
    codes: onnx_ir.Value,
    scale: onnx_ir.Value,
    name: str,
) -> onnx_ir.Value:
    """The float weight; blocks are scaled with their axis split."""
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
