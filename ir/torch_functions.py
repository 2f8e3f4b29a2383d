"""The bodies of operators that ONNX defines by a function of other operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir

if TYPE_CHECKING:
    import onnx


def function_of(node: onnx_ir.Node, model: onnx_ir.Model) -> onnx_ir.Function | None:
    """The function that a node of the standard domain calls, None where ONNX has none.

    Its attributes hold ONNX's defaults.
    """
    import onnx

    opset = model.opset_imports.get("", 0)
    if node.domain or not onnx.defs.has(node.op_type):
        return None
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    body = _body(node, schema)
    if body is None:
        return None
    made = {name for inner in body.node for name in inner.output} | set(body.input)
    # ONNX leaves out what computes an output that the call does not name.
    names = [name if name in made else body.output[0] for name in body.output]
    body.output[:] = names
    function = onnx_ir.serde.deserialize_function(body)
    for name, attribute in schema.attributes.items():
        if attribute.default_value.name:
            function.attributes[name] = onnx_ir.serde.deserialize_attribute(attribute.default_value)
    return function


def _body(node: onnx_ir.Node, schema: Any) -> onnx.FunctionProto | None:
    import onnx

    if schema.has_function:
        copy = onnx.FunctionProto()
        copy.CopyFrom(schema.function_body)
        return copy
    if not schema.has_context_dependent_function:
        return None
    known = [onnx_ir.to_proto(v).type if v is not None else onnx.TypeProto() for v in node.inputs]
    types = [proto.SerializeToString() for proto in known]
    content = schema.get_context_dependent_function(
        onnx_ir.to_proto(node).SerializeToString(), types
    )
    body = onnx.FunctionProto()
    body.ParseFromString(content)
    return body if content else None
