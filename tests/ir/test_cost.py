"""Analytic and measured costs against arithmetic done by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx.parser
import pytest

from octavo.backends.ort_target import ORT_CPU
from octavo.ir.cost import AnalyticCost, MeasuredCost
from octavo.ir.facts import Latencies, Option
from octavo.ir.quant import PerAxis, QuantSpec
from octavo.ir.read import read

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.model import Model

CALL, MACS, BYTES = 1e-6, 40e9, 8e9


def model_of(signature: str, call: str, weights: str = "") -> Model:
    """One node called `n`; weights become ones, so that target rows apply to them."""
    header = '<ir_version: 10, opset_import: ["" : 21]> g'
    declared = f"<{weights}>" if weights else ""
    proto = onnx.parser.parse_model(f"{header} {signature} {declared} {{ [n] y = {call} }}")
    for info in proto.graph.value_info:
        dims = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        size = 1
        for dim in dims:
            size *= dim
        ones = onnx.helper.make_tensor(info.name, onnx.TensorProto.FLOAT, dims, [1.0] * size)
        proto.graph.initializer.append(ones)
    del proto.graph.value_info[:]
    return read(proto)


def node_of(model: Model) -> onnx_ir.Node:
    return next(node for node in model.graph if node.name == "n")


CASES = {
    "conv": ("(float[2,4,8,8] x) => (float[2,6,6,6] y)", "Conv (x, w)", "float[6,4,3,3] w",
             2 * 6 * 6 * 6 * 4 * 9),
    "grouped": ("(float[2,4,8,8] x) => (float[2,4,6,6] y)", "Conv <group = 4> (x, w)",
                "float[4,1,3,3] w", 2 * 4 * 6 * 6 * 9),
    "deconv": ("(float[1,4,5,5] x) => (float[1,6,6,6] y)", "ConvTranspose (x, w)",
               "float[4,6,2,2] w", 4 * 25 * 6 * 4),
    "matmul": ("(float[3,5,7] x) => (float[3,5,9] y)", "MatMul (x, w)", "float[7,9] w",
               3 * 5 * 7 * 9),
    "gemm": ("(float[5,7] x) => (float[5,9] y)", "Gemm <transB = 1> (x, w)", "float[9,7] w",
             5 * 7 * 9),
    "batched": ("(float[2,5,7] x, float[2,7,9] z) => (float[2,5,9] y)", "MatMul (x, z)", "",
                2 * 5 * 7 * 9),
    "lstm": ("(float[6,2,3] x) => (float[6,1,2,4] y)", "LSTM <hidden_size = 4> (x, w, r)",
             "float[1,16,3] w, float[1,16,4] r", 6 * 2 * 16 * (3 + 4)),
    "add": ("(float[5,7] x) => (float[5,7] y)", "Add (x, x)", "", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_multiply_accumulates(name: str) -> None:
    signature, call, weights, macs = CASES[name]
    node = node_of(model_of(signature, call, weights))
    assert AnalyticCost(ORT_CPU).macs(node) == macs


def test_float_seconds_are_a_call_the_products_and_the_moved_activations() -> None:
    signature, call, weights, macs = CASES["matmul"]
    node = node_of(model_of(signature, call, weights))
    moved = 4 * (3 * 5 * 7 + 3 * 5 * 9)
    expected = CALL + macs / MACS + moved / BYTES
    cost = AnalyticCost(ORT_CPU)
    assert cost.seconds(node, "float") == pytest.approx(expected, rel=1e-12)
    assert cost.seconds(node, "storage") == cost.seconds(node, "float")
    row = ORT_CPU.support(node, "static").row
    assert row is not None
    assert cost.seconds(node, "static") == pytest.approx(expected * row.speed, rel=1e-12)


def test_a_dynamic_kernel_also_quantizes_its_input() -> None:
    signature, call, weights, _ = CASES["matmul"]
    node = node_of(model_of(signature, call, weights))
    cost, row = AnalyticCost(ORT_CPU), ORT_CPU.support(node, "dynamic").row
    float_seconds, operand = cost.seconds(node, "float"), node.inputs[0]
    assert row is not None
    assert float_seconds is not None
    assert operand is not None
    border = CALL + 4 * 3 * 5 * 7 / BYTES
    assert cost.boundary_seconds(operand) == pytest.approx(border, rel=1e-12)
    expected = float_seconds * row.speed + border
    assert cost.seconds(node, "dynamic") == pytest.approx(expected, rel=1e-12)


def test_an_option_costs_what_its_method_does() -> None:
    signature, call, weights, macs = CASES["matmul"]
    model = model_of(signature, call, weights)
    node, spec = node_of(model), QuantSpec("s4", PerAxis(1), symmetric=True)
    analytic = AnalyticCost(ORT_CPU)
    static, stored = Option("static", spec), Option("storage", spec)
    assert analytic.option_seconds(node, static) == analytic.seconds(node, "static")
    assert analytic.option_seconds(node, stored) == analytic.seconds(node, "float")
    cost = measured(model, {"n": {"float": 3e-5, "static": 1e-5}})
    assert cost.option_seconds(node, static) == 1e-5
    assert cost.option_seconds(node, stored) == 3e-5
    assert cost.macs(node) == macs


def test_a_kernel_that_does_not_exist_has_no_cost() -> None:
    node = node_of(model_of("(float[2] x) => (float[2] y)", "Tanh (x)"))
    cost = AnalyticCost(ORT_CPU)
    assert cost.seconds(node, "static") is None
    assert cost.seconds(node, "dynamic") is None
    assert cost.option_seconds(node, Option("static")) is None
    assert cost.source == "analytic"


def test_sizes_stand_in_for_symbolic_dimensions() -> None:
    node = node_of(model_of("(float[N,7] x) => (float[N,9] y)", "MatMul (x, w)", "float[7,9] w"))
    assert AnalyticCost(ORT_CPU).macs(node) == 7 * 9
    assert AnalyticCost(ORT_CPU, {"x": 70, "y": 90}).macs(node) == 10 * 7 * 9


def measured(model: Model, by_node: dict[str, dict[str, float]]) -> MeasuredCost:
    latencies = Latencies(by_node, 2e-10, 4e-10, "this machine")
    return MeasuredCost.of(model, latencies, AnalyticCost(ORT_CPU))


def test_measured_seconds_win() -> None:
    signature, call, weights, _ = CASES["matmul"]
    model = model_of(signature, call, weights)
    cost = measured(model, {"n": {"float": 3e-5, "static": 1e-5}})
    node = node_of(model)
    assert cost.seconds(node, "float") == cost.seconds(node, "storage") == 3e-5
    assert cost.seconds(node, "static") == 1e-5
    assert cost.source == "measured on this machine"


def test_an_unmeasured_kernel_scales_with_its_own_float_seconds() -> None:
    signature, call, weights, _ = CASES["matmul"]
    model = model_of(signature, call, weights)
    node, analytic = node_of(model), AnalyticCost(ORT_CPU)
    float_seconds, static = analytic.seconds(node, "float"), analytic.seconds(node, "static")
    assert float_seconds is not None
    assert static is not None
    cost = measured(model, {"n": {"float": 10 * float_seconds}})
    assert cost.seconds(node, "static") == pytest.approx(10 * static, rel=1e-12)


def test_an_unmeasured_node_scales_with_the_median() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[8] x) => (float[8] y) {
        [a] t = Exp (x) [b] u = Exp (t) [c] v = Exp (u) [d] y = Exp (v) }"""
    model = read(onnx.parser.parse_model(text))
    own = AnalyticCost(ORT_CPU).seconds(model.graph[0], "float")
    assert own is not None
    cost = measured(model, {"a": {"float": own}, "b": {"float": 3 * own}, "c": {"float": 9 * own}})
    assert cost.seconds(model.graph[3], "float") == pytest.approx(3 * own, rel=1e-12)
    assert measured(model, {}).seconds(model.graph[3], "float") == own


def test_a_border_costs_the_measured_rates() -> None:
    model = model_of("(float[100] x) => (float[100] y)", "Exp (x)")
    cost = measured(model, {})
    expected = CALL + 4 * 100 * 3e-10
    assert cost.boundary_seconds(model.graph.inputs[0]) == pytest.approx(expected, rel=1e-12)
