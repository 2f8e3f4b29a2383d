"""The bodies of operators that ONNX defines by a function of other operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    function = onnx_ir.serde.deserialize_function(body)
    for name, attribute in schema.attributes.items():
        if attribute.default_value.name:
            function.attributes[name] = onnx_ir.serde.deserialize_attribute(attribute.default_value)
    return function


def _body(node: onnx_ir.Node, schema: onnx.defs.OpSchema) -> onnx.FunctionProto | None:
    import onnx

    if schema.has_function:
        return schema.function_body
    if not schema.has_context_dependent_function:
        return None
    types = []
    for value in node.inputs:
        proto = onnx.TypeProto()
        if value is not None and value.type is not None:
            onnx_ir.serde.serialize_type_into(proto, value.type)
        types.append(proto.SerializeToString())
    content = schema.get_context_dependent_function(
        onnx_ir.to_proto(node).SerializeToString(), types
    )
    return onnx.FunctionProto.FromString(content) if content else None
