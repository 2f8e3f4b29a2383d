"""Moments equal sums over columns that numpy takes directly, in bounded pieces."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.ir.errors import CalibrationError
from octavo.ir.facts import Choice, Option, Plan
from octavo.ir.facts_io import read_facts, write_facts
from octavo.ir.moments import Moments, shrunk
from octavo.ir.quant import PerAxis, QuantSpec
from octavo.ir.read import read
from octavo.passes import collect_moments
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.moments import Moment
    from octavo.passes.base import PassContext

# C is stored in float32; its entries are sums of float32 products.
RELATIVE = 1e-5

_TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N,4,6,5] x) => (float[N,6] z) <
    float[8,2,3,3] grouped = {0}, float[8,1,2,2] depthwise = {0}, float[8,6] dense = {0},
    float[8,6] other = {0}> {
    [one] a = Conv <group = 2, strides = [2, 1], pads = [1, 1, 1, 1]> (x, grouped)
    [two] b = Conv <group = 8> (a, depthwise)
    p = GlobalAveragePool (b) f = Flatten (p)
    [three] y = MatMul (f, dense) [four] w = MatMul (f, other) z = Add (y, w)
}"""


@pytest.fixture
def model() -> Model:
    proto = onnx.parser.parse_model(_TEXT)
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        array = rng.standard_normal(tuple(tensor.dims)).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return read(proto)


def patches(
    x: NDArray[np.float32], kernel: tuple[int, int], strides: tuple[int, int], pad: int
) -> NDArray[np.float64]:
    """im2col by loops: `[samples, C, kernel]`."""
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    rows = range(0, x.shape[2] - kernel[0] + 1, strides[0])
    columns = range(0, x.shape[3] - kernel[1] + 1, strides[1])
    found = [
        x[n, :, r : r + kernel[0], c : c + kernel[1]].reshape(x.shape[1], -1)
        for n in range(len(x))
        for r in rows
        for c in columns
    ]
    return np.array(found, np.float64)


@pytest.mark.parametrize("samples", [4, 16, 64, 4096])
def test_few_samples_count_as_little_as_is_best(samples: int) -> None:
    """Against the share that brings C nearest to the true one, over 20 draws."""
    rng = np.random.default_rng(samples)
    # Oracle shares are those of an identity; a rotated spectrum keeps the diagonal nearly even.
    basis = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    root = basis * np.sqrt(np.linspace(0.2, 3.0, 24))
    truth = root @ root.T
    shares = np.linspace(0, 1, 101)
    ours, best = 0.0, np.zeros(len(shares))
    for _ in range(20):
        x = rng.standard_normal((samples, 24)) @ root.T
        second = (x.T @ x / samples).astype(np.float32)
        ours += np.square(shrunk(second[None], samples)[0] - truth).sum()
        own = second - np.diag(np.diagonal(second))
        best += [np.square(second - share * own - truth).sum() for share in shares]
    # With 4 samples the formula knows little of the spectrum itself.
    assert ours <= (1.05 if samples > 4 else 1.1) * best.min()
    if samples < 24:
        assert ours < 0.7 * best[0]


def test_shrinking_keeps_the_diagonal_and_columns_that_are_never_used() -> None:
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    x[:, 3] = 0
    second = (x.T @ x / 5)[None]
    found = shrunk(second, 5)
    np.testing.assert_allclose(np.diagonal(found[0]), np.diagonal(second[0]), rtol=1e-6)
    assert not found[0, 3].any()
    assert not found[0, :, 3].any()
    assert not np.any(shrunk(np.zeros((2, 3, 3), np.float32), 5))


def assert_moment(moment: Moment | None, columns: NDArray[np.float64], groups: int) -> None:
    """Against columns `[samples, groups * K]`."""
    assert moment is not None
    split = columns.reshape(len(columns), groups, -1)
    second = np.einsum("sgi,sgj->gij", split, split) / len(split)
    np.testing.assert_allclose(moment.measured(), second, rtol=0, atol=RELATIVE * second.max())
    np.testing.assert_allclose(
        moment.mean, split.mean(axis=0), rtol=0, atol=RELATIVE * np.abs(split).max()
    )
    assert moment.samples == len(columns)


