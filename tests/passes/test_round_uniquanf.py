"""What `round-uniquanf` leaves in the graph and in the file: levels that pay, and even grids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from octavo.backends.ort_lowering import lower
from octavo.backends.ort_session import make_session
from octavo.ir.facts import Choice, Option, Plan
from octavo.ir.levels import OP_TYPE, levels_of
from octavo.ir.moments import shrunk
from octavo.ir.quant import PerAxis, PerBlock, PerTensor, QuantParams, QuantSpec, dequantize
from octavo.ir.read import read
from octavo.passes.pipeline import Pipeline
from octavo.passes.round_uniquanf import even_params
from octavo.passes.uniquanf import Coding, uniform_coding
from octavo.passes.weight_quantizers import weight_quantizers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from octavo.ir.facts import Method
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.pipeline import Compilation

    Float32 = NDArray[np.float32]

COLUMNS = QuantSpec("s3", PerAxis(1), symmetric=True)
_TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N,{k}] x) => (float[N,6] z) {{
    [one] a = MatMul (x, w) b = Relu (a) [two] y = MatMul (b, v) z = Tanh (y) }}"""
FIRST = "clip-weights,round-gptq,"


def weight_of(*shape: int, seed: int = 0) -> Float32:
    """Heavy tails, small enough that all sums of their float16 numbers are exact."""
    found = 0.05 * np.random.default_rng(seed).standard_t(4, shape)
    return found.astype(np.float32)


WEIGHTS = {"w": weight_of(80, 64), "v": weight_of(64, 6, seed=1)}


def model_of(
    weights: Mapping[str, Float32] = WEIGHTS, spec: QuantSpec = COLUMNS, method: Method = "storage"
) -> Model:
    proto = onnx.parser.parse_model(_TEXT.format(k=len(weights["w"])))
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    plan = Plan(dict.fromkeys(("one", "two"), Choice(Option(method, spec), "")), "test")
    return read(proto).with_fact(plan)


def compiled(model: Model, ctx: PassContext, text: str) -> Compilation:
    return Pipeline.parse(f"insert-fake-quant,{text}").run(model, ctx)


def outputs(model: Model, ctx: PassContext) -> NDArray[np.float64]:
    assert ctx.calibration is not None
    found = [ctx.evaluator.run(model, feed)["z"] for feed in ctx.calibration]
    return np.concatenate(found).astype(np.float64)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_come_closer_with_each_part(
    bits: int, calibrated: Callable[..., PassContext]
) -> None:
    """Even codes by GPTQ, then levels, then learned levels."""
    pytest.importorskip("torch")
    spec = QuantSpec(f"s{bits}", PerAxis(1), symmetric=True)  # type: ignore[arg-type]
    model = model_of(spec=spec)
    ctx = calibrated(model, free_dimension=200)
    truth = outputs(model, ctx)
    texts = (
        "clip-weights,round-gptq",
        FIRST + "round-uniquanf{steps=0}",
        FIRST + "round-uniquanf{codes-rate=0.02}",
    )
    made = [compiled(model, ctx, text) for text in texts]
    errors = [np.square(outputs(m.model, ctx) - truth).sum() for m in made]
    assert errors[1] < 0.9 * errors[0]
    # At 4 bits learning finds nothing that lasts on other samples of so few.
    assert errors[2] < errors[1] if bits < 4 else errors[2] <= errors[1]
    for node in (n for n in made[2].model.graph if n.op_type == OP_TYPE):
        weight, levels = levels_of(node)
        assert levels.shape[1] == 2**bits
        assert all(np.isin(w, own).all() for w, own in zip(weight.T, levels, strict=True))


def test_the_errors_it_reports_are_those_of_the_layer(
    calibrated: Callable[..., PassContext],
) -> None:
    model = model_of()
    ctx = calibrated(model, free_dimension=40)
    assert ctx.calibration is not None
    x = np.concatenate([feed["x"] for feed in ctx.calibration]).astype(np.float64)
    made = compiled(model, ctx, "round-uniquanf{steps=0}")
    node = next(n for n in made.model.graph if n.op_type == OP_TYPE)
    second = shrunk((x.T @ x / len(x)).astype(np.float32)[None], len(x))[0].astype(np.float64)
    left, whole = levels_of(node)[0] - WEIGHTS["w"], WEIGHTS["w"]
    expected = np.trace(left.T @ second @ left) / np.trace(whole.T @ second @ whole)
    reported = made.records[-1].remarks[0].values["after"]
    assert reported == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("data", [False, True])
def test_the_runtime_multiplies_the_levels(
    data: bool, tmp_path: Path, pass_context: PassContext, calibrated: Callable[..., PassContext]
) -> None:
    model = model_of()
    ctx = calibrated(model) if data else pass_context
    made = compiled(model, ctx, "round-uniquanf{steps=0}").model
    weights = [levels_of(n)[0] for n in made.graph if n.op_type == OP_TYPE]
    artifact = lower(made, tmp_path / "m.onnx")
    x = np.random.default_rng(1).standard_normal((5, 80)).astype(np.float32)
    found = make_session(artifact.path, threads=1).run({"x": x})["z"].astype(np.float64)
    hidden = np.maximum(x.astype(np.float64) @ weights[0], 0)
    np.testing.assert_allclose(found, np.tanh(hidden @ weights[1]), rtol=0, atol=1e-5)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(artifact.path).graph.initializer}
    halves = sum(a.nbytes for a in stored.values() if a.dtype == np.float16)
    # k + 1 float16 numbers for each of 70 channels, 3 bits for each of 5504 weights.
    assert halves == 70 * 4 * 2
    codes = sum(a.nbytes for n, a in stored.items() if "_q" in n)
    assert codes == 5504 * 3 // 8


