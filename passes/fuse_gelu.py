"""Recognise the decomposed Gelu, so that no quantizer is placed inside it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx_ir

from octavo.passes.integer_forms import substitute
from octavo.passes.rewrite import is_op, only_reader, scalar

if TYPE_CHECKING:
    from octavo.passes.rewrite import Rewrite

_GELU_OPSET = 20


def fuse_gelu(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """`0.5·x·(1 + erf(x/√2))` in any order of its products is one Gelu, from its Erf on.

    Exact but for the rounding of the products (Hendrycks and Gimpel 2016, section 2).
    """
    found = _match(node)
    if found is None or rewrite.model.ir.opset_imports.get("", 0) < _GELU_OPSET:
        return False
    x, last = found
    substitute(last, "Gelu", [x], {})
    return rewrite.done("gelu-fused", last, "decomposed Gelu")


def _match(erf: onnx_ir.Node) -> tuple[onnx_ir.Value, onnx_ir.Node] | None:
    """The Gelu's input and its last node, or `None`."""
    scaled = _producer(erf.inputs[0], "Div", "Mul")
    x = _scaled_input(scaled) if scaled is not None else None
    plus = _reader(erf, "Add")
    product = _reader(plus, "Mul") if plus is not None else None
    if scaled is None or x is None or plus is None or product is None:
        return None
    if not _is(_other(plus, erf.outputs[0]), 1.0):
        return None
    other = _other(product, plus.outputs[0])
    halved = _producer(other, "Mul", "Div")
    if halved is not None and _halves(halved, x) and len(halved.outputs[0].uses()) == 1:
        return x, product
    last = _reader(product, "Mul", "Div")
    if other is x and last is not None and _halves(last, product.outputs[0]):
        return x, last
    return None


def _scaled_input(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """`x` of `x / √2` or `x · √½`."""
    a, b = node.inputs
    if node.op_type == "Div":
        return a if _is(b, math.sqrt(2)) else None
    return a if _is(b, math.sqrt(0.5)) else b if _is(a, math.sqrt(0.5)) else None


def _halves(node: onnx_ir.Node, value: onnx_ir.Value) -> bool:
    a, b = node.inputs
    if node.op_type == "Div":
        return a is value and _is(b, 2.0)
    return (a is value and _is(b, 0.5)) or (b is value and _is(a, 0.5))


def _is(value: onnx_ir.Value | None, number: float) -> bool:
    found = scalar(value)
    return found is not None and math.isclose(found, number, rel_tol=1e-4)


def _producer(value: onnx_ir.Value | None, *op_types: str) -> onnx_ir.Node | None:
    node = value.producer() if value is not None else None
    return node if is_op(node, *op_types) else None


def _reader(node: onnx_ir.Node, *op_types: str) -> onnx_ir.Node | None:
    reader = only_reader(node.outputs[0])
    return reader if is_op(reader, *op_types) else None


def _other(node: onnx_ir.Node, value: onnx_ir.Value) -> onnx_ir.Value | None:
    return next((v for v in node.inputs if v is not value), None)
