"""Replace the sparse tensors of a protobuf model by dense ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.errors import ModelError, UnsafeModel

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx
    from numpy.typing import NDArray

# A few bytes of indices may declare any shape, so the sum of all dense sizes is bounded.
MAX_DENSE_BYTES = 1 << 28


def densify(proto: onnx.ModelProto, where: str) -> None:
    """Make sparse initializers and the sparse values of Constant nodes dense, in place.

    Raises ModelError for other sparse attributes and UnsafeModel beyond `MAX_DENSE_BYTES`.
    """
    left = _densify_graph(proto.graph, MAX_DENSE_BYTES, where)
    for function in proto.functions:
        left = _densify_nodes(function.node, left, where)


def _densify_graph(graph: onnx.GraphProto, left: int, where: str) -> int:
    for sparse in graph.sparse_initializer:
        left = _dense_into(graph.initializer.add(), sparse, left, where)
    del graph.sparse_initializer[:]
    return _densify_nodes(graph.node, left, where)


def _densify_nodes(nodes: Iterable[onnx.NodeProto], left: int, where: str) -> int:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor") and node.op_type == "Constant":
                left = _dense_into(attribute.t, attribute.sparse_tensor, left, where)
                attribute.ClearField("sparse_tensor")
                attribute.name, attribute.type = "value", attribute.TENSOR
            elif attribute.HasField("sparse_tensor") or len(attribute.sparse_tensors):
                message = f"the sparse attribute '{attribute.name}' is not supported"
                raise ModelError(message, where=f"{where}, node '{node.name}'")
            if attribute.HasField("g"):
                left = _densify_graph(attribute.g, left, where)
            for graph in attribute.graphs:
                left = _densify_graph(graph, left, where)
    return left


def _dense_into(
    dense: onnx.TensorProto, sparse: onnx.SparseTensorProto, left: int, where: str
) -> int:
    """Write the dense form; returns the bytes that are left of the bound."""
    from onnx import numpy_helper

    name, shape = sparse.values.name, tuple(sparse.dims)
    values = numpy_helper.to_array(sparse.values)
    size = math.prod(shape)
    if any(d < 0 for d in shape) or size * values.itemsize > left:
        message = f"the sparse tensor '{name}' declares the shape {list(shape)[:8]}"
        why = f"all dense forms together may have {MAX_DENSE_BYTES} bytes"
        raise UnsafeModel(message, where=where, why=why)
    array = np.zeros(size, values.dtype)
    array[_flat_indices(sparse, shape, where)] = values.reshape(-1)
    dense.CopyFrom(numpy_helper.from_array(array.reshape(shape), name))
    return left - array.nbytes


def _flat_indices(
    sparse: onnx.SparseTensorProto, shape: tuple[int, ...], where: str
) -> NDArray[np.int64]:
    """Positions in the flat dense array, of indices given flat `[n]` or by axis `[n, rank]`."""
    from onnx import numpy_helper

    indices = numpy_helper.to_array(sparse.indices).astype(np.int64)
    count = math.prod(sparse.values.dims)
    limits = np.array(shape if indices.ndim == 2 else [math.prod(shape)], np.int64)
    fits = indices.shape in ((count,), (count, len(shape)))
    if not fits or (indices < 0).any() or (indices >= limits).any():
        message = f"the indices of the sparse tensor '{sparse.values.name}' do not fit its shape"
        raise ModelError(message, where=where)
    if indices.ndim == 1:
        return indices
    return np.asarray(np.ravel_multi_index(tuple(indices.T), shape), np.int64)
