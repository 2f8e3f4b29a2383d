"""How one FakeQuant becomes the form whose integer kernel ONNX Runtime knows.

Values derived from `v` are called `v_q` (codes) and `v_dq` (dequantized, one per reader), so
that the audit finds a planned node's kernel by name.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.ir.fake_quant import constant, params_of
from octavo.ir.mapped import reading
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
    params, name = params_of(fake), _stem(fake)
    codes = _codes(graph, fake)
    numbers = [constant(graph, f"{name}_scale", params.scale)]
    if any(use.node.op_type != "Conv" for use in fake.outputs[0].uses()):
        numbers.append(_zero_point(graph, params, name))
    axis = params.spec.granularity.axis if isinstance(params.spec.granularity, PerAxis) else None
    attributes = {} if axis is None else {"axis": axis}
    _fan_out(graph, fake, [codes, *numbers], name, attributes)


def store_constant(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> None:
    """`Cast(codes) · scale`, which the runtime folds when it loads; after the lookup for Gather."""
    codes, name = _codes(graph, fake), _stem(fake)
    scale = constant(graph, f"{name}_scale", _input_array(fake, 1))
    for use in list(fake.outputs[0].uses()):
        if use.node.op_type == "Gather" and use.idx == 0:
            _gather_codes(graph, use.node, codes, scale)
        else:
            unpacked = _unpack(graph, use.node, codes, scale, name)
            use.node.replace_input_with(use.idx, unpacked)


def dynamic_matmul(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """`DynamicQuantizeMatMul`; readers of one value share its quantization instead."""
    dynamic, fake = _producer(node, 0), _producer(node, 1)
    value = _input(dynamic, 0)
    codes, scale = _columns(graph, node, fake)
    tail, bias = linear_tail(node)
    shared = _dynamic_codes(value)
    if shared is None and len(dynamic.outputs[0].uses()) > 1:
        shared = _quantize_dynamically(graph, dynamic, value)
    if shared is None:
        inputs = [value, codes, scale, None, bias]
        _replace(graph, tail, "DynamicQuantizeMatMul", inputs, domain=MICROSOFT, name=node.name)
    else:
        quantized, input_scale, zero = shared
        inputs = [quantized, codes, input_scale, scale, zero, None, bias]
        _replace(graph, tail, "MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=node.name)


def static_matmul(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """`MatMulIntegerToFloat`, for a float output: as Q/DQ its bias would keep the node float."""
    quantized, scale, zero = (_input(_producer(node, 0), k) for k in range(3))
    codes, columns = _columns(graph, node, _producer(node, 1))
    tail, bias = linear_tail(node)
    inputs = [quantized, codes, scale, columns, zero, None, bias]
    _replace(graph, tail, "MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=node.name)


def linear_tail(node: onnx_ir.Node) -> tuple[onnx_ir.Node, onnx_ir.Value | None]:
    """The node that ends `x·W + b`, and `b` where it is a constant vector."""
    if node.op_type == "Gemm":
        return node, node.inputs[2] if len(node.inputs) > 2 else None
    uses = list(node.outputs[0].uses())
    add = uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None
    if add is None or add.op_type != "Add" or add.domain or add.graph is not node.graph:
        return node, None
    bias = add.inputs[1 - uses[0].idx]
    columns = _input(node, 1).shape
    if bias is None or bias.const_value is None or columns is None:
        return node, None
    return (add, bias) if list(bias.const_value.shape) == [columns[-1]] else (node, None)


def _columns(
    graph: onnx_ir.Graph, node: onnx_ir.Node, fake: onnx_ir.Node
) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """Codes `[K, N]` and their scales; a transposed Gemm weight is turned here."""
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    codes = (_transposed_codes if transposed else _codes)(graph, fake)
    return codes, constant(graph, f"{_stem(fake)}_scale", params_of(fake).scale)


def blocked_matmul(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """`MatMulNBits`: weight `[K, N]` as bytes `[N, K/block, block]`, codes offset by 128."""
    fake = _producer(node, 1)
    params, name = params_of(fake), _stem(fake)
    granularity = params.spec.granularity
    assert isinstance(granularity, PerBlock)
    codes = _quantized(fake, params)
    rows, columns = codes.shape
    size = granularity.size
    # Adding 128 to a signed byte is flipping its highest bit.
    packed = (codes.view(np.uint8) ^ 128).T.reshape(columns, rows // size, size)
    packed_value = constant(graph, f"{name}_q", packed)
    scale = constant(graph, f"{name}_scale", np.ascontiguousarray(params.scale.T).reshape(-1))
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
        params, name = params_of(fake), _stem(fake)
        codes = _quantized(fake, params)
        transposed = np.ascontiguousarray(codes.transpose(0, 2, 1))
        inputs[index] = constant(graph, f"{name}_q", transposed)
        scale = np.ascontiguousarray(params.scale[..., 0])
        inputs += [
            constant(graph, f"{name}_scale", scale),
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
            use.node.graph or graph,
            use.node,
            "DequantizeLinear",
            inputs,
            f"{name}_dq{suffix}",
            attributes,
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


def _stem(fake: onnx_ir.Node) -> str:
    """What names derived from a constant begin with: its own, numbered from its second quantizer.

    Readers that want other axes or methods each have a quantizer of a shared weight.
    """
    value = _input(fake, 0)
    fakes = [use.node for use in value.uses() if use.node.domain == fake.domain]
    number = fakes.index(fake)
    return f"{value.name}#{number}" if number else value.name or ""


def _codes(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> onnx_ir.Value:
    """The codes of a constant; quantizers of equal codes share them."""
    params = params_of(fake)
    codes = _quantized(fake, params)
    known = graph.initializers.get(f"{_input(fake, 0).name}_q")
    if known is not None and known.const_value is not None:
        array = known.const_value.numpy()
        if array.dtype == codes.dtype and np.array_equal(array, codes):
            return known
    return constant(graph, f"{_stem(fake)}_q", codes)


def _transposed_codes(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> onnx_ir.Value:
    params = params_of(fake)
    codes = _quantized(fake, params)
    return constant(graph, f"{_stem(fake)}_qt", np.ascontiguousarray(codes.T))


def _gather_codes(
    graph: onnx_ir.Graph, node: onnx_ir.Node, codes: onnx_ir.Value, scale: onnx_ir.Value
) -> None:
    out = node.outputs[0].name or ""
    rows = _insert(graph, node, "Gather", [codes, node.inputs[1]], f"{out}_rows")
    scales = _insert(graph, node, "Gather", [scale, node.inputs[1]], f"{out}_row_scales")
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


def _insert(
    graph: onnx_ir.Graph,
    before: onnx_ir.Node,
    op_type: str,
    inputs: Sequence[onnx_ir.Value | None],
    name: str,
    attributes: dict[str, int] | None = None,
) -> onnx_ir.Node:
    name = _unique(graph, name)
    node = onnx_ir.node(op_type, inputs, attributes=attributes or {}, name=name)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node


def _unique(graph: onnx_ir.Graph, name: str) -> str:
    """A name that no node or value has; a model lowered before uses the same ones."""
    taken: set[str] = graph.meta.setdefault("octavo.names", _names(graph))
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    free = name if name not in taken else next(n for n in numbered if n not in taken)
    taken.add(free)
    return free


def _names(graph: onnx_ir.Graph) -> set[str]:
    names = {node.name or "" for node in graph} | set(graph.initializers)
    return names | {v.name or "" for node in graph for v in node.outputs}


def _replace(
    graph: onnx_ir.Graph,
    node: onnx_ir.Node,
    op_type: str,
    inputs: Sequence[onnx_ir.Value | None],
    attributes: dict[str, int] | None = None,
    domain: str = "",
    name: str | None = None,
) -> None:
    """Another operator computes the node's outputs, with its metadata and (unless given) name."""
    outputs = [onnx_ir.Value(name=v.name, shape=v.shape, type=v.type) for v in node.outputs]
    made = onnx_ir.node(
        op_type,
        inputs,
        attributes=attributes or {},
        domain=domain,
        outputs=outputs,
        name=name or node.name,
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


def _quantized(fake: onnx_ir.Node, params: QuantParams) -> NDArray[np.generic]:
    """The codes of the constant that a FakeQuant reads, in the type of its spec."""
    tensor = _input(fake, 0).const_value
    assert tensor is not None
    dtype = params.spec.onnx_type.numpy()
    return reading(tensor, lambda array: quantize(array, params).astype(dtype, copy=False))


def _input_array(node: onnx_ir.Node, index: int) -> NDArray[np.float32]:
    tensor = _input(node, index).const_value
    assert tensor is not None
    array: NDArray[np.float32] = tensor.numpy()
    return array


def _producer(node: onnx_ir.Node, index: int) -> onnx_ir.Node:
    producer = _input(node, index).producer()
    assert producer is not None
    return producer
