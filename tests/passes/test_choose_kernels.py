"""Which option each node gets, by costs that a test sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from octavo.ir.errors import UsageError
from octavo.ir.facts import Plan
from octavo.ir.read import read
from octavo.models import shipped
from octavo.passes.choose_kernels import ChooseKernels
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.facts import Method
    from octavo.ir.model import Model
    from octavo.ir.target import Target
    from octavo.passes.base import PassContext
    from octavo.passes.pipeline import Compilation

Calibrated = Callable[..., "PassContext"]

_MLP = """mlp (float[4,64] x) => (float[4,64] y) <float[64,64] w1, float[64] b1, float[64,64] w2> {
    [up] a = MatMul (x, w1) [bias] b = Add (a, b1) [act] r = Relu (b)
    [tanh] t = Tanh (r) [down] y = MatMul (t, w2) }"""
_CNN = """cnn (float[1,16,8,8] x) => (float[1,16,8,8] y)
    <float[16,16,3,3] w1, float[16,16,3,3] w2, float[16,16,3,3] w3> {
    [one] a = Conv <pads = [1,1,1,1]> (x, w1) [relu] r = Relu (a)
    [two] b = Conv <pads = [1,1,1,1]> (r, w2) [sum] s = Add (r, b)
    [three] c = ConvTranspose <pads = [1,1,1,1]> (s, w3) [exp] y = Exp (c) }"""
_LSTM = """rnn (float[5,2,16] x) => (float[5,1,2,16] y) <float[1,64,16] w, float[1,64,16] r> {
    [lstm] h = LSTM <hidden_size = 16> (x, w, r) [exp] y = Exp (h) }"""


def built(text: str) -> Model:
    """A model whose weights are drawn by name."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    for info in proto.graph.value_info:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        array = np.random.default_rng([*info.name.encode()]).standard_normal(shape)
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), info.name))
    del proto.graph.value_info[:]
    return read(proto)


@dataclass(frozen=True)
class Costs:
    """Seconds by method, for every node or for one (`conv.static`); 1 where nothing is said."""

    target: Target
    given: Mapping[str, float] = field(default_factory=dict)
    source: str = "test"

    def seconds(self, node: onnx_ir.Node, method: Method) -> float | None:
        if method not in ("float", "storage") and self.target.support(node, method).row is None:
            return None
        own = f"{node.name}.{method}"
        return self.given.get(own, self.given.get(method, 1.0))

    def boundary_seconds(self, value: onnx_ir.Value) -> float:
        return self.given.get("boundary", 0.1)


def planned(
    model: Model, ctx: PassContext, costs: Mapping[str, float], options: str = ""
) -> tuple[Plan, Compilation]:
    """The plan, with ranges where the context has calibration data."""
    own = replace(ctx, cost=Costs(ctx.target, costs))
    found = Pipeline.parse(f"calibrate,choose-kernels{options}").run(model, own)
    return found.model.fact(Plan), found


def methods(plan: Plan) -> dict[str, str]:
    return {name: choice.option.method for name, choice in plan.by_node.items()}


def test_cheap_integer_kernels_are_all_taken(calibrated: Calibrated) -> None:
    model = built(_CNN)
    plan, _ = planned(model, calibrated(model), {"static": 0.1})
    assert methods(plan) == {"one": "static", "two": "static", "sum": "static", "three": "storage"}
    assert str(plan.by_node["one"].option) == "static:s8/axis0"
    assert str(plan.by_node["sum"].option) == "static"
    assert plan.by_node["one"].seconds == {"float": 1.0, "static": 0.1}
    assert plan.source == "test"


def test_a_border_must_pay_for_itself(calibrated: Calibrated) -> None:
    """What a region saves has to outweigh quantizing at its border."""
    model = built(_CNN)
    plan, _ = planned(model, calibrated(model), {"static": 0.1, "boundary": 2.0})
    assert methods(plan)["one"] == "storage"
    assert plan.by_node["one"].reason == "slower as an integer kernel here"


def test_a_slow_kernel_stays_float_at_the_end_of_a_region(calibrated: Calibrated) -> None:
    model = built(_CNN)
    plan, _ = planned(model, calibrated(model), {"static": 0.1, "sum.static": 5.0})
    assert methods(plan) == {"one": "static", "two": "static", "sum": "float", "three": "storage"}


