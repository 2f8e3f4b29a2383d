"""Blocks hold every weight once and meet in single values."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import onnx.parser
import pytest

from octavo.ir.extract import extract
from octavo.ir.read import read
from octavo.models import shipped
from octavo.passes.blocks import blocks
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

_LINEAR = ("Conv", "MatMul", "Gemm", "LSTM")
# A residual with a projection, a mask that lives all along, a second output, and a dead end.
_TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N,4] x, float[N,4] mask) => (float[N,4] y, float[N,4] early)
<float[4,4] w = {0}, float[4,4] v = {0}, float[4,4] p = {0}, float[4,4] u = {0}> {
    [first] a = MatMul (x, w)
    [active] b = Relu (a)
    [left] c = MatMul (b, v)
    [right] d = MatMul (b, p)
    [early] early = Tanh (c)
    [sum] e = Add (c, d)
    [masked] f = Add (e, mask)
    [last] h = MatMul (f, u)
    [end] y = Add (h, mask)
}"""
_WEIGHTS = ("first", "left", "right", "last")


def model_of(text: str) -> Model:
    proto = onnx.parser.parse_model(text)
    for tensor in proto.graph.initializer:
        tensor.ClearField("float_data")
        tensor.float_data.extend([0.5] * 16)
    return read(proto)


def weight_nodes(model: Model) -> list[str]:
    """Linear nodes that read a constant of at least two dimensions."""
    return [
        node.name or ""
        for node in model.graph
        if node.op_type in _LINEAR
        and any(v is not None and v.const_value is not None and len(v.const_value.shape) > 1
                for v in node.inputs)
    ]  # fmt: skip


def test_cuts_before_each_weight_where_one_value_lives() -> None:
    found = blocks(model_of(_TEXT), _WEIGHTS, _WEIGHTS, 1)
    assert [block.weights for block in found] == [("first",), ("left", "right"), ("last",)]
    assert [block.exits for block in found] == [("b",), ("early", "f"), ("y",)]
    assert [set(block.entries) for block in found] == [{"x", "mask"}, {"b", "mask"}, {"f", "mask"}]
    assert [set(block.following) for block in found] == [{"b", "mask"}, {"f", "mask"}, set()]


def test_neighbours_are_joined_up_to_a_number_of_weights() -> None:
    model = model_of(_TEXT)
    joined = {most: [b.weights for b in blocks(model, _WEIGHTS, _WEIGHTS, most)] for most in (3, 4)}
    assert joined[3] == [("first", "left", "right"), ("last",)]
    assert joined[4] == [_WEIGHTS]


def test_a_graph_without_weights_has_no_blocks() -> None:
    assert blocks(model_of(_TEXT), (), (), 4) == ()


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("name", ["fashion-resnet", "fashion-mobile", "fashion-vit"])
def test_every_weight_once_and_one_value_between(
    name: str, most: int, pass_context: PassContext
) -> None:
    """What a block computes needs nothing but its entries, as extracting it shows."""
    source = read(shipped(name))
    model = Pipeline.parse("canonicalize").run(source, pass_context).model
    weights = weight_nodes(model)
    found = blocks(model, weights, weights, most)
    assert [n for block in found for n in block.weights] == weights
    assert len(found) > 1
    inputs = {value.name for value in model.graph.inputs}
    made = {v.name: node for node in model.graph for v in node.outputs}
    for before, block in pairwise(found):
        assert block.entries == before.following
        assert len([n for n in block.entries if n in before.exits]) == 1
    for block in found:
        assert len(block.exits) == 1
        part = extract(model, block.entries, [*block.exits])
        assert {value.name for value in part.graph.inputs} <= {*block.entries}
        assert all(name in inputs or name in made for name in block.entries)
        held = {node.name for node in part.graph}
        assert {*block.weights} <= held
        assert not held & ({*weights} - {*block.weights})
