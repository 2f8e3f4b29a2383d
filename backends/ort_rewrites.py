"""How one FakeQuant becomes the form whose integer kernel ONNX Runtime knows.

Values derived from `v` are called `v_q` (codes) and `v_dq` (dequantized, one per reader), so
that the audit finds a planned node's kernel by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.ir.fake_quant import constant, params_of
from octavo.ir.quant import PerAxis, PerBlock, QuantParams, quantize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MICROSOFT = "com.microsoft"


def quantize_activation(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> None:
    """`x → Q → DQ`, with a DQ of its own for every reader: a shared one keeps kernels float."""
    value, params = _input(fake, 0), params_of(fake)
    numbers = _numbers(graph, value.name or "", params)
    quantized = _insert(
        graph, fake, "QuantizeLinear", [value, *numbers], f"{value.name}_q"
    ).outputs[0]
    _fan_out(graph, fake, [quantized, *numbers], value.name or "", {})


def quantize_constant(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> None:
    """A constant as codes with a DQ for every reader; only Conv fuses without a zero point."""
    value, params = _input(fake, 0), params_of(fake)
    codes = _codes(graph, value, params)
    name = value.name or ""
    numbers = [constant(graph, f"{name}_scale", params.scale)]
    if any(use.node.op_type != "Conv" for use in fake.outputs[0].uses()):
        numbers.append(_zero_point(graph, params, name))
    axis = params.spec.granularity.axis if isinstance(params.spec.granularity, PerAxis) else None
    attributes = {} if axis is None else {"axis": axis}
    _fan_out(graph, fake, [codes, *numbers], name, attributes)


def store_constant(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> None:
    """`Cast(codes) · scale`, which the runtime folds when it loads; after the lookup for Gather."""
    value, params = _input(fake, 0), params_of(fake)
    codes = _codes(graph, value, params)
    scale = constant(graph, f"{value.name}_scale", _input_array(fake, 1))
    for use in list(fake.outputs[0].uses()):
        if use.node.op_type == "Gather" and use.idx == 0:
            _gather_codes(graph, use.node, codes, scale)
        else:
            unpacked = _unpack(graph, use.node, codes, scale, value.name or "")
            use.node.replace_input_with(use.idx, unpacked)


def integer_matmul(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """`DynamicQuantizeLinear → MatMulInteger → Cast → Mul(scales)`; readers share the first.

    A Gemm becomes that and an Add of its bias, its weight transposed here and not in the graph.
    """
    dynamic, fake = _producer(node, 0), _producer(node, 1)
    value, weight, params = _input(dynamic, 0), _input(fake, 0), params_of(fake)
    codes, scale, zero = _dynamic_codes(graph, dynamic, value)
    columns = constant(graph, f"{weight.name}_scale", params.scale)
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    weight_codes = (_transposed_codes if transposed else _codes)(graph, weight, params)
    out = node.outputs[0].name or ""
    product = _insert(graph, node, "MatMulInteger", [codes, weight_codes, zero], f"{out}_i32")
    real = _insert(graph, node, "Cast", [product.outputs[0]], f"{out}_f32", {"to": 1})
    scales = _insert(graph, node, "Mul", [scale, columns], f"{out}_scales")
    factors = [real.outputs[0], scales.outputs[0]]
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is None:
        _replace(graph, node, "Mul", factors)
    else:
        scaled = _insert(graph, node, "Mul", factors, f"{out}_scaled")
        _replace(graph, node, "Add", [scaled.outputs[0], bias])


def blocked_matmul(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """`MatMulNBits`: weight `[K, N]` as bytes `[N, K/block, block]`, codes offset by 128."""
    fake = _producer(node, 1)
    weight, params = _input(fake, 0), params_of(fake)
    granularity = params.spec.granularity
    assert isinstance(granularity, PerBlock)
    assert weight.const_value is not None
    codes = quantize(weight.const_value.numpy(), params)
    rows, columns = codes.shape
    size = granularity.size
    packed = (codes.T + 128).astype(np.uint8).reshape(columns, rows // size, size)
    packed_value = constant(graph, f"{weight.name}_q", packed)
    scale = constant(
        graph, f"{weight.name}_scale", np.ascontiguousarray(params.scale.T).reshape(-1)
    )
    attributes = {"K": rows, "N": columns, "bits": 8, "block_size": size, "accuracy_level": 4}
    inputs = [node.inputs[0], packed_value, scale]
    _replace(graph, node, "MatMulNBits", inputs, attributes, MICROSOFT)


def dynamic_lstm(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """`DynamicQuantizeLSTM`: weights transposed to `[D, in, 4H]`, one scale per gate row."""
    dynamic = _producer(node, 0)
    inputs: list[onnx_ir.Value | None] = [*node.inputs, *[None] * (8 - len(node.inputs))]
    inputs[0] = _input(dynamic, 0)
    for index in (1, 2):
        fake = _producer(node, index)
        value, params = _input(fake, 0), params_of(fake)
        assert value.const_value is not None
        codes = quantize(value.const_value.numpy(), params).astype(np.int8)
        transposed = np.ascontiguousarray(codes.transpose(0, 2, 1))
        inputs[index] = constant(graph, f"{value.name}_q", transposed)
        scale = np.ascontiguousarray(params.scale[..., 0])
        inputs += [
            constant(graph, f"{value.name}_scale", scale),
            constant(
                graph, f"zero_s8_{scale.shape[0]}x{scale.shape[1]}", np.zeros(scale.shape, np.int8)
            ),
        ]
    attributes = {
        name: node.attributes[name].value
        for name in ("direction", "hidden_size")
        if name in node.attributes
    }
    _replace(graph, node, "DynamicQuantizeLSTM", inputs, attributes, MICROSOFT)


def quantize_bias(
    graph: onnx_ir.Graph, node: onnx_ir.Node, index: int, linear: onnx_ir.Node
) -> None:
    """int32 bias of scale `s_x·s_w`: with a float one, a float output keeps the node float."""
    bias = node.inputs[index]
    assert bias is not None
    assert bias.const_value is not None
    input_scale, weight_scale = (_scale_of(linear, k) for k in (0, 1))
    scale = (input_scale * weight_scale).astype(np.float32)
    array = bias.const_value.numpy().reshape(-1)
    limit = 2**31 - 1
    codes = np.clip(np.rint(array.astype(np.float64) / scale), -limit, limit).astype(np.int32)
    scale = np.broadcast_to(scale, codes.shape) if scale.ndim else scale
    name = f"{bias.name}_{node.name}"
    inputs = [
        constant(graph, f"{name}_q", codes),
        constant(graph, f"{name}_scale", np.ascontiguousarray(scale)),
    ]
    attributes = {"axis": 0} if scale.ndim else {}
    made = _insert(graph, node, "DequantizeLinear", inputs, f"{name}_dq", attributes)
    node.replace_input_with(index, made.outputs[0])


def _scale_of(linear: onnx_ir.Node, index: int) -> NDArray[np.float32]:
    scale = _producer(linear, index).inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    array: NDArray[np.float32] = scale.const_value.numpy()
    return array


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
        node = _insert(
            graph, use.node, "DequantizeLinear", inputs, f"{name}_dq{suffix}", attributes
        )
        use.node.replace_input_with(use.idx, node.outputs[0])
    if output.is_graph_output():
        _replace(graph, fake, "DequantizeLinear", list(inputs), attributes)


def _numbers(graph: onnx_ir.Graph, name: str, params: QuantParams) -> list[onnx_ir.Value]:
    return [constant(graph, f"{name}_scale", params.scale), _zero_point(graph, params, name)]


def _zero_point(graph: onnx_ir.Graph, params: QuantParams, name: str) -> onnx_ir.Value:
    """A zero point; scalars and all-zero vectors are shared by all that have the same."""
    array = params.zero_point.astype(params.spec.onnx_type.numpy())
    if array.ndim == 0:
        return constant(graph, f"zero_{params.spec.dtype}_{int(params.zero_point)}", array)
    shared = f"zero_{params.spec.dtype}_x{array.size}"
    return constant(graph, f"{name}_zero_point" if array.any() else shared, array)


def _codes(graph: onnx_ir.Graph, value: onnx_ir.Value, params: QuantParams) -> onnx_ir.Value:
    assert value.const_value is not None
    name = f"{value.name}_q"
    if name in graph.initializers:
        return graph.initializers[name]
    codes = quantize(value.const_value.numpy(), params)
    return constant(graph, name, codes.astype(params.spec.onnx_type.numpy()))


def _transposed_codes(
    graph: onnx_ir.Graph, value: onnx_ir.Value, params: QuantParams
) -> onnx_ir.Value:
    assert value.const_value is not None
    codes = quantize(value.const_value.numpy(), params).astype(params.spec.onnx_type.numpy())
    return constant(graph, f"{value.name}_qt", np.ascontiguousarray(codes.T))


def _gather_codes(
    graph: onnx_ir.Graph, node: onnx_ir.Node, codes: onnx_ir.Value, scale: onnx_ir.Value
) -> None:
    out = node.outputs[0].name or ""
    rows = _insert(graph, node, "Gather", [codes, node.inputs[1]], f"{out}_q")
    scales = _insert(graph, node, "Gather", [scale, node.inputs[1]], f"{out}_scale")
    real = _insert(graph, node, "Cast", [rows.outputs[0]], f"{out}_f32", {"to": 1})
    _replace(graph, node, "Mul", [real.outputs[0], scales.outputs[0]])


def _unpack(
    graph: onnx_ir.Graph,
    reader: onnx_ir.Node,
    codes: onnx_ir.Value,
    scale: onnx_ir.Value,
    name: str,
) -> onnx_ir.Value:
    unpacked = f"{name}_dq"
    for node in (u.node for u in scale.uses()):
        if node.outputs[0].name == unpacked:
            return node.outputs[0]
    real = _insert(graph, reader, "Cast", [codes], f"{name}_f32", {"to": 1})
    return _insert(graph, reader, "Mul", [real.outputs[0], scale], unpacked).outputs[0]


def _dynamic_codes(
    graph: onnx_ir.Graph, dynamic: onnx_ir.Node, value: onnx_ir.Value
) -> Sequence[onnx_ir.Value]:
    name = f"{value.name}_q"
    for node in (u.node for u in value.uses()):
        if node.op_type == "DynamicQuantizeLinear":
            return node.outputs
    outputs = [onnx_ir.Value(name=n) for n in (name, f"{name}_scale", f"{name}_zero_point")]
    node = onnx_ir.node("DynamicQuantizeLinear", [value], outputs=outputs, name=name)
    graph.insert_before(dynamic, node)
    return node.outputs


def _insert(
    graph: onnx_ir.Graph,
    before: onnx_ir.Node,
    op_type: str,
    inputs: Sequence[onnx_ir.Value | None],
    name: str,
    attributes: dict[str, int] | None = None,
) -> onnx_ir.Node:
    node = onnx_ir.node(op_type, inputs, attributes=attributes or {}, name=name)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node


def _replace(
    graph: onnx_ir.Graph,
    node: onnx_ir.Node,
    op_type: str,
    inputs: Sequence[onnx_ir.Value | None],
    attributes: dict[str, int] | None = None,
    domain: str = "",
) -> None:
    """Another operator computes the node's outputs, under its name and with its metadata."""
    outputs = [onnx_ir.Value(name=v.name, shape=v.shape, type=v.type) for v in node.outputs]
    made = onnx_ir.node(
        op_type,
        inputs,
        attributes=attributes or {},
        domain=domain,
        outputs=outputs,
        name=node.name,
        doc_string=node.doc_string,
        metadata_props=dict(node.metadata_props),
    )
    onnx_ir.convenience.replace_nodes_and_values(
        graph, node, [node], [made], node.outputs, made.outputs
    )


def _input(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _input_array(node: onnx_ir.Node, index: int) -> NDArray[np.float32]:
    tensor = _input(node, index).const_value
    assert tensor is not None
    array: NDArray[np.float32] = tensor.numpy()
    return array


def _producer(node: onnx_ir.Node, index: int) -> onnx_ir.Node:
    producer = _input(node, index).producer()
    assert producer is not None
    return producer