def test_without_data_no_weight_is_further_away(pass_context: PassContext) -> None:
    before = compiled(model_of(), pass_context, "clip-weights").model
    made = compiled(model_of(), pass_context, "clip-weights,round-uniquanf").model
    known = [q.rounded() for q in weight_quantizers(before)]
    found = [levels_of(n)[0] for n in made.graph if n.op_type == OP_TYPE]
    for old, new, weight in zip(known, found, WEIGHTS.values(), strict=True):
        assert np.all(np.square(new - weight).sum(0) <= np.square(old - weight).sum(0) * (1 + 1e-3))


@pytest.mark.parametrize("offset", [0, 1])
def test_levels_that_are_a_grid_are_codes(offset: int) -> None:
    """α = 2^(k-2-i)·Δ with codes that the spec has; shifted by half a step there are none."""
    scale = np.array([0.25, 0.5], np.float32)
    coding = uniform_coding(scale, np.zeros(2, np.float32), 3)
    moved = Coding(coding.alpha, coding.offset + scale * np.float32(offset / 2))
    codes = np.array([[-3, 0, 3], [1, 2, -1]], np.float32)
    rows = (codes + offset / 2) * scale[:, None]
    present = QuantParams(COLUMNS, np.ones(2, np.float32), np.zeros(2, np.int32))
    params = even_params(moved, rows, present)
    if offset:
        assert params is None
    else:
        assert params is not None
        np.testing.assert_array_equal(params.scale, scale)
        # A symmetric grid of 3 bits has no code -4.
        assert even_params(coding, np.full((2, 1), -4) * scale[:, None], present) is None


def test_a_weight_on_a_grid_stays(pass_context: PassContext) -> None:
    codes = np.random.default_rng(2).integers(-3, 4, (80, 64)).astype(np.int8)
    codes[0] = 3
    grid = QuantParams(COLUMNS, np.full(64, 0.5, np.float32), np.zeros(64, np.int32))
    weights = {**WEIGHTS, "w": dequantize(codes, grid)}
    made = compiled(model_of(weights), pass_context, "round-uniquanf")
    notes = [r for r in made.records[-1].remarks if r.kind == "note" and r.where == "w_storage"]
    assert len(notes) == 1
    assert [q.fake.name for q in weight_quantizers(made.model)] == ["w_storage"]


@pytest.mark.parametrize(
    ("spec", "method", "why"),
    [
        (QuantSpec("s8", PerAxis(1), symmetric=True), "storage", "8 bits"),
        (QuantSpec("f16"), "storage", "no even grid"),
        (QuantSpec("s4", PerAxis(1), symmetric=True), "dynamic", "multiplies codes"),
        (QuantSpec("s4", PerBlock(0, 32), symmetric=True), "weight-only", "multiplies codes"),
        (QuantSpec("s4", PerBlock(0, 32), symmetric=True), "storage", "one channel each"),
        (QuantSpec("s4", PerTensor(), symmetric=True), "storage", "one channel each"),
    ],
)
def test_what_it_leaves_alone(
    spec: QuantSpec, method: Method, why: str, pass_context: PassContext
) -> None:
    before = compiled(model_of(spec=spec, method=method), pass_context, "clip-weights").model
    made = compiled(model_of(spec=spec, method=method), pass_context, "clip-weights,round-uniquanf")
    remarks = made.records[-1].remarks
    assert {r.kind for r in remarks} == {"missed"}
    assert all(why in r.text for r in remarks)
    assert made.model.fingerprint == before.fingerprint


@pytest.mark.parametrize("width", [1, 2, 9, 10])
def test_small_channels_keep_their_codes(width: int, pass_context: PassContext) -> None:
    """3 bits and four float16 numbers against 8 bits and a float16 scale: from 10 weights on."""
    weights = {"w": weight_of(width, 64), "v": weight_of(64, 6)}
    made = compiled(model_of(weights), pass_context, "round-uniquanf{steps=0}").model
    kept = [q.fake.name for q in weight_quantizers(made)]
    assert kept == (["w_storage"] if width < 10 else [])
    assert width * (8 - 3) < 3 * 16 or not kept


@pytest.mark.parametrize("shape", [(80, 1), (10, 1)])
def test_one_row(shape: tuple[int, int], pass_context: PassContext) -> None:
    weights = {"w": weight_of(*shape), "v": weight_of(1, 6)}
    made = compiled(model_of(weights), pass_context, "round-uniquanf{steps=0}").model
    (node,) = (n for n in made.graph if n.op_type == OP_TYPE)
    weight, levels = levels_of(node)
    assert levels.shape == (1, 8)
    assert np.isin(weight, levels).all()


@pytest.mark.parametrize("number", [0.0, -0.3])
def test_constant_weights(number: float, pass_context: PassContext) -> None:
    weights = {**WEIGHTS, "w": np.full((80, 64), number, np.float32)}
    made = compiled(model_of(weights), pass_context, "round-uniquanf{steps=0}").model
    fake = next(n for n in made.graph if n.name == "one").inputs[1].producer()  # type: ignore[union-attr]
    assert fake is not None
    stored = fake.inputs[0].const_value.numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(stored, weights["w"], rtol=2.0**-11)


def test_other_passes_leave_levels_alone(calibrated: Callable[..., PassContext]) -> None:
    model = model_of()
    ctx = calibrated(model)
    made = compiled(model, ctx, "round-uniquanf{steps=0}")
    after = Pipeline.parse("clip-weights,round-gptq,round-nupes,round-squant").run(made.model, ctx)
    assert after.model.fingerprint == made.model.fingerprint
