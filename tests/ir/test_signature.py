"""Signatures: equal exactly where the same kernel does the same work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.ir.facts import FLOAT, Option
from octavo.ir.quant import PerAxis, PerBlock, QuantSpec
from octavo.ir.read import read
from octavo.ir.shapes import concrete_elements, concrete_shapes
from octavo.ir.signature import option_key, signature

if TYPE_CHECKING:
    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model

_TEXT = """<ir_version: 10, opset_import: ["" : 21]> g
    (float[N,8] x, float[N,8] k, int64[2] s) => (float[N,4] y, z) {
    [a] p = MatMul (x, w)  [b] q = MatMul (p, v)  [c] r = MatMul (q, u)
    [d] t = Softmax <axis = 1> (r)  [e] y = Softmax <axis = 0> (t)  [f] z = Reshape (y, s)
    [g] o = Mul (x, k)  [h] h = Mul (x, x) }"""
_WEIGHTS = {"w": (8, 8), "v": (8, 8), "u": (8, 4)}


def _model() -> Model:
    proto = onnx.parser.parse_model(_TEXT)
    for seed, (name, shape) in enumerate(_WEIGHTS.items()):
        array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return read(proto)


def _feed(rows: int) -> Feed:
    x = np.zeros((rows, 8), np.float32)
    return {"x": x, "k": x, "s": np.array([-1, 2])}


def _signatures(rows: int) -> dict[str, str]:
    model = _model()
    shapes = concrete_shapes(model, _feed(rows))
    return {node.name or "": signature(node, shapes) for node in model.graph}


def test_a_signature_spells_out_operator_types_and_sizes() -> None:
    found = _signatures(5)
    assert found["a"] == "MatMul(float 5x8, const float 8x8) -> 5x8"
    assert found["d"] == "Softmax{axis=1}(float 5x4) -> 5x4"
    assert found["f"] == "Reshape(float 5x4, int64 2) -> ?x?"


def test_equal_work_has_one_signature() -> None:
    found = _signatures(5)
    # The same sizes with other weights and names; then another width, axis, batch.
    assert found["a"] == found["b"]
    assert len({found[name] for name in "acde"}) == 4
    assert found["a"] != _signatures(6)["a"]
    assert _signatures(5) == found


def test_sizes_of_the_feed_replace_symbols() -> None:
    shapes = concrete_shapes(_model(), _feed(3))
    assert (shapes["x"], shapes["r"], shapes["w"]) == ((3, 8), (3, 4), (8, 8))
    assert shapes["z"] == (None, None)
    sizes = concrete_elements(_model(), _feed(3))
    assert (sizes["x"], sizes["r"], sizes["z"]) == (24, 12, 1)


@pytest.mark.parametrize(
    ("option", "key"),
    [
        (FLOAT, "float"),
        (Option("storage", QuantSpec("s4", PerAxis(0), symmetric=True)), "float"),
        (Option("static"), "static"),
        (Option("static", QuantSpec("s8", PerAxis(0), symmetric=True)), "static"),
        (Option("static", QuantSpec("s2", PerAxis(0), symmetric=True)), "static"),
        (Option("dynamic", QuantSpec("s4", PerAxis(1), symmetric=True)), "dynamic"),
        (Option("weight-only", QuantSpec("s4", PerBlock(0, 32))), "weight-only:s4/block32@0"),
        (Option("weight-only", QuantSpec("s2", PerBlock(1, 128))), "weight-only:s2/block128@1"),
    ],
)
def test_only_weight_only_kernels_depend_on_the_width(option: Option, key: str) -> None:
    assert option_key(option) == key