def test_moments_of_every_operand(
    model: Model,
    calibrated: Callable[..., PassContext],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In however many parts columns are summed."""
    monkeypatch.setattr(collect_moments, "_ROWS_AT_ONCE", 7)
    ctx = calibrated(model)
    assert ctx.calibration is not None
    found = Pipeline.parse("collect-moments").run(model, ctx).model.fact(Moments)
    feeds = list(ctx.calibration)
    values = list(ctx.evaluator.stream(model, ctx.calibration, ["a", "f"]))
    first = np.concatenate([patches(f["x"], (3, 3), (2, 1), 1) for f in feeds])
    assert_moment(found.of("one", 1), first, 2)
    second = np.concatenate([patches(v["a"], (2, 2), (1, 1), 0) for v in values])
    assert_moment(found.of("two", 1), second, 8)
    third = np.concatenate([v["f"] for v in values]).astype(np.float64)
    assert_moment(found.of("three", 1), third, 1)
    assert found.of("four", 1) is found.of("three", 1)
    assert found.of("three", 0) is None


def test_only_weights_that_are_quantized_count_once_there_are_some(
    model: Model, calibrated: Callable[..., PassContext]
) -> None:
    option = Option("storage", QuantSpec("s4", PerAxis(0), symmetric=True))
    planned = model.with_fact(Plan({"two": Choice(option, "")}, "test"))
    pipeline = Pipeline.parse("insert-fake-quant,collect-moments")
    found = pipeline.run(planned, calibrated(model)).model.fact(Moments)
    assert list(found.by_weight) == ["two:1"]


def test_rows_bound_what_is_drawn(model: Model, calibrated: Callable[..., PassContext]) -> None:
    ctx = calibrated(model)
    found = Pipeline.parse("collect-moments{rows=2}").run(model, ctx).model.fact(Moments)
    moment = found.of("one", 1)
    assert moment is not None
    assert moment.samples == 2 * 4 * 2  # rows, feeds, samples a feed
    again = Pipeline.parse("collect-moments{rows=2}").run(model, ctx).model.fact(Moments)
    repeated = again.of("one", 1)
    assert repeated is not None
    np.testing.assert_array_equal(moment.matrix(), repeated.matrix())


def test_moments_can_be_written_and_read(
    model: Model, calibrated: Callable[..., PassContext], tmp_path: Path
) -> None:
    found = Pipeline.parse("collect-moments").run(model, calibrated(model)).model
    write_facts(found.facts, tmp_path)
    back = read_facts(tmp_path)[Moments]
    assert isinstance(back, Moments)
    for key, moment in found.fact(Moments).by_weight.items():
        np.testing.assert_array_equal(back.by_weight[key].matrix(), moment.matrix())
        np.testing.assert_array_equal(back.by_weight[key].mean, moment.mean)


def test_no_data_is_a_note(model: Model, pass_context: PassContext) -> None:
    compiled = Pipeline.parse("collect-moments").run(model, pass_context)
    assert compiled.model.fact(Moments).by_weight == {}
    assert [r.kind for r in compiled.records[0].remarks] == ["note"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_name_the_node(
    model: Model, calibrated: Callable[..., PassContext], bad: float
) -> None:
    ctx = calibrated(model)
    assert ctx.calibration is not None
    feeds = [{"x": feed["x"].copy()} for feed in ctx.calibration]
    feeds[2]["x"][1, 3, 2, 1] = bad
    listed = replace(ctx.calibration, feeds=tuple(feeds))  # type: ignore[type-var]
    with pytest.raises(CalibrationError, match="node 'one'") as caught:
        Pipeline.parse("collect-moments").run(model, replace(ctx, calibration=listed))
    assert "value 'x'" in str(caught.value)


def test_outputs_of_one_node_are_read_apart(calibrated: Callable[..., PassContext]) -> None:
    """A walk stops at nodes; here two operands come from one, and nothing reads them later."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[N,8] x) => (float[N,3] z) <
        float[4,3] w = {1,2,3,4,5,6,7,8,9,1,2,3}, float[4,3] v = {1,2,3,4,5,6,7,8,9,1,2,3}> {
        p, q = Split <axis = 1, num_outputs = 2> (x)
        [one] a = MatMul (q, w) [two] b = MatMul (p, v) z = Add (a, b) }"""
    model = read(onnx.parser.parse_model(text))
    ctx = calibrated(model)
    assert ctx.calibration is not None
    found = Pipeline.parse("collect-moments").run(model, ctx).model.fact(Moments)
    x = np.concatenate([feed["x"] for feed in ctx.calibration]).astype(np.float64)
    assert_moment(found.of("one", 1), x[:, 4:], 1)
    assert_moment(found.of("two", 1), x[:, :4], 1)
