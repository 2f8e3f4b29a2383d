"""Every row of the table of OpenVINO against the runtime: a node planned so runs so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.backends.ov_audit import audit
from octavo.backends.ov_lowering import lower
from octavo.backends.ov_session import open_session
from octavo.backends.ov_target import OPENVINO
from octavo.ir.facts import Choice, Option, Plan
from octavo.ir.model import Model
from octavo.ir.quant import PerAxis, QuantSpec
from octavo.ir.read import read
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from octavo.passes.base import PassContext

pytest.importorskip("openvino", reason="needs the extra openvino")

Calibrated = Callable[..., Any]
_IMAGE, _FLAT = "float[2,8,10,10] x", "float[4,32] x"
# Inputs, weights by name and shape, and the node that is planned static; it is called `n`.
CASES = {
    "Conv": (_IMAGE, {"w": (16, 8, 3, 3), "b": (16,)}, "Conv (x, w, b)"),
    "Conv depthwise": (_IMAGE, {"w": (8, 1, 3, 3)}, "Conv <group = 8> (x, w)"),
    "Conv grouped": (_IMAGE, {"w": (16, 2, 3, 3)}, "Conv <group = 4> (x, w)"),
    "ConvTranspose": (_IMAGE, {"w": (8, 16, 2, 2)}, "ConvTranspose <strides = [2, 2]> (x, w)"),
    "MatMul": (_FLAT, {"w": (32, 16)}, "MatMul (x, w)"),
    "Gemm": (_FLAT, {"w": (32, 16), "b": (16,)}, "Gemm (x, w, b)"),
    "Gemm turned": (_FLAT, {"w": (16, 32), "b": (16,)}, "Gemm <transB = 1> (x, w, b)"),
    "MatMul of two": ("float[2,6,32] x, float[2,32,6] z", {}, "MatMul (x, z)"),
    "GlobalAveragePool": (_IMAGE, {}, "GlobalAveragePool (x)"),
    "AveragePool": (_IMAGE, {}, "AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x)"),
}
# What must be within a step of each input's and each weight's grid.
RELATIVE = 0.03


def _model(inputs: str, weights: dict[str, tuple[int, ...]], node: str) -> Model:
    text = f"""<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => (float[N] y)
        {{ [n] y = {node} }}"""
    proto = onnx.parser.parse_model(text)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return read(proto)


def _static(model: Model, ctx: PassContext) -> Model:
    """The model planned static wherever the target has a row."""
    choices = {}
    for node in model.graph:
        row = OPENVINO.support(node, "static").row
        assert row is not None, node
        spec = QuantSpec("s8", PerAxis(row.weight_axis), symmetric=True) if row.weights else None
        choices[node.name or ""] = Choice(Option("static", spec), "given")
    passes = Pipeline.parse("calibrate,place-quantizers,insert-fake-quant")
    return passes.run(model.with_fact(Plan(choices, "given")), ctx).model


@pytest.fixture
def context(calibrated: Calibrated) -> Calibrated:
    return partial(calibrated, target=OPENVINO)


@pytest.mark.parametrize("name", CASES)
def test_a_row_runs_in_integers(
    name: str, context: Calibrated, feed_of: Calibrated, agrees: Calibrated, tmp_path: Path
) -> None:
    model = _model(*CASES[name])
    artifact = lower(_static(model, context(model)), tmp_path / "m.onnx", OPENVINO)
    feed = feed_of(model, 0)
    (row,) = audit(artifact, feed).rows
    assert row.ok, row
    assert row.kernel.split()[1] in ("u8", "i8")
    source = tmp_path / "source.onnx"
    onnx.save(onnx.load_from_string(_bytes(model)), source)
    expected = open_session(source, threads=1).run(feed)
    agrees(open_session(artifact.path, threads=1).run(feed), expected, RELATIVE)


def _bytes(model: Model) -> bytes:
    import onnx_ir

    return onnx_ir.to_proto(model.ir).SerializeToString()


def test_the_cases_cover_every_row_that_computes_in_integers() -> None:
    wanted = {r.op_type for r in OPENVINO.rows if r.method == "static" and r.kernels}
    assert wanted == {name.split()[0] for name in CASES} | {"Add"}


def test_a_residual_block_runs_in_integers_with_one_quantizer_less(
    context: Calibrated, feed_of: Calibrated, tmp_path: Path
) -> None:
    shape = "float[2,16,10,10]"
    text = f"""<ir_version: 10, opset_import: ["" : 21]> g ({shape} x) => ({shape} y) {{
        [c] a = Conv <pads = [1, 1, 1, 1]> (x, w, o)  [p] b = Relu (a)
        [d] e = Conv <pads = [1, 1, 1, 1]> (b, w1, o)  [q] g = Relu (e)
        [f] h = Conv <pads = [1, 1, 1, 1]> (g, w2, o)  [n] s = Add (h, b)  [r] t = Relu (s)
        [l] y = Conv <pads = [1, 1, 1, 1]> (t, w3, o) }}"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name in ("w", "w1", "w2", "w3", "o"):
        array = rng.standard_normal((16,) if name == "o" else (16, 16, 3, 3)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = read(proto)
    weight = Choice(Option("static", QuantSpec("s8", PerAxis(0), symmetric=True)), "given")
    choices = {**dict.fromkeys("cdfl", weight), "n": Choice(Option("static"), "given")}
    passes = Pipeline.parse("calibrate,place-quantizers,insert-fake-quant")
    planned = passes.run(model.with_fact(Plan(choices, "given")), context(model)).model
    artifact = lower(planned, tmp_path / "m.onnx", OPENVINO)
    proof = audit(artifact, feed_of(model, 0))
    assert proof.ok, proof.rows
    assert proof.kernels["Convolution u8"] + proof.kernels.get("Convolution i8", 0) == 4
    # The sum is computed with what the convolution in front of it leaves: no Q between them.
    nodes = onnx.load(artifact.path).graph.node
    quantized = {node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    assert quantized == {"x", "b", "g", "t"}
