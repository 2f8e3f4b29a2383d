"""Operators rewritten to equal ones that runtimes have integer kernels for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.ir.fake_quant import constant
from octavo.passes.rewrite import is_op, only_reader, static_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from octavo.passes.rewrite import Rewrite


def pool_mean(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """`ReduceMean` over both image axes, dimensions kept, is a `GlobalAveragePool`."""
    if not _is_image_mean(node):
        return False
    substitute(node, "GlobalAveragePool", [node.inputs[0]], {})
    return rewrite.done("mean-as-pool", node, "mean over the image as GlobalAveragePool")


def split_transposed_convolution(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """A `ConvTranspose` whose kernel is its stride is a 1x1 `Conv` and a `DepthToSpace`.

    Every output pixel reads one input pixel: `[C, O, b, b]` becomes `[b·b·O, C, 1, 1]`, exact.
    """
    block = _block(node)
    if block is None or node.graph is None:
        return False
    conv = _pointwise(node, block)
    node.graph.insert_before(node, conv)
    substitute(node, "DepthToSpace", [conv.outputs[0]], {"blocksize": block, "mode": "DCR"})
    return rewrite.done("transposed-convolution-split", node, "kernel = stride: pointwise Conv")


def activate_before_space(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """Relu or Clip of a `DepthToSpace` acts before it, where the kernel in front absorbs it."""
    moved = node.inputs[0]
    space = moved.producer() if moved is not None else None
    if moved is None or not is_op(space, "DepthToSpace") or only_reader(moved) is not node:
        return False
    assert space is not None
    graph, active = space.graph, node.outputs[0]
    assert graph is not None
    name = active.name
    active.replace_all_uses_with(moved, replace_graph_outputs=True)
    node.replace_input_with(0, space.inputs[0])
    space.replace_input_with(0, active)
    graph.remove(node)
    graph.insert_before(space, node)
    active.name, moved.name = f"{name}_before_space", name
    active.shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return rewrite.done("activation-moved", node, f"before '{space.name}'")


def substitute(
    node: onnx_ir.Node,
    op_type: str,
    inputs: Sequence[onnx_ir.Value | None],
    attributes: Mapping[str, int | str | onnx_ir.TensorProtocol],
) -> None:
    """Another operator computes the node's output, under its name and with its metadata."""
    graph, old = node.graph, node.outputs[0]
    assert graph is not None
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
    """The stride of a transposed convolution that is also its kernel size, else `None`."""
    weight = static_shape(node.inputs[1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    constants = all(v is None or v.const_value is not None for v in (node.inputs[1], bias))
    if not constants or weight is None or len(weight) != 4 or weight[2] != weight[3]:
        return None
    if {"auto_pad", "output_shape"} & set(node.attributes) or node.attributes.get_int(
        "group", 1
    ) != 1:
        return None
    given = {
        "strides": node.attributes.get_ints("strides", [1, 1]),
        "pads": node.attributes.get_ints("pads", [0] * 4),
        "dilations": node.attributes.get_ints("dilations", [1, 1]),
        "output_padding": node.attributes.get_ints("output_padding", [0, 0]),
    }
    block = weight[2]
    wanted = {
        "strides": [block] * 2,
        "pads": [0] * 4,
        "dilations": [1, 1],
        "output_padding": [0, 0],
    }
    return block if all(list(given[k] or []) == wanted[k] for k in wanted) else None


def _pointwise(node: onnx_ir.Node, block: int) -> onnx_ir.Node:
    weight, graph = node.inputs[1], node.graph
    assert weight is not None
    assert weight.const_value is not None
    assert graph is not None
    array = weight.const_value.numpy()
    rows = array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    pointwise = np.ascontiguousarray(rows)[:, :, None, None]
    inputs = [node.inputs[0], constant(graph, f"{node.name}_pointwise_weight", pointwise)]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and bias.const_value is not None:
        repeated = np.tile(bias.const_value.numpy(), block * block)
        inputs.append(constant(graph, f"{node.name}_pointwise_bias", repeated))
    conv = onnx_ir.node(
        "Conv",
        inputs,
        name=f"{node.name}_pointwise",
        metadata_props=dict(node.metadata_props),
    )
    conv.outputs[0].name = f"{node.outputs[0].name}_pointwise"
    conv.outputs[0].type = node.outputs[0].type
    return conv
