"""Repair branches against numpy's SVD, and in the artifact that onnxruntime runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest

from octavo.backends.ort_lowering import lower
from octavo.cli.calibration_data import load_calibration
from octavo.ir.errors import UsageError
from octavo.ir.extract import extract
from octavo.ir.read import read
from octavo.ir.reference import Reference
from octavo.passes.low_rank import factored, relative_error
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

FOLDER = Path(str(files("octavo.models")))
STORAGE = (
    "canonicalize,collect-moments,"
    "choose-kernels{bits=3,block-size=0,static=false,dynamic=false},insert-fake-quant"
)
STATIC = (
    "canonicalize,calibrate,collect-moments,choose-kernels{bits=4,block-size=0},"
    "place-quantizers,insert-fake-quant"
)
DYNAMIC = "canonicalize,collect-moments,choose-kernels{static=false},insert-fake-quant"
WEIGHT_ONLY = (
    "canonicalize,collect-moments,"
    "choose-kernels{bits=4,static=false,dynamic=false,weight-only=true},insert-fake-quant"
)


def loaded(name: str, ctx: PassContext) -> tuple[Model, PassContext]:
    """A shipped model, and a context with its calibration data."""
    model = read(FOLDER / f"{name}.onnx")
    return model, replace(ctx, calibration=load_calibration(str(FOLDER / "fashion.npz"), model))


@pytest.mark.parametrize("seed", range(4))
def test_eora_never_leaves_more_than_lorc(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((24, 8)) @ rng.standard_normal((8, 300))
    x += 0.1 * rng.standard_normal(x.shape)
    second, weight = x @ x.T / 300, rng.standard_normal((16, 24))
    lost = weight - np.round(weight * 2) / 2
    for rank in (1, 4, 8, 15):
        eora, lorc = (factored(lost, c, rank) for c in (second, None))
        assert eora.error <= relative_error(lost, lorc.product, second) + 1e-12
        assert lorc.error <= relative_error(lost, eora.product, None) + 1e-12


def test_eora_beats_lorc_and_nothing_on_every_layer_of_a_trained_network(
    pass_context: PassContext,
) -> None:
    model, ctx = loaded("fashion_vit", pass_context)
    quantized = Pipeline.parse(STORAGE).run(model, ctx).model
    found = {}
    for method in ("eora", "lorc"):
        text = f"repair-low-rank{{rank=4,method={method},bits=32,keep=type:Conv}}"
        run = Pipeline.parse(text).run(quantized, ctx)
        remarks = run.records[-1].remarks
        found[method] = {r.where: r.values for r in remarks if r.kind == "applied"}
    assert len(found["eora"]) >= 12
    for name, values in found["lorc"].items():
        eora = found["eora"][name]
        assert eora["before"] == values["before"]
        assert eora["after"] <= values["after"] <= values["before"]


def test_reported_error_is_that_of_the_layer(pass_context: PassContext) -> None:
    model, ctx = loaded("fashion_vit", pass_context)
    before = Pipeline.parse(STORAGE).run(model, ctx).model
    text = "repair-low-rank{rank=7,bits=32,only=/b/b.1/m/m.0/MatMul}"
    run = Pipeline.parse(text).run(before, ctx)
    (remark,) = [r for r in run.records[-1].remarks if r.kind == "applied"]
    node = next(n for n in before.graph if n.name == "/b/b.1/m/m.0/MatMul")
    operand, output = node.inputs[0].name, next(iter(node.outputs[0].uses())).node.outputs[0].name
    assert operand is not None
    assert output is not None
    reference = before.fact(Reference).model
    assert ctx.calibration is not None
    rows = ctx.evaluator.stream(reference, ctx.calibration, [operand])
    parts = [extract(m, [operand], [output]) for m in (reference, before, run.model)]
    lost, whole = np.zeros(2), 0.0
    bias = np.asarray(reference.graph.initializers["b.1.m.0.bias"].const_value)
    for value in rows:
        truth, *others = (ctx.evaluator.run(part, value)[output] for part in parts)
        lost += [np.square(other - truth).sum() for other in others]
        whole += float(np.square(truth - bias).sum())
    # Moments are of some columns, the outputs of all.
    assert lost[0] / whole == pytest.approx(remark.values["before"], rel=0.1)
    assert lost[1] / whole == pytest.approx(remark.values["after"], rel=0.1)
    assert lost[1] < 0.8 * lost[0]


@pytest.mark.parametrize(
    ("text", "bits"), [(STORAGE, 8), (STATIC, 16), (STATIC, 8), (DYNAMIC, 16), (WEIGHT_ONLY, 32)]
)
def test_lowered_branch_computes_what_the_graph_does(
    text: str, bits: int, pass_context: PassContext, tmp_path: Path
) -> None:
    model, ctx = loaded("fashion_vit", pass_context)
    plain = Pipeline.parse(text).run(model, ctx).model
    run = Pipeline.parse(f"repair-low-rank{{rank=2,bits={bits}}}").run(plain, ctx)
    assert run.records[-1].counters["layers repaired"] >= 10
    artifact = lower(run.model, tmp_path / "model.onnx")
    without = lower(plain, tmp_path / "without.onnx")
    feed = {"input": np.load(FOLDER / "fashion_test.npz")["input"][:32]}
    session = onnxruntime.InferenceSession(artifact.path)
    (actual,) = session.run(None, feed)
    expected = ctx.evaluator.run(run.model, feed)[run.model.graph.outputs[0].name or ""]
    # Integer kernels round activations, and differ from FakeQuant in ties.
    tolerance = 1e-4 if text == STORAGE else 0.05
    error = np.sqrt(np.mean(np.square(actual - expected)))
    assert error <= tolerance * np.sqrt(np.mean(np.square(expected)))
    # No integer kernel is lost to the branches.
    kinds = [
        Counter(n.op_type for n in read(a.path).graph if n.domain == "com.microsoft")
        for a in (artifact, without)
    ]
    assert all(kinds[0][kind] >= count for kind, count in kinds[1].items())
    if text == DYNAMIC:
        assert kinds[0] == kinds[1]


def test_nothing_to_repair_is_said(pass_context: PassContext) -> None:
    model, ctx = loaded("fashion_resnet", pass_context)
    static = "canonicalize,calibrate,choose-kernels,place-quantizers,insert-fake-quant"
    run = Pipeline.parse(f"{static},repair-low-rank").run(model, ctx)
    reasons = {r.text for r in run.records[-1].remarks if r.kind == "missed"}
    assert any("ends in a quantizer" in reason for reason in reasons)
    assert any("as many bytes" in reason for reason in reasons)


@pytest.mark.parametrize("options", ["rank=0", "bits=4", "rank=-3"])
def test_bad_option_is_refused(options: str, pass_context: PassContext) -> None:
    model, ctx = loaded("fashion_vit", pass_context)
    with pytest.raises(UsageError, match="a repair needs"):
        Pipeline.parse(f"repair-low-rank{{{options}}}").run(model, ctx)