def test_a_slow_kernel_inside_a_region_runs_along(calibrated: Calibrated) -> None:
    """Leaving and entering again would cost more."""
    model = built(_CNN)
    plan, _ = planned(model, calibrated(model), {"static": 0.1, "two.static": 1.1, "boundary": 0.2})
    assert methods(plan)["two"] == "static"


def test_without_ranges_nothing_is_static(pass_context: PassContext) -> None:
    model = built(_MLP)
    plan, found = planned(model, pass_context, {"dynamic": 0.1})
    assert methods(plan) == {"up": "dynamic", "down": "dynamic"}
    remarks = [remark.text for remark in found.records[-1].remarks]
    assert remarks == ["no calibrated ranges: no static integer kernels"]
    assert plan.by_node["up"].reason == "no calibrated range"


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ("", "dynamic"),
        ("{dynamic=false}", "storage"),
        ("{dynamic=false,storage=false}", "float"),
        ("{weight-only=true}", "weight-only"),
        # 64 rows are no whole blocks of 48.
        ("{weight-only=true,block-size=48}", "storage"),
    ],
)
def test_options_without_data(pass_context: PassContext, options: str, method: str) -> None:
    model = built(_MLP)
    costs = {"dynamic": 0.1, "weight-only": 0.1}
    plan, _ = planned(model, pass_context, costs, options)
    assert set(methods(plan).values()) == {method}


def test_an_output_layer_has_to_save_more(pass_context: PassContext) -> None:
    """Three percent of the whole model, which is five nodes of one second."""
    model = built(_MLP)
    for saved, method in ((0.1, "storage"), (0.3, "dynamic")):
        plan, _ = planned(model, pass_context, {"dynamic": 1 - saved})
        assert methods(plan) == {"up": "dynamic", "down": method}


def test_blocks_of_few_bits_need_no_more_at_the_output(pass_context: PassContext) -> None:
    """Four bits lose as much in storage, and a table that is tied to the head is stored once."""
    for bits, method in ((8, "storage"), (4, "weight-only")):
        options = f"{{weight-only=true,bits={bits}}}"
        plan, _ = planned(built(_MLP), pass_context, {"weight-only": 0.9}, options)
        assert methods(plan) == {"up": "weight-only", "down": method}


@pytest.mark.parametrize(("options", "method"), [("", "storage"), ("{recurrent=true}", "dynamic")])
def test_recurrent_kernels_are_asked_for(
    pass_context: PassContext, options: str, method: str
) -> None:
    plan, _ = planned(built(_LSTM), pass_context, {"dynamic": 0.1}, options)
    assert methods(plan) == {"lstm": method}
    assert str(plan.by_node["lstm"].option) == f"{method}:s8/block0@2"


def test_kept_nodes_are_float_and_say_by_which_pattern(calibrated: Calibrated) -> None:
    model = built(_CNN)
    ctx = calibrated(model)
    plan, _ = planned(model, ctx, {"static": 0.1}, "{keep-float=two;type:ConvTranspose}")
    assert methods(plan)["two"] == methods(plan)["three"] == "float"
    assert plan.by_node["two"].reason == "kept float by 'two'"
    assert plan.by_node["three"].reason == "kept float by 'type:ConvTranspose'"
    assert methods(plan)["one"] == "static"


def test_a_kept_activation_keeps_its_chain(calibrated: Calibrated) -> None:
    model = built(_CNN)
    plan, _ = planned(model, calibrated(model), {"static": 0.1}, "{keep-float=relu}")
    assert methods(plan)["one"] == "storage"


def test_a_pattern_without_a_match_is_an_error(pass_context: PassContext) -> None:
    with pytest.raises(UsageError, match="selects no node"):
        planned(built(_MLP), pass_context, {}, "{keep-float=upp}")


def test_tiny_weights_are_left_alone(pass_context: PassContext) -> None:
    text = """tiny (float[1,4] x) => (float[1,4] y) <float[4,4] w> {
        [mm] m = MatMul (x, w) [exp] y = Exp (m) }"""
    plan, _ = planned(built(text), pass_context, {})
    assert methods(plan) == {"mm": "float"}
    assert plan.by_node["mm"].reason.endswith("too few weights to shrink")


