"""The target openvino: what it writes computes the plan, and the audit tells what runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

import octavo as api
from octavo.backends import ov_session
from octavo.backends.ort_session import OrtEvaluator, make_session
from octavo.backends.ov_audit import audit, measure_latencies
from octavo.backends.ov_backend import OpenVinoBackend
from octavo.backends.ov_lowering import lower
from octavo.backends.ov_target import OPENVINO
from octavo.ir.errors import ModelError, UsageError
from octavo.ir.facts import Choice, Option, Placement, Plan
from octavo.ir.quant import PerAxis, PerBlock, QuantSpec
from octavo.ir.read import read
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from octavo.ir.artifact import Artifact
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

pytest.importorskip("openvino", reason="needs the extra openvino")

Calibrated = Callable[..., Any]
# Of the largest output: OpenVINO's own rounding inside a layer moves a code by one.
ONE_STEP = 0.02
MODELS = Path(__file__).resolve().parents[2] / "models"
PORTABLE = (
    "canonicalize,offer-options{portable=true,static=false},"
    "sensitivity{estimator=weight-error},allocate,place-quantizers,insert-fake-quant,clip-weights"
)


@pytest.fixture
def context(calibrated: Calibrated) -> Calibrated:
    """`context(model)`: services for passes of this target, with calibration data."""

    return partial(calibrated, target=OPENVINO)


def _compiled(model: Model, ctx: PassContext, choose: str = "choose-kernels") -> Model:
    passes = f"canonicalize,calibrate,{choose},place-quantizers,insert-fake-quant"
    return Pipeline.parse(passes).run(model, ctx).model


def _weight_bits(path: Path) -> set[str]:
    tensors = onnx.load(path).graph.initializer
    return {onnx.TensorProto.DataType.Name(t.data_type) for t in tensors if len(t.dims) > 1}


def test_a_network_runs_in_integers_and_computes_its_plan(
    tiny_model: Model, context: Calibrated, feed_of: Calibrated, agrees: Calibrated, tmp_path: Path
) -> None:
    ctx = context(tiny_model)
    planned = _compiled(tiny_model, ctx)
    artifact = lower(planned, tmp_path / "m.onnx", OPENVINO)
    feed = feed_of(tiny_model, 9)
    proof = audit(artifact, feed)
    assert proof.ok, proof.rows
    ran = {row.node: row.kernel for row in proof.rows}
    assert ran["conv"] == "Convolution u8" or ran["conv"] == "Convolution i8"
    assert ran["dense"].split()[1] in ("u8", "i8")
    assert _weight_bits(artifact.path) == {"INT8"}
    # The graph between passes defines what the plan computes; stock ONNX Runtime runs it.
    expected = OrtEvaluator(threads=1, optimization="none").run(planned, feed)
    actual = ov_session.open_session(artifact.path, threads=1).run(feed)
    agrees(actual, expected, ONE_STEP)


def test_only_standard_operators_are_written(
    tiny_model: Model, context: Calibrated, tmp_path: Path
) -> None:
    artifact = lower(_compiled(tiny_model, context(tiny_model)), tmp_path / "m.onnx", OPENVINO)
    graph = onnx.load(artifact.path).graph
    assert {node.domain for node in graph.node} == {""}
    assert "DequantizeLinear" in {node.op_type for node in graph.node}
    zeros = [onnx.numpy_helper.to_array(t) for t in graph.initializer if "zero" in t.name]
    assert zeros
    assert not any(array.any() for array in zeros)


def test_codes_are_unsigned_where_nothing_is_negative(
    tiny_model: Model, context: Calibrated
) -> None:
    placed = _compiled(tiny_model, context(tiny_model)).fact(Placement)
    types = {name: site.spec.dtype for name, site in placed.sites.items()}
    assert types["x"] == "s8"
    # Behind the Relu, and what pooling and Flatten make of it.
    assert {types[name] for name in types if name != "x"} == {"u8"}


def test_a_second_quantizer_behind_movement_is_left_out(
    context: Calibrated, tmp_path: Path
) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    moves (float[N,4,6] x) => (float[N,6,3] y) <float[4,3] w = {0}> {
        [turn] t = Transpose <perm: ints = [0, 2, 1]> (x)
        [dense] y = MatMul (t, w)
    }"""
    proto = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    model = read(proto)
    planned = _compiled(model, context(model))
    assert set(planned.fact(Placement).sites) == {"x", "t"}
    graph = onnx.load(lower(planned, tmp_path / "m.onnx", OPENVINO).path).graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 1


@pytest.mark.parametrize("dtype", ["s4", "s8"])
def test_blocks_stay_packed_and_the_audit_sees_it(
    dtype: Any, context: Calibrated, feed_of: Calibrated, tmp_path: Path
) -> None:
    weight = np.random.default_rng(1).standard_normal((64, 48)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="dense")],
        "dense",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 64])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 48])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opset = [onnx.helper.make_opsetid("", 21)]
    model = read(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10))
    option = Option("weight-only", QuantSpec(dtype, PerBlock(0, 32), symmetric=True))
    artifact, planned = _lowered(model, option, context(model), tmp_path)
    feed = feed_of(model, 3)
    proof = audit(artifact, feed)
    assert proof.ok, proof.rows
    assert proof.rows[0].kernel.startswith("FullyConnected")
    expected = OrtEvaluator(threads=1, optimization="none").run(planned, feed)["y"]
    actual = ov_session.open_session(artifact.path, threads=1).run(feed)["y"]
    # Products of floats with exact weights: no activation is quantized on the way.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def _lowered(
    model: Model, option: Option, ctx: PassContext, folder: Path
) -> tuple[Artifact, Model]:
    plan = Plan({node.name or "": Choice(option, "given") for node in model.graph}, "given")
    planned = Pipeline.parse("place-quantizers,insert-fake-quant").run(model.with_fact(plan), ctx)
    return lower(planned.model, folder / "m.onnx", OPENVINO), planned.model


