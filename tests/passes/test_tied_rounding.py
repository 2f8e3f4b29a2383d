"""A table that is looked up and multiplied is rounded by what its head multiplies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx.helper
import onnx.numpy_helper
import pytest

from octavo.backends.ort_lowering import lower
from octavo.backends.ort_session import make_session
from octavo.ir.facts import Plan
from octavo.ir.model import Model
from octavo.ir.moments import Moments
from octavo.ir.quant import PerBlock
from octavo.ir.read import read
from octavo.passes.base import PassContext
from octavo.passes.collect_moments import tempered
from octavo.passes.pipeline import Pipeline
from octavo.passes.weight_quantizers import weight_quantizers

Calibrated = Callable[..., PassContext]
_VOCABULARY, _WIDTH = 96, 64
_PLANNED = (
    "canonicalize,collect-moments,choose-kernels{bits=4,weight-only=true,static=false,"
    "block-size=32},insert-fake-quant"
)


@pytest.fixture
def language_model() -> Model:
    """Embedding, one layer, and a head that is the embedding turned."""
    rng = np.random.default_rng(0)
    arrays = {
        "table": rng.standard_t(4, (_VOCABULARY, _WIDTH)) / 8,
        "w": rng.standard_normal((_WIDTH, _WIDTH)) / 8,
    }
    constants = [onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()]
    nodes = [
        onnx.helper.make_node("Gather", ["table", "ids"], ["e"], "embed"),
        onnx.helper.make_node("MatMul", ["e", "w"], ["a"], "layer"),
        onnx.helper.make_node("Tanh", ["a"], ["h"], "tanh"),
        onnx.helper.make_node("Transpose", ["table"], ["turned"], "turn", perm=[1, 0]),
        onnx.helper.make_node("MatMul", ["h", "turned"], ["y"], "head"),
    ]
    ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [1, 24])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 24, _VOCABULARY])
    graph = onnx.helper.make_graph(nodes, "language", [ids], [y], constants)
    opsets = [onnx.helper.make_opsetid("", 21)]
    return read(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))


def test_an_output_and_its_table_have_blocks_of_their_own(
    language_model: Model, calibrated: Calibrated, tmp_path: Path
) -> None:
    """The table is stored once, in blocks of 16 with a scale each; what runs is what was meant."""
    ctx = _with_ids(calibrated(language_model))
    options = _PLANNED.replace("block-size=32", "block-size=32,output-block-size=16")
    model = Pipeline.parse(options).run(language_model, ctx).model
    sizes = {}
    for name, choice in model.fact(Plan).by_node.items():
        assert choice.option.method == "weight-only"
        assert choice.option.weight is not None
        granularity = choice.option.weight.granularity
        assert isinstance(granularity, PerBlock)
        sizes[name] = granularity.size
    assert sizes == {"embed": 16, "layer": 32, "head": 16}
    artifact = lower(model, tmp_path / "model.onnx")
    graph = onnx.load(artifact.path).graph
    held = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    assert [shape for name, shape in held.items() if name.startswith("table_scale")] == [
        (_VOCABULARY, _WIDTH // 16)
    ]
    feed = {"ids": np.arange(24, dtype=np.int64)[None] * 3 % _VOCABULARY}
    expected = ctx.evaluator.run(model, feed)["y"]
    actual = make_session(artifact.path, threads=1).run(feed)["y"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0.03 * np.abs(expected).max())


def test_the_head_decides_how_its_table_is_rounded(
    language_model: Model, calibrated: Calibrated, tmp_path: Path
) -> None:
    ctx = _with_ids(calibrated(language_model))
    planned = Pipeline.parse(_PLANNED).run(language_model, ctx).model
    rounded = Pipeline.parse("round-gptq").run(planned, ctx).model
    (before,) = (q for q in weight_quantizers(planned) if q.turned)
    (after,) = (q for q in weight_quantizers(rounded) if q.turned)
    moment = planned.fact(Moments).of("head", 1)
    assert moment is not None
    second = moment.matrix()[0].astype(np.float64)
    errors = []
    for quantizer in (before, after):
        change = quantizer.rounded().astype(np.float64) - before.original()
        errors.append(float(np.einsum("nk,kl,nl->", change, second, change)))
    assert errors[1] < 0.7 * errors[0]
    artifact = lower(rounded, tmp_path / "model.onnx")
    names = [tensor.name for tensor in onnx.load(artifact.path).graph.initializer]
    assert sum(name.startswith("table") and "_q" in name for name in names) == 1
    feed = {"ids": np.arange(24, dtype=np.int64)[None] * 3 % _VOCABULARY}
    wanted = ctx.evaluator.load(rounded)(feed)["y"]
    found = make_session(artifact.path, threads=1).run(feed)["y"]
    # The kernel rounds activations to 8 bits in blocks.
    assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()


def test_columns_much_longer_than_the_others_are_shortened() -> None:
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((1, 200, 16)).astype(np.float32)
    assert tempered(columns) is columns
    spiked = columns.copy()
    spiked[0, 3] *= 1000
    found = tempered(spiked)
    length = np.linalg.norm(found[0], axis=1)
    assert length[3] == pytest.approx(2 * np.quantile(np.linalg.norm(spiked[0], axis=1), 0.9))
    np.testing.assert_array_equal(np.delete(found, 3, axis=1), np.delete(columns, 3, axis=1))
    along = [array / np.linalg.norm(array) for array in (found[0, 3], columns[0, 3])]
    np.testing.assert_allclose(*along, rtol=1e-5)
    assert not tempered(np.zeros((1, 4, 3), np.float32)).any()


def _with_ids(ctx: PassContext) -> PassContext:
    """Calibration feeds of token ids that the table has."""
    calibration: Any = ctx.calibration
    rng = np.random.default_rng(1)
    feeds = tuple({"ids": rng.integers(0, _VOCABULARY, (1, 24))} for _ in range(16))
    return replace(ctx, calibration=replace(calibration, feeds=feeds))


@pytest.mark.parametrize(
    "text", ["clip-weights", "round-squant", "round-nupes", "round-uniquanf{steps=0}"]
)
def test_other_passes_leave_a_tied_table_well_formed(
    text: str, language_model: Model, calibrated: Calibrated, tmp_path: Path
) -> None:
    ctx = _with_ids(calibrated(language_model))
    planned = Pipeline.parse(_PLANNED).run(language_model, ctx).model
    done = Pipeline.parse(text).run(planned, ctx).model
    feed = {"ids": np.arange(24, dtype=np.int64)[None] * 3 % _VOCABULARY}
    before, after = (ctx.evaluator.load(m)(feed)["y"] for m in (language_model, done))
    nearest = ctx.evaluator.load(planned)(feed)["y"]
    assert np.square(after - before).sum() < 1.5 * np.square(nearest - before).sum()
    found = make_session(lower(done, tmp_path / "m.onnx").path, threads=1).run(feed)["y"]
    assert np.abs(found - after).max() < 0.03 * np.abs(after).max()
