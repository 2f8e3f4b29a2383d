"""Thin layers in the graph: two in place of one, or two beside one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.ir.fake_quant import constant
from octavo.passes.linear import linear_after

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from octavo.passes.low_rank_layer import LayerFactors
    from octavo.passes.rewrite import Rewrite

_SUFFIX = "low_rank"


def split_layer(rewrite: Rewrite, node: onnx_ir.Node, made: LayerFactors) -> onnx_ir.Node:
    """Put a thin layer in front of `node`, which becomes the second; its constant is dropped.

    Returns the new node. Names derive from those of `node`, which keeps its own, its output and
    its bias; a shift of `made` is added to the bias.
    """
    graph, weight, output = node.graph, node.inputs[1], node.outputs[0]
    assert graph is not None
    assert weight is not None
    assert weight.dtype is not None
    dtype = weight.dtype.numpy()
    if made.shift is not None:
        _add_to_bias(rewrite, node, made.shift, dtype)
    own, rest = _attributes(node, made)
    weights = [
        _initializer(rewrite, graph, f"{weight.name}_{suffix}", array.astype(dtype))
        for suffix, array in (("first", made.first), ("second", made.second))
    ]
    first = onnx_ir.Node(
        "", node.op_type, [node.inputs[0], weights[0]], own,
        name=rewrite.fresh(f"{node.name}_{_SUFFIX}"), metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    inner = first.outputs[0]
    inner.name, inner.type = rewrite.fresh(f"{output.name}_{_SUFFIX}"), output.type
    inner.shape = _inner_shape(node, made)
    graph.insert_before(node, first)
    node.replace_input_with(0, inner)
    node.replace_input_with(1, weights[1])
    for name in ("auto_pad", *(a.name for a in rest)):
        node.attributes.pop(name, None)
    node.attributes.update({a.name: a for a in rest})
    if not weight.uses():
        graph.initializers.pop(weight.name or "", None)
    return first


def add_branch(rewrite: Rewrite, node: onnx_ir.Node, made: LayerFactors) -> list[onnx_ir.Node]:
    """Add what two thin layers make of the input of `node` to its output, behind its bias.

    They read in float what `node` reads in codes found at run time. The sum takes over the name
    of the output. Returns the two.
    """
    graph, source, linear = node.graph, node.inputs[0], linear_after(node)
    last = linear.last if linear is not None else node
    assert graph is not None
    assert source is not None
    maker = source.producer()
    if maker is not None and maker.op_type == "FakeQuantDynamic":
        source = maker.inputs[0]
    own, rest = _attributes(node, made)
    kept = [a for a in node.attributes.values() if a.name not in ("auto_pad", "beta")]
    output = last.outputs[0]
    thin: list[onnx_ir.Node] = []
    parts = (("first", made.first, own), ("second", made.second, (*kept, *rest)))
    for name, array, attributes in parts:
        base = f"{node.name}_repair_{name}"
        weight = _initializer(rewrite, graph, f"{base}_weight", array.astype(np.float32))
        by_name = {attribute.name: attribute for attribute in attributes}
        added = onnx_ir.Node(
            "", node.op_type, [source, weight], by_name.values(), name=rewrite.fresh(base)
        )
        source = added.outputs[0]
        source.name, source.type = rewrite.fresh(f"{output.name}_repair_{name}"), output.type
        graph.insert_after(thin[-1] if thin else last, added)
        thin.append(added)
    thin[0].outputs[0].shape, thin[1].outputs[0].shape = _inner_shape(node, made), output.shape
    _add_up(rewrite, output, thin[1], f"{node.name}_repair")
    return thin


def _add_up(rewrite: Rewrite, output: onnx_ir.Value, other: onnx_ir.Node, name: str) -> None:
    """Let readers of `output` read its sum with what `other` makes, under the same name."""
    total = onnx_ir.Node("", "Add", [], name=rewrite.fresh(name))
    repaired = total.outputs[0]
    repaired.shape, repaired.type = output.shape, output.type
    repaired.name, output.name = output.name, rewrite.fresh(f"{output.name}_unrepaired")
    output.replace_all_uses_with(repaired, replace_graph_outputs=True)
    total.resize_inputs(2)
    total.replace_input_with(0, output)
    total.replace_input_with(1, other.outputs[0])
    assert other.graph is not None
    other.graph.insert_after(other, total)


def _initializer(
    rewrite: Rewrite, graph: onnx_ir.Graph, base: str, array: NDArray[np.generic]
) -> onnx_ir.Value:
    """A constant under a name that nothing has yet."""
    return constant(graph, rewrite.fresh(base), np.ascontiguousarray(array))


def _add_to_bias(
    rewrite: Rewrite, node: onnx_ir.Node, shift: NDArray[np.float64], dtype: np.dtype[np.generic]
) -> None:
    linear = linear_after(node)
    bias = linear.bias() if linear is not None else None
    assert linear is not None
    assert bias is not None
    alpha = node.attributes.get_float("alpha", 1.0)
    moved = (bias + alpha * shift).astype(dtype)
    rewrite.set_constant(linear.last, linear.bias_index, moved, "bias")
    node.attributes.pop("beta", None)


def _attributes(
    node: onnx_ir.Node, made: LayerFactors
) -> tuple[Sequence[onnx_ir.Attr], Sequence[onnx_ir.Attr]]:
    """Attributes of the new node, and those that `node` is to have now."""
    if node.op_type == "MatMul":
        return (), ()
    if node.op_type == "Gemm":
        names = ("alpha", "transA", "transB")
        kept = [a for n in names for a in [node.attributes.get(n)] if a is not None]
        return kept, (onnx_ir.AttrFloat32("alpha", 1.0), onnx_ir.AttrInt64("transA", 0))
    rank = len(made.first.shape) - 2
    read = node.attributes.get_ints
    ones, none = [1] * rank, [0] * 2 * rank
    strides, dilations = (list(read(name, ones)) for name in ("strides", "dilations"))
    pads, padding = list(read("pads", none)), node.attributes.get_string("auto_pad", "NOTSET")
    along = slice(0, rank) if made.form.kind == "channel" else slice(0, 1)
    parts = []
    for kernel, first in ((made.first, True), (made.second, False)):
        mine = [(k in range(rank)[along]) == first for k in range(rank)]
        found = {
            "kernel_shape": list(kernel.shape[2:]),
            "strides": _picked(strides, mine, 1),
            "dilations": _picked(dilations, mine, 1),
        }
        if padding == "NOTSET":
            found["pads"] = _picked(pads, [*mine, *mine], 0)
        parts.append(_int_lists(found, padding))
    return parts[0], parts[1]


def _picked(numbers: Sequence[int], mine: Sequence[bool], other: int) -> list[int]:
    return [number if own else other for number, own in zip(numbers, mine, strict=True)]


def _int_lists(numbers: Mapping[str, Sequence[int]], padding: str) -> list[onnx_ir.Attr]:
    found = [onnx_ir.AttrInt64s(name, some) for name, some in numbers.items()]
    return found if padding == "NOTSET" else [*found, onnx_ir.AttrString("auto_pad", padding)]


def _inner_shape(node: onnx_ir.Node, made: LayerFactors) -> onnx_ir.Shape | None:
    """The shape of what lies between the two, where those around it are known."""
    before = node.inputs[0].shape if node.inputs[0] is not None else None
    after = node.outputs[0].shape
    if after is None:
        return None
    dims = list(after.dims)
    if node.op_type != "Conv":
        return onnx_ir.Shape([*dims[:-1], made.rank])
    if made.form.kind == "channel":
        return onnx_ir.Shape([dims[0], made.rank, *dims[2:]])
    if before is None:
        return None
    return onnx_ir.Shape([dims[0], made.rank, dims[2], before.dims[3]])
