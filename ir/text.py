"""A model as ONNX's own text, with big tensors replaced by their digests."""

from __future__ import annotations

import onnx
import onnx_ir

from octavo.ir.model import tensor_sha256

_LARGEST_ELEMENTS = 16


def model_text(model: onnx_ir.Model, *, largest_elements: int = _LARGEST_ELEMENTS) -> str:
    """ONNX text of a model; `onnx.parser` reads it back.

    A tensor of more than `largest_elements` prints as external data whose location is
    `sha256:…` of its dtype, shape and bytes: two dumps differ where any weight differs.
    """
    own = model.clone()
    for graph in (own.graph, *own.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _abbreviated(value.const_value, largest_elements)
        for node in graph:
            for name, attribute in node.attributes.items():
                if attribute.type == onnx_ir.AttributeType.TENSOR and not attribute.is_ref():
                    tensor = _abbreviated(attribute.as_tensor(), largest_elements)
                    node.attributes[name] = onnx_ir.AttrTensor(name, tensor)
    return onnx.printer.to_text(onnx_ir.to_proto(own)) + "\n"


def _abbreviated(tensor: onnx_ir.TensorProtocol, largest_elements: int) -> onnx_ir.TensorProtocol:
    if tensor.size <= largest_elements or tensor.dtype == onnx_ir.DataType.STRING:
        return tensor
    return onnx_ir.ExternalTensor(
        f"sha256:{tensor_sha256(tensor)}",
        offset=0,
        length=tensor.nbytes,
        dtype=tensor.dtype,
        shape=onnx_ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
    )
