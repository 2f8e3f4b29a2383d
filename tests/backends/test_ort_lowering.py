"""Lowered graphs against the literal fake-quantized ones, and the kernels they get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest
from numpy.typing import NDArray

from octavo.backends.ort_lowering import lower
from octavo.backends.ort_session import make_session
from octavo.ir.facts import Range, Ranges
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.passes.base import Pass, PassContext
from octavo.passes.choose_kernels import ChooseKernels
from octavo.passes.insert_fake_quant import InsertFakeQuant
from octavo.passes.place_quantizers import PlaceQuantizers

Shapes = Mapping[str, tuple[int, ...]]

_CNN = """
<ir_version: 10, opset_import: ["" : 21]>
cnn (float[2,8,16,16] x) => (float[2,10] y)
<float[16,8,3,3] w1, float[16] b1, float[16,1,3,3] w2, float[16,16,1,1] w3, float[16,10] w4,
 float[10] b4, float zero = {0.0}, float six = {6.0}> {
    [conv1] c1 = Conv <pads: ints = [1,1,1,1]> (x, w1, b1)
    [relu1] r1 = Relu (c1)
    [depthwise] c2 = Conv <pads: ints = [1,1,1,1], group: int = 16> (r1, w2)
    [clip] r2 = Clip (c2, zero, six)
    [conv3] c3 = Conv (r2, w3)
    [add] a = Add (c3, r1)
    [relu3] r3 = Relu (a)
    [pool] p = MaxPool <kernel_shape: ints = [2,2], strides: ints = [2,2]> (r3)
    [mean] m = GlobalAveragePool (p)
    [flat] f = Flatten (m)
    [dense] d = MatMul (f, w4)
    [bias] y = Add (d, b4)
}
"""
_CNN_SHAPES = {"w1": (16, 8, 3, 3), "b1": (16,), "w2": (16, 1, 3, 3), "w3": (16, 16, 1, 1),
               "w4": (16, 10), "b4": (10,)}  # fmt: skip

_ATTENTION = """
<ir_version: 10, opset_import: ["" : 21]>
attention (float[2,8,32] x) => (float[2,8,32] y)
<float[32,32] wq, float[32] bq, float[32,32] wk, float[32,32] wv, float[32,32] wo, float[32] bo,
 float scale = {0.18}> {
    [q] q0 = MatMul (x, wq)
    [qb] q1 = Add (q0, bq)
    [k] k0 = MatMul (x, wk)
    [kt] kt = Transpose <perm: ints = [0,2,1]> (k0)
    [v] v0 = MatMul (x, wv)
    [qk] s0 = MatMul (q1, kt)
    [scaled] s1 = Mul (s0, scale)
    [soft] s2 = Softmax (s1)
    [pv] o0 = MatMul (s2, v0)
    [o] o1 = MatMul (o0, wo)
    [ob] o2 = Add (o1, bo)
    [gelu] y = Gelu (o2)
}
"""
_ATTENTION_SHAPES = {"wq": (32, 32), "bq": (32,), "wk": (32, 32), "wv": (32, 32), "wo": (32, 32),
                     "bo": (32,)}  # fmt: skip


def _model(text: str, shapes: Shapes) -> Model:
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(1)
    kept = [t for t in proto.graph.initializer if t.name not in shapes]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for name, shape in shapes.items():
        fan = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
        array = (rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return read(proto)


def _feed(model: Model, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {
        v.name or "": rng.standard_normal(tuple(v.shape.numpy())).astype(np.float32)
        for v in model.graph.inputs
        if v.shape is not None
    }


def _with_ranges(model: Model, feed: Mapping[str, NDArray[np.float32]]) -> Model:
    """Exact min-max ranges of every value, from onnxruntime without optimisation."""
    shown = model.clone()
    values = [v for node in shown.graph for v in node.outputs]
    shown.graph.outputs.clear()
    shown.graph.outputs.extend(values)
    session = make_session(_bytes(shown), threads=1, optimization="none")
    arrays = {**feed, **session.run(feed)}
    by_value = {
        name: Range(*(float(a.min()), float(a.max())) * 2)
        for name, a in arrays.items()
        if a.dtype == np.float32
    }
    return model.with_fact(Ranges(by_value, "minmax", 1, ""))


def _bytes(model: Model) -> bytes:
    model.ir.ir_version = 10
    data: bytes = onnx_ir.to_proto(model.ir).SerializeToString()
    return data


def _run(model: Model, context: PassContext, *passes: Pass) -> Model:
    for pass_ in passes:
        model = pass_.run(model.clone(), context)
    return model


def _kernels(path: Path, tmp_path: Path) -> list[str]:
    optimized = tmp_path / "optimized.onnx"
    make_session(path, threads=1, optimized_path=optimized)
    return [node.op_type for node in onnx.load(optimized).graph.node]


_STATIC = (ChooseKernels(dynamic=False), PlaceQuantizers(), InsertFakeQuant())


@pytest.mark.parametrize(("text", "shapes"), [(_CNN, _CNN_SHAPES), (_ATTENTION, _ATTENTION_SHAPES)])
def test_integer_kernels_agree_with_the_fake_quantized_graph(
    text: str, shapes: Shapes, tmp_path: Path, pass_context: PassContext
) -> None:
    model = _model(text, shapes)
    feed = _feed(model)
    planned = _run(_with_ranges(model, feed), pass_context, *_STATIC)
    artifact = lower(planned, tmp_path / "model.onnx")
    literal = make_session(_bytes(planned.clone()), threads=1, optimization="none").run(feed)["y"]
    actual = make_session(artifact.path, threads=1).run(feed)["y"]
    # Two steps of the last activation quantizer (kernels round once per operator).
    steps = [
        float(node.inputs[1].const_value.numpy().reshape(-1)[0])
        for node in planned.graph
        if node.op_type == "FakeQuant"
        and node.inputs[0] is not None
        and node.inputs[0].const_value is None
        and node.inputs[1] is not None
        and node.inputs[1].const_value is not None
    ]
    assert np.abs(actual - literal).max() <= 2 * max(steps)
    source = make_session(_bytes(model.clone()), threads=1).run(feed)["y"]
    error = np.linalg.norm(actual - source) / np.linalg.norm(source)
    assert 0 < error < 0.05


def test_a_cnn_becomes_integer_nodes_only(tmp_path: Path, pass_context: PassContext) -> None:
    model = _model(_CNN, _CNN_SHAPES)
    planned = _run(_with_ranges(model, _feed(model)), pass_context, *_STATIC)
    artifact = lower(planned, tmp_path / "model.onnx")
    kernels = _kernels(artifact.path, tmp_path)
    assert kernels.count("QLinearConv") == 3
    assert "QLinearAdd" in kernels
    floats = {"Conv", "FusedConv", "Gemm", "MatMul", "Relu", "Clip", "Add"}
    assert not floats & set(kernels)


def test_attention_keeps_one_float_node(tmp_path: Path, pass_context: PassContext) -> None:
    model = _model(_ATTENTION, _ATTENTION_SHAPES)
    planned = _run(_with_ranges(model, _feed(model)), pass_context, *_STATIC)
    kernels = _kernels(lower(planned, tmp_path / "model.onnx").path, tmp_path)
    assert "QLinearSoftmax" in kernels
    assert not {"MatMul", "Gemm", "FusedMatMul", "FusedGemm"} & set(kernels)


@pytest.mark.parametrize(
    ("options", "kernel", "limit"),
    [
        (ChooseKernels(static=False), "DynamicQuantizeMatMul", 0.02),
        (ChooseKernels(static=False, dynamic=False), "FusedGemm", 0.015),
        (ChooseKernels(static=False, weight_only=True, block_size=32), "MatMulNBits", 0.02),
    ],
)
def test_without_data_matmuls_take_the_asked_form(
    options: ChooseKernels, kernel: str, limit: float, tmp_path: Path, pass_context: PassContext
) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    mlp (float[4,256] x) => (float[4,64] y) <float[256,512] w1, float[512] b1, float[64,512] w2> {
        [up] h = MatMul (x, w1)
        [upb] hb = Add (h, b1)
        [act] g = Relu (hb)
        [down] y = Gemm <transB: int = 1> (g, w2)
    }
    """
    model = _model(text, {"w1": (256, 512), "b1": (512,), "w2": (64, 512)})
    feed = _feed(model)
    planned = _run(model, _eager(pass_context), options, InsertFakeQuant())
    artifact = lower(planned, tmp_path / "model.onnx")
    assert kernel in _kernels(artifact.path, tmp_path)
    source = make_session(_bytes(model.clone()), threads=1).run(feed)["y"]
    actual = make_session(artifact.path, threads=1).run(feed)["y"]
    error = np.linalg.norm(actual - source) / np.linalg.norm(source)
    assert 0 < error < limit
    assert artifact.bytes < 0.3 * len(_bytes(model.clone()))


