"""What `round-gptq` leaves in the graph: better layers, exact grids, and reasons."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.ir.facts import Choice, Option, Plan
from octavo.ir.menu import Menu
from octavo.ir.moments import shrunk
from octavo.ir.quant import (
    PerAxis,
    PerBlock,
    QuantParams,
    QuantSpec,
    dequantize,
)
from octavo.ir.read import read
from octavo.models import shipped
from octavo.passes.pipeline import Pipeline
from octavo.passes.weight_quantizers import weight_quantizers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.pipeline import Compilation

    Weights = Mapping[str, NDArray[np.float32]]

_TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N,24] x) => (float[N,6] z) <float[24,16] w = {0}, float[16,6] v = {0}> {
    [one] a = MatMul (x, w) b = Relu (a) [two] y = MatMul (b, v) z = Tanh (y) }"""
COLUMNS = QuantSpec("s3", PerAxis(1), symmetric=True)


def model_of(weights: Weights) -> Model:
    proto = onnx.parser.parse_model(_TEXT)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
    return read(proto)


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


WEIGHTS = {"w": normal(0, 24, 16), "v": normal(1, 16, 6)}


def planned(model: Model, spec: QuantSpec = COLUMNS) -> Model:
    option = Option("storage", spec)
    return model.with_fact(Plan(dict.fromkeys(("one", "two"), Choice(option, "")), "test"))


def correlated(ctx: PassContext) -> PassContext:
    """The same data with inputs that depend on each other, as those of real layers do."""
    assert ctx.calibration is not None
    mix = normal(9, 24, 24) * np.linspace(0.1, 1, 24, dtype=np.float32)
    feeds = tuple({"x": np.asarray(feed["x"] @ mix, np.float32)} for feed in ctx.calibration)
    return replace(ctx, calibration=replace(ctx.calibration, feeds=feeds))  # type: ignore[type-var]


def compiled(model: Model, ctx: PassContext, text: str) -> Compilation:
    return Pipeline.parse(f"insert-fake-quant,{text}").run(model, ctx)


def outputs(model: Model, ctx: PassContext) -> NDArray[np.float64]:
    assert ctx.calibration is not None
    found = [ctx.evaluator.run(model, feed)["z"] for feed in ctx.calibration]
    return np.concatenate(found).astype(np.float64)


@pytest.mark.parametrize(
    "spec", [COLUMNS, QuantSpec("s4", PerBlock(0, 8), symmetric=True)], ids=str
)
@pytest.mark.parametrize("options", ["", "{sequential=true}", "{act-order=false,refit=false}"])
def test_outputs_come_closer(
    calibrated: Callable[..., PassContext], spec: QuantSpec, options: str
) -> None:
    model = planned(model_of(WEIGHTS), spec)
    ctx = correlated(calibrated(model, free_dimension=40))
    truth = outputs(model, ctx)
    nearest = compiled(model, ctx, "collect-moments").model
    made = compiled(model, ctx, f"round-gptq{options}")
    errors = [np.square(outputs(m, ctx) - truth).sum() for m in (nearest, made.model)]
    assert errors[1] < errors[0]
    remarks = made.records[-1].remarks
    assert [(r.kind, r.where) for r in remarks] == [
        ("applied", "w_storage"), ("applied", "v_storage")
    ]  # fmt: skip
    assert all(0 < r.values["after"] < r.values["before"] for r in remarks)  # type: ignore[operator]


def test_the_errors_it_reports_are_those_of_the_layer(
    calibrated: Callable[..., PassContext],
) -> None:
    """Relative squared error of W·x for x as the samples let expect, computed with numpy."""
    model = planned(model_of(WEIGHTS))
    ctx = calibrated(model, free_dimension=40)
    made = compiled(model, ctx, "round-gptq")
    quantizer = next(weight_quantizers(made.model))
    assert ctx.calibration is not None
    x = np.concatenate([feed["x"] for feed in ctx.calibration]).astype(np.float64)
    second = shrunk((x.T @ x / len(x)).astype(np.float32)[None], len(x))[0].astype(np.float64)
    left = WEIGHTS["w"] - quantizer.rounded()
    after = np.trace(left.T @ second @ left) / np.trace(WEIGHTS["w"].T @ second @ WEIGHTS["w"])
    reported = made.records[-1].remarks[0].values["after"]
    assert reported == pytest.approx(after, rel=1e-3)


