"""The protobuf form of a model without its large weights: what ONNX's own C++ code gets to see.

ONNX's checker, inference and converter serialize the model they are given, which takes seconds
for large weights and ends at 2 GB. None of them reads the numbers in a large tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx
    from onnx_ir import TensorProtocol

_SMALL_BYTES = 1024
_IR_VERSION = 10


def is_small(tensor: TensorProtocol) -> bool:
    """Whether a tensor may hold shapes or axes, which inference has to see."""
    return tensor.dtype == onnx_ir.DataType.STRING or tensor.nbytes <= _SMALL_BYTES


def without_weights(model: onnx_ir.Model) -> onnx.ModelProto:
    """The model with the large initializers of its main graph turned into graph inputs."""
    large = [
        (v, v.const_value)
        for v in model.graph.initializers.values()
        if v.const_value is not None and not is_small(v.const_value)
    ]
    for value, tensor in large:
        shape = onnx_ir.Shape(tensor.shape.numpy())
        value.const_value = onnx_ir.ExternalTensor(
            "weights", 0, 0, tensor.dtype, shape=shape, name=value.name or ""
        )
    try:
        proto = onnx_ir.to_proto(model)
    finally:
        for value, tensor in large:
            value.const_value = tensor
    proto.ir_version = max(_IR_VERSION, proto.ir_version)
    _make_inputs(proto.graph)
    return proto


def broken_rule(proto: onnx.ModelProto) -> str:
    """What ONNX's checker says against a model, empty if nothing; unknown types are allowed."""
    import onnx

    patched = onnx.ModelProto()
    patched.CopyFrom(proto)
    for graph in graphs(patched.graph):
        # The checker wants types and ranks of outputs, and ranks of inputs; runtimes do not.
        del graph.value_info[:]
        for value in graph.output:
            if not value.type.WhichOneof("value"):
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        for value in (*graph.input, *graph.output):
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(patched)
    except onnx.checker.ValidationError as error:
        return str(error).split("\n==> Context")[0][:300]
    return ""


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and everything nested in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs(inner)


def _make_inputs(graph: onnx.GraphProto) -> None:
    kept = [t for t in graph.initializer if not t.external_data]
    for tensor in graph.initializer:
        if tensor.external_data:
            kind = graph.input.add(name=tensor.name).type.tensor_type
            kind.elem_type = tensor.data_type
            kind.shape.SetInParent()
            for dim in tensor.dims:
                kind.shape.dim.add(dim_value=dim)
    del graph.initializer[:]
    graph.initializer.extend(kept)