def test_a_missing_kernel_is_the_reason(calibrated: Calibrated) -> None:
    model = built(_CNN)
    plan, _ = planned(model, calibrated(model), {"static": 0.1})
    assert plan.by_node["three"].reason.startswith("onnxruntime has no integer kernel for it")


def test_shared_weights_are_stored_for_all_or_none(pass_context: PassContext) -> None:
    text = """shared (float[1,64] x) => (float[1,64] y) <float[64,64] w> {
        [one] a = MatMul (x, w) [act] b = Exp (a) [two] c = MatMul (b, w)
        [mul] d = Mul (c, c) [end] y = Exp (d) %s }"""
    costs = {"dynamic": 9.0}
    plan, _ = planned(built(text % ""), pass_context, costs)
    assert methods(plan) == {"one": "storage", "two": "storage"}
    kept = built(text % "[other] z = Neg (w)")
    kept.graph.outputs.append(kept.graph[-1].outputs[0])
    plan, _ = planned(kept, pass_context, costs)
    assert methods(plan) == {"one": "float", "two": "float"}
    assert "needed in float elsewhere" in plan.by_node["one"].reason


def test_it_asks_for_the_ranges_kernels_need_and_changes_nothing(calibrated: Calibrated) -> None:
    model = built(_CNN)
    ctx = calibrated(model)
    (chooser,) = Pipeline.parse("choose-kernels").passes
    asked = [statistic.value for statistic in chooser.statistics(model, ctx)]
    assert asked == ["x", "r", "b", "s"]
    (dynamic,) = Pipeline.parse("choose-kernels{static=false}").passes
    assert dynamic.statistics(model, ctx) == ()
    _, found = planned(model, ctx, {})
    assert found.model.fingerprint == model.fingerprint
    plan = found.model.fact(Plan)
    assert found.records[-1].counters == dict(sorted(Counter(methods(plan).values()).items()))


@pytest.mark.parametrize("bits", [0, 9])
def test_weights_of_no_such_width_are_refused(bits: int, pass_context: PassContext) -> None:
    with pytest.raises(UsageError, match=f"weights of {bits} bits"):
        Pipeline((ChooseKernels(bits=bits),)).run(read(shipped("fashion-mobile")), pass_context)


def test_few_bits_change_the_file_and_not_the_kernels(
    calibrated: Callable[..., PassContext],
) -> None:
    model = read(shipped("fashion-resnet"))
    ctx = calibrated(model)
    plans = [
        Pipeline.parse(f"canonicalize,calibrate,choose-kernels{{bits={bits}}}").run(model, ctx)
        for bits in (8, 4)
    ]
    eight, four = (found.model.fact(Plan).by_node for found in plans)
    assert {n: c.option.method for n, c in eight.items()} == {
        n: c.option.method for n, c in four.items()
    }
    widths = {c.option.weight.bits for c in four.values() if c.option.weight is not None}
    assert widths == {4}


def test_few_bits_are_in_blocks_where_rows_are_several(pass_context: PassContext) -> None:
    """Of fashion-vit, whose projections read 96 or 192 inputs; a shared weight stays as it is."""
    model = read(shipped("fashion-vit"))
    plan = Pipeline.parse("canonicalize,choose-kernels{bits=4}").run(model, pass_context).model
    products = [n for n in plan.graph if n.op_type in ("MatMul", "Gemm") and n.inputs[1]]
    specs = {n.name: plan.fact(Plan).by_node.get(n.name or "") for n in products}
    found = {
        name: choice.option.weight
        for name, choice in specs.items()
        if choice is not None and choice.option.method == "dynamic"
    }
    assert found
    for node in products:
        spec = found.get(node.name)
        if spec is not None:
            rows = node.inputs[1].shape[0] if node.inputs[1].shape is not None else 0
            assert spec.multiples == (rows % 32 == 0 and rows > 32), node.name
    wide = Pipeline.parse("canonicalize,choose-kernels{bits=6}").run(model, pass_context).model
    weights = [c.option.weight for c in wide.fact(Plan).by_node.values()]
    assert not any(w.multiples for w in weights if w is not None)
