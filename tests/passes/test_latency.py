"""Predicted seconds against sums done by hand."""

from __future__ import annotations

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.backends.ort_target import ORT_CPU
from octavo.ir.facts import Choice, Method, Option, Plan
from octavo.ir.latency_table import LatencyTable
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.ir.signature import signature
from octavo.ir.table_cost import TableCost
from octavo.passes.latency import predicted_seconds

# One unit per digit, so that a sum shows what it is made of.
SECONDS: dict[str, dict[str, float]] = {
    "one": {"float": 1.0, "static": 10.0},
    "relu": {"float": 100.0},
    "two": {"float": 1e3, "static": 1e4},
    "tanh": {"float": 1e5},
    "dense": {"float": 1e6, "static": 1e7, "dynamic": 1e8},
}
RATE = 1e9
X, A, C, R = 3 * 8 * 8, 4 * 8 * 8, 5 * 8 * 8, 5


def _border(elements: int) -> float:
    return 1e-6 + 4 * elements * RATE


def _model() -> Model:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[1,3,8,8] x) => (float[1,2] y) {
        [one] a = Conv (x, w)  [relu] b = Relu (a)  [two] c = Conv (b, v)  [tanh] d = Tanh (c)
        [pool] e = ReduceMean <keepdims = 0> (d, axes)  [dense] y = MatMul (e, u) }"""
    proto = onnx.parser.parse_model(text)
    for name, shape in (("w", (4, 3, 1, 1)), ("v", (5, 4, 1, 1)), ("u", (5, 2))):
        array = np.ones(shape, np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    axes = onnx.numpy_helper.from_array(np.array([2, 3]), "axes")
    proto.graph.initializer.append(axes)
    return read(proto)


def _predicted(**methods: Method) -> float:
    model = _model()
    rows = {signature(n, {}): SECONDS.get(n.name or "", {"float": 0.0}) for n in model.graph}
    table = LatencyTable("runtime, processor, 1 thread(s)", rows, RATE, RATE)
    cost = TableCost.of(model, table, ORT_CPU, {"x": np.zeros((1, 3, 8, 8), np.float32)})
    plan = Plan({name: Choice(Option(method), "") for name, method in methods.items()}, "")
    return predicted_seconds(model, plan, cost, ORT_CPU)


@pytest.mark.parametrize(
    ("methods", "nodes", "borders"),
    [
        ({}, 1101101, ()),
        ({"one": "float", "two": "storage"}, 1101101, ()),
        ({"dense": "dynamic"}, 100101101, ()),
        # The Relu is absorbed; its output is handed on as float.
        ({"one": "static"}, 1101010, (X, A)),
        # Codes go from one to the other.
        ({"one": "static", "two": "static"}, 1110010, (X, C)),
        ({"two": "static"}, 1110101, (A, C)),
        # This kernel writes float by itself.
        ({"dense": "static"}, 10101101, (R,)),
        # No such kernel: it runs in float.
        ({"tanh": "static"}, 1101101, ()),
    ],
)
def test_a_plan_takes_its_nodes_and_its_borders(
    methods: dict[str, Method], nodes: float, borders: tuple[int, ...]
) -> None:
    expected = nodes + sum(map(_border, borders))
    assert _predicted(**methods) == pytest.approx(expected, rel=1e-12)
