"""What `round-nupes` leaves in the graph and in the file: tables of int8 codes that pay."""

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
from octavo.ir.moments import shrunk
from octavo.ir.packing import pack
from octavo.ir.quant import (
    PerAxis,
    PerBlock,
    PerTensor,
    QuantParams,
    QuantSpec,
    dequantize,
    quantize,
)
from octavo.ir.read import read
from octavo.passes.pipeline import Pipeline
from octavo.passes.weight_quantizers import weight_quantizers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from octavo.ir.facts import Method
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.pipeline import Compilation

    Float32 = NDArray[np.float32]

COLUMNS = QuantSpec("s4", PerAxis(1), symmetric=True)


def weight_of(shape: tuple[int, ...] = (40, 24)) -> Float32:
    """Heavy tails, as weights have them."""
    return np.random.default_rng(0).standard_t(4, shape).astype(np.float32)


def model_of(weight: Float32, spec: QuantSpec = COLUMNS, method: Method = "storage") -> Model:
    k, n = weight.shape
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[N,{k}] x) => (float[N,{n}] y) {{ [one] y = MatMul (x, w) }}""")
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return read(proto).with_fact(Plan({"one": Choice(Option(method, spec), "")}, "test"))


def compiled(model: Model, ctx: PassContext, text: str) -> Compilation:
    return Pipeline.parse(f"insert-fake-quant,{text}").run(model, ctx)


@pytest.mark.parametrize("table", ["power", "centres"])
@pytest.mark.parametrize("bits", [3, 4, 5])
@pytest.mark.parametrize("granularity", [PerAxis(1), PerTensor(), PerBlock(0, 8)], ids=str)
def test_weights_come_closer_without_data(
    table: str,
    bits: int,
    granularity: PerAxis | PerTensor | PerBlock,
    pass_context: PassContext,
) -> None:
    spec = QuantSpec(f"s{bits}", granularity, symmetric=True)  # type: ignore[arg-type]
    weight = weight_of()
    before = compiled(model_of(weight, spec), pass_context, "clip-weights")
    made = compiled(
        model_of(weight, spec), pass_context, f"clip-weights,round-nupes{{table={table}}}"
    )
    errors = [
        float(np.square(next(weight_quantizers(c.model)).rounded() - weight).sum())
        for c in (before, made)
    ]
    assert errors[1] < errors[0]
    (quantizer,) = weight_quantizers(made.model)
    params = quantizer.params
    assert (params.spec.dtype, params.spec.index_bits) == ("s8", bits)
    assert np.unique(quantize(quantizer.stored(), params)).size <= 2**bits
    (remark,) = made.records[-1].remarks
    whole = float(np.square(weight).sum())
    assert remark.kind == "applied"
    assert remark.values["after"] == pytest.approx(errors[1] / whole, rel=1e-4)
    assert remark.values["before"] == pytest.approx(errors[0] / whole, rel=1e-4)


def test_with_data_it_is_the_output_that_comes_closer(
    calibrated: Callable[..., PassContext],
) -> None:
    model = model_of(weight_of())
    ctx = calibrated(model, free_dimension=60)
    assert ctx.calibration is not None
    x = np.concatenate([feed["x"] for feed in ctx.calibration]).astype(np.float64)
    even, made = (
        compiled(model, ctx, f"clip-weights,round-gptq{text}") for text in ("", ",round-nupes")
    )
    errors = [
        float(np.square(x @ (next(weight_quantizers(c.model)).rounded() - weight_of())).sum())
        for c in (even, made)
    ]
    assert errors[1] < 0.9 * errors[0]
    (remark,) = made.records[-1].remarks
    second = shrunk((x.T @ x / len(x)).astype(np.float32)[None], len(x))[0].astype(np.float64)
    left, whole = next(weight_quantizers(made.model)).rounded() - weight_of(), weight_of()
    expected = np.trace(left.T @ second @ left) / np.trace(whole.T @ second @ whole)
    assert remark.values["after"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_file_holds_indices_and_one_table(
    bits: int, tmp_path: Path, pass_context: PassContext
) -> None:
    """The runtime multiplies exactly what numpy makes of the stored codes and scales."""
    spec = QuantSpec(f"s{bits}", PerAxis(1), symmetric=True)  # type: ignore[arg-type]
    made = compiled(model_of(weight_of(), spec), pass_context, "round-nupes")
    (quantizer,) = weight_quantizers(made.model)
    codes, params = quantize(quantizer.stored(), quantizer.params), quantizer.params
    artifact = lower(made.model, tmp_path / "m.onnx")
    graph = onnx.load(artifact.path).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    packed = pack(codes, params.spec)
    for array in packed:
        assert any(np.array_equal(array, s) and array.dtype == s.dtype for s in stored.values())
    assert sum(a.nbytes for a in packed if a.dtype == np.uint8) <= -(-40 * 24 * bits // 8) + 1
    x = np.random.default_rng(1).standard_normal((5, 40)).astype(np.float32)
    found = make_session(artifact.path, threads=1).run({"x": x})["y"].astype(np.float64)
    truth = x.astype(np.float64) @ dequantize(codes, params).astype(np.float64)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-5 * np.abs(truth).max())


def test_a_weight_on_a_grid_stays(pass_context: PassContext) -> None:
    codes = np.random.default_rng(2).integers(-7, 8, (40, 24)).astype(np.int8)
    codes[0] = 7
    grid = QuantParams(COLUMNS, np.full(24, 0.5, np.float32), np.zeros(24, np.int32))
    made = compiled(model_of(dequantize(codes, grid)), pass_context, "round-nupes")
    (quantizer,) = weight_quantizers(made.model)
    assert quantizer.params.spec == COLUMNS
    assert [r.kind for r in made.records[-1].remarks] == ["note"]


def test_even_codes_stay_where_no_table_is_better(
    calibrated: Callable[..., PassContext],
) -> None:
    """Weights almost on the even grid: its 15 codes lose less than powers of them."""
    codes = np.random.default_rng(2).integers(-7, 8, (40, 24)).astype(np.float32)
    codes[0] = 7
    weight = codes + np.random.default_rng(3).normal(0, 1e-3, (40, 24)).astype(np.float32)
    model = model_of(weight)
    ctx = calibrated(model, free_dimension=60)
    sequence = "clip-weights,round-gptq"
    even = compiled(model, ctx, sequence).model
    made = compiled(model, ctx, f"{sequence},round-nupes{{table=power}}")
    (remark,) = made.records[-1].remarks
    assert remark.kind == "missed"
    assert remark.text == "even codes are as good"
    assert made.model.fingerprint == even.fingerprint


@pytest.mark.parametrize(
    ("spec", "method", "text", "why"),
    [
        (QuantSpec("s8", PerAxis(1), symmetric=True), "storage", "", "8-bit codes"),
        (QuantSpec("f16"), "storage", "", "no even grid"),
        (QuantSpec("s1", PerAxis(1)), "storage", "", "no even grid"),
        (QuantSpec("s4", PerBlock(0, 32), symmetric=True), "weight-only", "", "blocks of codes"),
        (QuantSpec("s2", PerAxis(1), symmetric=True), "storage", "{table=power}", "-1, 0 and 1"),
    ],
)
def test_what_it_leaves_alone(
    spec: QuantSpec, method: Method, text: str, why: str, pass_context: PassContext
) -> None:
    before = compiled(model_of(weight_of(), spec, method), pass_context, "clip-weights").model
    made = compiled(
        model_of(weight_of(), spec, method), pass_context, f"clip-weights,round-nupes{text}"
    )
    (remark,) = made.records[-1].remarks
    assert remark.kind == "missed"
    assert why in remark.text
    assert made.model.fingerprint == before.fingerprint


@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("table", ["power", "centres"])
def test_small_and_constant_weights(
    shape: tuple[int, int], table: str, pass_context: PassContext
) -> None:
    for weight in (weight_of(shape), np.full(shape, 0.3, np.float32), np.zeros(shape, np.float32)):
        made = compiled(model_of(weight), pass_context, f"round-nupes{{table={table}}}")
        before = compiled(model_of(weight), pass_context, "clip-weights{steps=1}")
        found, known = (next(weight_quantizers(c.model)).rounded() for c in (made, before))
        assert np.all(np.isfinite(found))
        assert np.square(found - weight).sum() <= np.square(known - weight).sum() + 1e-12


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_weights(shape: tuple[int, int], pass_context: PassContext) -> None:
    made = compiled(model_of(weight_of(shape)), pass_context, "round-nupes")
    assert not made.records[-1].counters


def test_codes_fit_the_kernels_of_the_target(pass_context: PassContext) -> None:
    from dataclasses import replace

    from octavo.backends.ort_target import ORT_CPU_AVX2

    ctx = replace(pass_context, target=ORT_CPU_AVX2)
    made = compiled(model_of(weight_of(), method="dynamic"), ctx, "round-nupes")
    (quantizer,) = weight_quantizers(made.model)
    codes = quantize(quantizer.stored(), quantizer.params)
    assert 32 < np.abs(codes.astype(np.int16)).max() <= 63