class _FreeIntegers:
    """A cost model under which every kernel the target has is worth it."""

    source = "test"

    def __init__(self, ctx: PassContext) -> None:
        self._inner = ctx.cost

    def seconds(self, node: onnx_ir.Node, method: str) -> float | None:
        known = self._inner.seconds(node, method)  # type: ignore[arg-type]
        return known if known is None or method in ("float", "storage") else 0.0

    def boundary_seconds(self, value: onnx_ir.Value) -> float:
        return 0.0


def _eager(ctx: PassContext) -> PassContext:
    return replace(ctx, cost=_FreeIntegers(ctx))


def test_an_embedding_is_stored_in_rows_and_scaled_after_the_lookup(
    tmp_path: Path, pass_context: PassContext
) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    embed (int64[2,5] ids) => (float[2,5,64] y) <float[300,64] table> {
        [lookup] y = Gather (table, ids)
    }
    """
    model = _model(text, {"table": (300, 64)})
    planned = _run(model, pass_context, ChooseKernels(static=False), InsertFakeQuant())
    artifact = lower(planned, tmp_path / "model.onnx")
    ids = np.arange(10, dtype=np.int64).reshape(2, 5) * 29
    actual = make_session(artifact.path, threads=1).run({"ids": ids})["y"]
    table = next(iter(model.graph.initializers.values())).const_value
    assert table is not None
    expected = table.numpy()[ids]
    half_step = np.abs(table.numpy()).max(axis=1)[ids][..., None] / 127 / 2
    assert (np.abs(actual - expected) <= half_step * 1.0001).all()
    assert artifact.bytes < 300 * 64 * 4 * 0.35


def test_a_dynamic_lstm_computes_what_the_float_one_does(
    tmp_path: Path, pass_context: PassContext
) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    rnn (float[12,3,32] x) => (float[12,2,3,48] y)
    <float[2,192,32] w, float[2,192,48] r, float[2,384] b> {
        [lstm] y = LSTM <hidden_size: int = 48, direction: string = "bidirectional"> (x, w, r, b)
    }
    """
    shapes = {"w": (2, 192, 32), "r": (2, 192, 48), "b": (2, 384)}
    model = _model(text, shapes)
    feed = _feed(model)
    options = ChooseKernels(static=False, recurrent=True)
    planned = _run(model, _eager(pass_context), options, InsertFakeQuant())
    artifact = lower(planned, tmp_path / "model.onnx")
    assert "DynamicQuantizeLSTM" in _kernels(artifact.path, tmp_path)
    source = make_session(_bytes(model.clone()), threads=1).run(feed)["y"]
    actual = make_session(artifact.path, threads=1).run(feed)["y"]
    assert np.linalg.norm(actual - source) / np.linalg.norm(source) < 0.03