def test_the_audit_fails_what_runs_in_float(
    tiny_model: Model, context: Calibrated, feed_of: Calibrated, tmp_path: Path
) -> None:
    artifact = lower(_compiled(tiny_model, context(tiny_model)), tmp_path / "m.onnx", OPENVINO)
    proto = onnx.load(artifact.path)
    # The weight of the convolution as floats: nothing tells OpenVINO to compute in integers.
    (conv,) = (node for node in proto.graph.node if node.op_type == "Conv")
    kernel = np.ones((8, 3, 3, 3), np.float32)
    kernel[0, 0] = 0.123
    proto.graph.initializer.append(onnx.numpy_helper.from_array(kernel, "as_float"))
    conv.input[1] = "as_float"
    onnx.save(proto, artifact.path)
    rows = {row.node: row for row in audit(artifact, feed_of(tiny_model, 9)).rows}
    assert not rows["conv"].ok
    assert rows["conv"].reason.startswith("openvino runs it as Convolution in f32")
    assert rows["dense"].ok


def test_latencies_cover_the_planned_nodes(
    tiny_model: Model, context: Calibrated, feed_of: Calibrated, tmp_path: Path
) -> None:
    planned = _compiled(tiny_model, context(tiny_model))
    artifact = lower(planned, tmp_path / "m.onnx", OPENVINO)
    source = tmp_path / "source.onnx"
    onnx.save(onnx.load_from_string(_bytes(tiny_model)), source)
    found = measure_latencies(source, artifact, feed_of(tiny_model, 9), threads=1)
    assert set(found.by_node["conv"]) == {"float", "static"}
    assert set(found.by_node["dense"]) == {"float", "static"}
    assert found.environment.startswith("openvino 20")
    (timing,) = OpenVinoBackend(OPENVINO).time_nodes(
        [artifact], feed_of(tiny_model, 9), threads=1, seconds_limit=0.05
    )
    assert sum(timing.by_node.values()) == pytest.approx(timing.seconds, rel=1e-9)


def _bytes(model: Model) -> bytes:
    import onnx_ir

    return onnx_ir.to_proto(model.ir).SerializeToString()


def test_a_plan_of_another_target_is_refused(
    tiny_model: Model, context: Calibrated, tmp_path: Path
) -> None:
    option = Option("static", QuantSpec("s4", PerAxis(0), symmetric=True))
    plan = Plan({"conv": Choice(option, "given")}, "given")
    planned = tiny_model.with_fact(plan)
    with pytest.raises(UsageError, match="no kernel of openvino runs the option") as error:
        lower(planned, tmp_path / "m.onnx", OPENVINO)
    assert error.value.where == "node 'conv'"


def test_errors_of_the_runtime_are_octavos(
    tiny_model: Model, context: Calibrated, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    onnx.save(onnx.helper.make_model(graph), broken)
    with pytest.raises(ModelError, match="openvino does not load the model") as error:
        ov_session.open_session(broken, threads=1)
    assert "NoSuchOperator" in str(error.value)
    artifact = lower(_compiled(tiny_model, context(tiny_model)), tmp_path / "m.onnx", OPENVINO)
    session = ov_session.open_session(artifact.path, threads=1)
    wrong = [
        ({"x": np.zeros((1, 2, 8, 8), np.float32)}, "has the shape"),
        ({"x": np.zeros((1, 3, 8, 8), np.float64)}, "is float64, not float32"),
        ({}, "is missing"),
    ]
    for feed, why in wrong:
        with pytest.raises(UsageError, match="does not fit the model") as refused:
            session.run(feed)
        assert why in refused.value.why


def test_portable_files_for_onnx_runtime_run_here_too(tmp_path: Path) -> None:
    """The same file on both runtimes, beside the float model: blocks of 4 and 8 bits, float16."""
    compiled = api.compile(
        MODELS / "fashion_vit.onnx", calibration=MODELS / "fashion.npz", portable=True, size="22%",
        pipeline=PORTABLE, measure=False,
    )  # fmt: skip
    compiled.save(tmp_path / "out")
    path = tmp_path / "out" / "model.onnx"
    assert {"INT4", "FLOAT16"} <= _weight_bits(path)
    with np.load(MODELS / "fashion_test.npz") as data:
        feed = {"input": data["input"][:64]}
    source, here, there = (
        next(iter(session.run(feed).values()))
        for session in (
            make_session(MODELS / "fashion_vit.onnx", threads=1),
            ov_session.open_session(path, threads=1),
            make_session(path, threads=1),
        )
    )
    reach = np.linalg.norm(source)
    assert np.linalg.norm(here - there) <= ONE_STEP * reach
    assert np.linalg.norm(here - source) <= 3 * ONE_STEP * reach
    assert (here.argmax(-1) == there.argmax(-1)).mean() >= 0.95
