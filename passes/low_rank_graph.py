"""Write a layer of the graph as two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

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
    first = onnx_ir.Node(
        "", node.op_type, [node.inputs[0], _constant(rewrite, graph, weight, "first", made.first)],
        own, name=rewrite.fresh(f"{node.name}_{_SUFFIX}"),
        metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    inner = first.outputs[0]
    inner.name, inner.type = rewrite.fresh(f"{output.name}_{_SUFFIX}"), output.type
    inner.shape = _inner_shape(node, made)
    second = _constant(rewrite, graph, weight, "second", made.second)
    graph.insert_before(node, first)
    node.replace_input_with(0, inner)
    node.replace_input_with(1, second)
    for name in ("auto_pad", *(a.name for a in rest)):
        node.attributes.pop(name, None)
    node.attributes.update({a.name: a for a in rest})
    if not weight.uses():
        graph.initializers.pop(weight.name or "", None)
    return first


def _constant(
    rewrite: Rewrite,
    graph: onnx_ir.Graph,
    weight: onnx_ir.Value,
    suffix: str,
    array: NDArray[np.float64],
) -> onnx_ir.Value:
    """An initializer in the type of the weight it replaces a part of."""
    assert weight.dtype is not None
    name = rewrite.fresh(f"{weight.name}_{suffix}")
    narrow = np.ascontiguousarray(array, weight.dtype.numpy())
    tensor = onnx_ir.Tensor(narrow, name=name)
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(narrow.shape), type=weight.type, const_value=tensor
    )
    graph.register_initializer(value)
    return value


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
