"""Operators rewritten to equal ones that runtimes have integer kernels for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.ir.fake_quant import constant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext


def pool_means(model: Model, ctx: PassContext) -> None:
    """`ReduceMean` over both image axes, dimensions kept, is a `GlobalAveragePool`."""
    for node in list(model.graph):
        if node.op_type == "ReduceMean" and _is_image_mean(node):
            _replace(model.graph, node, "GlobalAveragePool", [node.inputs[0]], {})
            ctx.count("mean as pool")


def split_transposed_convolutions(model: Model, ctx: PassContext) -> None:
    """A `ConvTranspose` whose kernel is its stride is a 1x1 `Conv` and a `DepthToSpace`.

    Every output pixel reads one input pixel: `[C, O, b, b]` becomes `[O·b·b, C, 1, 1]`, exact.
    """
    for node in list(model.graph):
        block = _block(node) if node.op_type == "ConvTranspose" else None
        if block is not None:
            _split(model.graph, node, block)
            ctx.count("transposed convolution split")


def _is_image_mean(node: onnx_ir.Node) -> bool:
    value = node.inputs[0]
    if value is None or value.shape is None or value.shape.rank() != 4:
        return False
    axes: Sequence[int] | None = None
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        tensor = node.inputs[1].const_value
        axes = tensor.numpy().tolist() if tensor is not None else None
    elif "axes" in node.attributes:
        axes = node.attributes["axes"].as_ints()
    kept = node.attributes.get_int("keepdims", 1) == 1
    return kept and axes is not None and sorted(a % 4 for a in axes) == [2, 3]


def _block(node: onnx_ir.Node) -> int | None:
    weight = node.inputs[1].const_value if node.inputs[1] is not None else None
    if weight is None or len(weight.shape) != 4:
        return None
    block = int(np.asarray(weight.shape)[2])
    get = node.attributes.get
    expected = {
        "strides": [block, block],
        "pads": [0, 0, 0, 0],
        "dilations": [1, 1],
        "output_padding": [0, 0],
    }
    default = {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "output_padding": [0, 0]}
    for name, wanted in expected.items():
        attribute = get(name)
        if (list(attribute.as_ints()) if attribute is not None else default[name]) != wanted:
            return None
    plain = not {"auto_pad", "output_shape"} & set(node.attributes)
    square = weight.shape[2] == weight.shape[3]
    return block if plain and square and node.attributes.get_int("group", 1) == 1 else None


def _split(graph: onnx_ir.Graph, node: onnx_ir.Node, block: int) -> None:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    array = weight.const_value.numpy()
    channels = array.shape[0]
    pointwise = np.ascontiguousarray(array.reshape(channels, -1).T)[:, :, None, None]
    inputs = [node.inputs[0], constant(graph, f"{weight.name}_pointwise", pointwise)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = node.inputs[2]
        assert bias.const_value is not None
        repeated = np.repeat(bias.const_value.numpy(), block * block)
        inputs.append(constant(graph, f"{bias.name}_pointwise", repeated))
    conv = onnx_ir.node("Conv", inputs, name=f"{node.name}_pointwise")
    conv.outputs[0].name = f"{node.outputs[0].name}_pointwise"
    conv.outputs[0].type = node.outputs[0].type
    graph.insert_before(node, conv)
    attributes = {"blocksize": block, "mode": "CRD"}
    _replace(graph, node, "DepthToSpace", [conv.outputs[0]], attributes)


def _replace(
    graph: onnx_ir.Graph,
    node: onnx_ir.Node,
    op_type: str,
    inputs: Sequence[onnx_ir.Value | None],
    attributes: dict[str, int | str],
) -> None:
    old = node.outputs[0]
    new = onnx_ir.Value(name=old.name, shape=old.shape, type=old.type)
    made = onnx_ir.node(
        op_type,
        inputs,
        attributes=attributes,
        outputs=[new],
        name=node.name,
        doc_string=node.doc_string,
        metadata_props=dict(node.metadata_props),
    )
    onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], [made], [old], [new])