def test_sequential_makes_up_for_earlier_layers(calibrated: Callable[..., PassContext]) -> None:
    """Over several models, as one may be rounded well by chance."""
    errors = np.zeros(2)
    for seed in range(0, 20, 2):
        model = planned(model_of({"w": normal(seed, 24, 16), "v": normal(seed + 1, 16, 6)}))
        ctx = correlated(calibrated(model, free_dimension=60))
        truth = outputs(model, ctx)
        for at, text in enumerate(("round-gptq", "round-gptq{sequential=true}")):
            made = compiled(model, ctx, text).model
            errors[at] += np.square(outputs(made, ctx) - truth).sum()
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("bits", [2, 3])
def test_a_weight_on_a_grid_stays_exactly(
    calibrated: Callable[..., PassContext], bits: int
) -> None:
    """Codes of fewer bits than the plan gives, with scales that are not those of the range."""
    limit = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(2).integers(-limit, limit + 1, (24, 16)).astype(np.int8)
    scale = np.linspace(0.1, 0.7, 16, dtype=np.float32)
    grid = QuantParams(COLUMNS, scale, np.zeros(16, np.int32))
    weights = {**WEIGHTS, "w": dequantize(codes, grid)}
    model = planned(model_of(weights), QuantSpec("s4", PerAxis(1), symmetric=True))
    made = compiled(model, calibrated(model), "round-gptq")
    quantizer = next(weight_quantizers(made.model))
    np.testing.assert_array_equal(quantizer.rounded(), weights["w"])
    kinds = {r.where: r.kind for r in made.records[-1].remarks}
    assert kinds == {"w_storage": "note", "v_storage": "applied"}


def test_rounding_twice_is_no_worse(calibrated: Callable[..., PassContext]) -> None:
    model = planned(model_of(WEIGHTS))
    ctx = calibrated(model, free_dimension=40)
    once = compiled(model, ctx, "collect-moments,round-gptq")
    again = Pipeline.parse("round-gptq").run(once.model, ctx)
    first, second = (c.records[-1].remarks for c in (once, again))
    for a, b in zip(first, second, strict=True):
        assert a.where == b.where
        kept = b.values["after" if b.kind == "applied" else "before"]
        assert kept <= a.values["after"] * (1 + 1e-5)  # type: ignore[operator]


def test_no_data_is_a_note(pass_context: PassContext) -> None:
    model = planned(model_of(WEIGHTS))
    made = compiled(model, pass_context, "round-gptq")
    assert [r.kind for r in made.records[-1].remarks] == ["note"]
    assert made.records[-1].status == "unchanged"


@pytest.mark.parametrize("kind", ["resnet", "vit", "mobile", "lstm"])
def test_no_layer_of_a_real_model_is_worse(
    kind: str, calibrated: Callable[..., PassContext]
) -> None:
    model = read(shipped(f"fashion-{kind}"))
    ctx = calibrated(model, free_dimension=4)
    text = "canonicalize,offer-options{bits=4,static=false,dynamic=false,float16=false}"
    offered = Pipeline.parse(text).run(model, ctx).model
    offers = [offers[-1] for offers in offered.fact(Menu).offers.values()]
    options = {node: Choice(o, "") for offer in offers for node, o in offer.options.items()}
    made = compiled(offered.with_fact(Plan(options, "test")), ctx, "round-gptq")
    errors = [r.values for r in made.records[-1].remarks if "after" in r.values]
    assert len(errors) >= 4
    assert all(e["after"] <= e["before"] for e in errors)  # type: ignore[operator]
    better = [e["after"] / e["before"] for e in errors]  # type: ignore[operator]
    assert np.mean(better) < 0.7
