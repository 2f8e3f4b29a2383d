"""What the speed of a node depends on, as text: the key of a table of latencies."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir

from octavo.ir.constants import constant_behind
from octavo.ir.facts import Option
from octavo.ir.packing import kernel_bits
from octavo.ir.quant import signed_type

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo.ir.shapes import Shape

# Attributes by which an optimizer or an exporter labels a node; no kernel reads them.
_LABELS = ("doc_string", "name")


def signature(node: onnx_ir.Node, shapes: Mapping[str, Shape]) -> str:
    """`Conv{group=1,strides=[2,2]}(float 1x3x8x8, const float 4x3x3x3) -> 1x4x4x4`.

    Equal for nodes that run the same kernel on the same work: names and the values of constants
    do not count. `shapes` gives the sizes of values by name, where the graph declares none.
    """
    attributes = ",".join(
        f"{name}={_attribute(attribute)}"
        for name, attribute in sorted(node.attributes.items())
        if name not in _LABELS
    )
    domain = f"{node.domain}::" if node.domain not in ("", "ai.onnx") else ""
    inputs = ", ".join(_operand(value, shapes) for value in node.inputs)
    outputs = ", ".join(_sizes(value, shapes) for value in node.outputs)
    braced = f"{{{attributes}}}" if attributes else ""
    return f"{domain}{node.op_type}{braced}({inputs}) -> {outputs}"


def option_key(option: Option) -> str:
    """What of an option decides speed: `float`, `static`, `dynamic`, `weight-only:s4/block32@0`.

    Weights of few bits that unpack when the model loads run the kernels of their method; only
    weight-only kernels read the stored form, in their own width.
    """
    if option.method == "storage":
        return "float"
    if option.method != "weight-only" or option.weight is None:
        return option.method
    read = signed_type(kernel_bits(option.weight.bits))
    return str(replace(option, weight=replace(option.weight, dtype=read, index_bits=None)))


def _operand(value: onnx_ir.Value | None, shapes: Mapping[str, Shape]) -> str:
    if value is None:
        return "none"
    kind = "unknown" if value.dtype is None else value.dtype.name.lower()
    constant = "const " if constant_behind(value) is not None else ""
    return f"{constant}{kind} {_sizes(value, shapes)}"


def _sizes(value: onnx_ir.Value, shapes: Mapping[str, Shape]) -> str:
    declared = None if value.shape is None else tuple(value.shape)
    shape = shapes.get(value.name or "", declared)
    if shape is None:
        return "?"
    return "x".join(str(d) if isinstance(d, int) else "?" for d in shape) or "scalar"


def _attribute(attribute: onnx_ir.Attr) -> str:
    """The value in full where it is small; of tensors the shape, of graphs the operators."""
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type == onnx_ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{tensor.dtype.name.lower()} {'x'.join(map(str, tensor.shape))}"
    if attribute.type == onnx_ir.AttributeType.GRAPH:
        return f"graph({' '.join(n.op_type for n in attribute.as_graph())})"
    value = attribute.value
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
