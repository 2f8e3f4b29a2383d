"""Bytes of the emitted file that no decision changes: the graph, and constants outside groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir

from octavo.ir.facts import HalfConstants
from octavo.ir.file_bytes import half_bytes, tensor_bytes
from octavo.ir.weightless import is_small, without_weights
from octavo.passes.groups import weight_row, weight_source

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onnx_ir import TensorProtocol

    from octavo.ir.model import Model
    from octavo.ir.target import Target


def fixed_bytes(model: Model, decided: Iterable[str], target: Target) -> int:
    """Bytes of the file without the weights of the decided nodes, by name.

    Shapes, metadata and what the emitted file leaves out are not counted.
    """
    names = set(decided)
    own = {
        id(source)
        for node in model.graph
        if node.name in names
        for source in _weights(node, target)
    }
    found = model.find(HalfConstants)
    halved = set(found.names) if found is not None else set[str]()
    total = _graph_bytes(model)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        if is_small(tensor):
            total -= _bytes(value, tensor) if id(value) in own else 0
        elif id(value) not in own:
            half = value.name in halved or (
                target.half_constants and tensor.dtype == onnx_ir.DataType.FLOAT
            )
            total += _bytes(value, tensor, half=half)
    return total


def _weights(node: onnx_ir.Node, target: Target) -> list[onnx_ir.Value]:
    row = weight_row(node, target)
    found = (weight_source(node.inputs[index]) for index in row.weights) if row else ()
    return [value for value in found if value is not None]


def _bytes(value: onnx_ir.Value, tensor: TensorProtocol, *, half: bool = False) -> int:
    shape, name = tuple(tensor.shape.numpy()), len(value.name or "")
    if not half:
        return tensor_bytes(shape, tensor.nbytes, name)
    return half_bytes(shape, name)


def _graph_bytes(model: Model) -> int:
    """The protobuf without large weights, as bare as a file that is emitted."""
    bare = model.clone()
    kept = {id(v) for v in (*bare.graph.inputs, *bare.graph.outputs)}
    for node in bare.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            if id(value) not in kept:
                value.shape, value.type = None, None
    large = [
        value.name or ""
        for value in bare.graph.initializers.values()
        if value.const_value is not None and not is_small(value.const_value)
    ]
    proto = without_weights(bare.ir)
    inputs = {value.name: value for value in proto.graph.input}
    stand_ins: int = sum(inputs[name].ByteSize() + 3 for name in large)
    return int(proto.ByteSize()) - stand_ins
