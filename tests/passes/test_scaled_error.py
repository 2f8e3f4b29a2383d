"""Layer errors in units of measured damage, and when they stand in for measuring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx.helper
import onnx.numpy_helper
import pytest

from octavo import models
from octavo.ir.menu import Menu, Sensitivity
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.passes.base import PassContext
from octavo.passes.estimators import estimator
from octavo.passes.pipeline import Pipeline
from octavo.passes.scaled_error import scaled_error
from octavo.passes.sensitivity import AnalyseSensitivity

Calibrated = Callable[..., PassContext]
_OFFERS = "canonicalize,offer-options{bits=8;4;3,static=false}"
_DEPTH = 9


def _stack() -> Model:
    """Nine layers; first and last have roles of their own, two others are interpolated."""
    rng = np.random.default_rng(0)
    nodes, constants, value = [], [], "x"
    for k in range(_DEPTH):
        weight = (rng.standard_t(4, (12, 12)) / 5).astype(np.float32)
        constants.append(onnx.numpy_helper.from_array(weight, f"w{k}"))
        nodes.append(onnx.helper.make_node("MatMul", [value, f"w{k}"], [f"a{k}"], f"m{k}"))
        value = "y" if k == _DEPTH - 1 else f"b{k}"
        nodes.append(onnx.helper.make_node("Tanh", [f"a{k}"], [value], f"t{k}"))
    shape = [onnx.helper.make_tensor_value_info(n, 1, [4, 12]) for n in ("x", "y")]
    graph = onnx.helper.make_graph(nodes, "stack", shape[:1], shape[1:], constants)
    opsets = [onnx.helper.make_opsetid("", 21)]
    return read(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))


def test_a_measured_layer_has_its_measured_damage(
    calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, model = _offered(calibrated)
    assert ctx.calibration is not None
    data = ctx.calibration
    every = estimator("scaled-error")(model, ctx, data, 64, "auto")
    assert "9 of 9 groups measured" in every.metric
    monkeypatch.setattr("octavo.passes.scaled_error._MEASURED_MACS", 0.0)
    found = estimator("scaled-error")(model, ctx, data, 64, "auto")
    truth = estimator("measured")(model, ctx, data, 64, "auto")
    errors = estimator("layer-error")(model, ctx, data, 64, "auto")
    measured = [f"m{k}" for k in (0, 1, 3, 4, 5, 7, 8)]
    scales = {}
    for name, of in found.by_group.items():
        anchor = next(o for o in of if o.startswith("storage:s4"))
        scales[name] = of[anchor].mean / errors.damage(name, anchor).mean
        if name in measured:
            assert of[anchor].mean == pytest.approx(truth.damage(name, anchor).mean, rel=1e-6)
        for offer, damage in of.items():
            error = errors.damage(name, offer).mean
            assert damage.mean == pytest.approx(scales[name] * error, rel=1e-6, abs=1e-20)
    for before, name, after in (("m1", "m2", "m3"), ("m5", "m6", "m7")):
        between = (scales[before] * scales[after]) ** 0.5
        assert scales[name] == pytest.approx(between, rel=1e-6)
    assert "7 of 9 groups measured" in found.metric


def test_the_scaled_errors_of_a_real_model_rank_as_measured(calibrated: Calibrated) -> None:
    model = read(Path(models.__file__).parent / "fashion_mobile.onnx")
    ctx = calibrated(model)
    model = Pipeline.parse(_OFFERS).run(model, ctx).model
    assert ctx.calibration is not None
    rows = []
    for name in ("scaled-error", "measured"):
        found = estimator(name)(model, ctx, ctx.calibration, 64, "auto")
        rows.append([d.mean for of in found.by_group.values() for d in of.values()])
    ranks = [np.argsort(np.argsort(row)) for row in rows]
    assert np.corrcoef(*ranks)[0, 1] > 0.8


@pytest.mark.parametrize(("macs", "chosen"), [(1e9, "measured"), (1e3, "scaled-error")])
def test_auto_measures_what_it_can(calibrated: Calibrated, macs: float, chosen: str) -> None:
    ctx, model = _offered(calibrated)
    after = AnalyseSensitivity(measurable_macs=macs).run(model, ctx)
    assert after.fact(Sensitivity).estimator == chosen


def test_nothing_that_only_rounds_weights_has_no_damage(calibrated: Calibrated) -> None:
    ctx, model = _offered(calibrated)
    menu = model.fact(Menu)
    offers = {n: tuple(o for o in of if "storage" not in o.name) for n, of in menu.offers.items()}
    assert ctx.calibration is not None
    bare = model.with_fact(replace(menu, offers=offers))
    found = scaled_error(bare, ctx, ctx.calibration, 64, "auto")
    assert {d.mean for of in found.by_group.values() for d in of.values()} == {0.0}


def _offered(calibrated: Calibrated) -> tuple[PassContext, Model]:
    model = _stack()
    ctx = calibrated(model)
    return ctx, Pipeline.parse(_OFFERS).run(model, ctx).model
