"""Sessions and the evaluator against numpy and the ONNX reference evaluator."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from octavo.backends import ort_session
from octavo.backends.ort_session import OrtEvaluator, make_session, model_session
from octavo.ir.calibration import Batches, Feed
from octavo.ir.errors import ModelError, UnknownName, UsageError, VerificationFailed
from octavo.ir.memory import release_memory
from octavo.ir.model import Model, Source
from octavo.ir.write import write

_TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N,40] x) => (float[N,30] y) {
    h = MatMul (x, w)
    [act] a = Relu (h)
    i = ArgMax <axis : int = 1> (a)
    y = Add (a, b)
}"""


def _proto() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(_TEXT)
    for name, shape in (("w", (40, 30)), ("b", (30,))):
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return proto


@pytest.fixture
def model() -> Model:
    return Model(onnx_ir.from_proto(_proto()), Source("g", "", 0))


def _x(seed: int = 0, rows: int = 3) -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(seed).standard_normal((rows, 40)).astype(np.float32)}


def _reference(proto: onnx.ModelProto) -> NDArray[Any]:
    (output,) = ReferenceEvaluator(proto).run(None, _x())
    return np.asarray(output)


def _assert_close(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    """float32 sums of 40 products, in another order."""
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


class _Listed:
    """Feeds that count how many of them were asked for."""

    samples, sha256, labels = 3, "", None

    def __init__(self) -> None:
        self.drawn = 0

    def __iter__(self) -> Any:
        for seed in range(3):
            self.drawn += 1
            yield _x(seed)


@pytest.mark.parametrize("optimization", ["all", "extended", "basic", "none"])
def test_session_computes_what_the_reference_does(
    optimization: ort_session.Optimization,
) -> None:
    proto = _proto()
    session = make_session(proto.SerializeToString(), threads=1, optimization=optimization)
    expected = _reference(proto)
    assert (session.inputs, session.outputs) == (("x",), ("y",))
    _assert_close(session.run(_x())["y"], expected)


def test_optimized_graph_is_written_without_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "optimized.onnx"
    make_session(_proto().SerializeToString(), threads=1, optimized_path=path)
    graph = onnx.load(path, load_external_data=False).graph
    weight = next(t for t in graph.initializer if t.name == "w")
    assert weight.data_location == onnx.TensorProto.EXTERNAL
    assert not weight.raw_data


def test_session_config_reaches_the_runtime(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[4] x) => (float[4] y)
    <float s = {0.1}, uint8 z = {3}> { q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z) r = Sigmoid (d) p = QuantizeLinear (r, s, z)
    y = DequantizeLinear (p, s, z) }"""
    content = onnx.parser.parse_model(text).SerializeToString()
    found = []
    for config in ({}, {"session.disable_quant_qdq": "1"}):
        path = tmp_path / f"{len(config)}.onnx"
        make_session(content, threads=1, config=config, optimized_path=path)
        graph = onnx.load(path, load_external_data=False).graph
        found.append("QLinearSigmoid" in {node.op_type for node in graph.node})
    assert found == [True, False]


def test_a_session_option_that_cannot_be_is_an_error() -> None:
    with pytest.raises(ModelError, match="does not accept the session option 'kk"):
        make_session(_proto().SerializeToString(), threads=1, config={"k" * 5000: ""})


def test_files_that_are_no_models_are_model_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as missing:
        make_session(tmp_path / "none.onnx", threads=1)
    assert "exist" in missing.value.why
    with pytest.raises(ModelError) as garbage:
        make_session(b"garbage", threads=1)
    assert garbage.value.why == "Failed to load model because protobuf parsing failed."


@pytest.mark.parametrize(
    "feed",
    [{}, {"x": np.zeros((2, 40))}, {"x": np.zeros((2, 7), np.float32)}, {"z": np.zeros(1)}],
    ids=["empty", "dtype", "shape", "name"],
)
def test_a_wrong_feed_is_a_usage_error(feed: Feed) -> None:
    session = make_session(_proto().SerializeToString(), threads=1)
    with pytest.raises(UsageError, match="does not fit"):
        session.run(feed)


def test_a_kernel_that_fails_is_no_usage_error() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[N] x, int64[M] s) => (float[K] y) { y = Reshape (x, s) }"""
    session = make_session(onnx.parser.parse_model(text).SerializeToString(), threads=1)
    feed: Feed = {"x": np.zeros(5, np.float32), "s": np.array([4], np.int64)}
    with pytest.raises(VerificationFailed, match="fails while it runs"):
        session.run(feed)
    with pytest.raises(VerificationFailed, match="fails while it runs"):
        session.bound(feed)()


def test_evaluator_returns_intermediate_values(model: Model) -> None:
    values = ["a", "x", "y", "i", "a"]
    batches = _Listed()
    for seed, found in enumerate(OrtEvaluator(threads=1).stream(model, batches, values)):
        x = _x(seed)["x"]
        weight = model.graph.initializers["w"].const_value
        assert weight is not None
        relu = np.maximum(x @ weight.numpy(), 0)
        np.testing.assert_array_equal(found["x"], x)
        _assert_close(found["a"], relu)
        np.testing.assert_array_equal(found["i"], relu.argmax(1)[:, None])
        assert set(found) == set(values)
    assert batches.drawn == 3


def test_evaluator_holds_one_feed_at_a_time(model: Model) -> None:
    batches = _Listed()
    stream = OrtEvaluator(threads=1).stream(model, batches, ["y"])
    next(stream)
    assert batches.drawn == 1


def test_evaluator_leaves_the_model_alone(model: Model) -> None:
    before = model.fingerprint
    list(OrtEvaluator(threads=1).stream(model, _Listed(), ["a"]))
    clone = Model(model.ir, model.source)
    assert clone.fingerprint == before
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_evaluator_names_an_unknown_value(model: Model) -> None:
    with pytest.raises(UnknownName, match="unknown value 'aa'"):
        list(OrtEvaluator().stream(model, _Listed(), ["aa"]))


def test_evaluator_keeps_few_sessions(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(*arguments: Any) -> ort_session.Session:
        made.append("session")
        return model_session(*arguments)

    monkeypatch.setattr(ort_session, "model_session", counted)
    evaluator = OrtEvaluator(threads=1, capacity=2)
    for values in ([], ["a"], [], ["h"], ["a"]):
        next(evaluator.stream(model, _Listed(), values)) if values else evaluator.run(model, _x())
    assert len(made) == 4  # the second [] is known, the second ["a"] was dropped


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["by file", "in memory"])
def test_weights_survive_either_way(
    model: Model, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in another file than the model's, as large models have them."""
    path = tmp_path / "model.onnx"
    onnx_ir.save(model.ir, path, external_data="weights.bin", size_threshold_bytes=0)
    external = Model(onnx_ir.load(path), model.source)
    expected = _reference(_proto())
    monkeypatch.setattr(ort_session, "_IN_MEMORY_BYTES", limit)
    session = model_session(external, threads=1)
    gc.collect()
    _assert_close(session.run(_x())["y"], expected)


def test_a_written_model_gives_the_evaluator_s_numbers(model: Model, tmp_path: Path) -> None:
    for node in model.graph:
        node.name = node.outputs[0].name
    path = tmp_path / "model.onnx"
    write(model, path)
    written = make_session(path, threads=1).run(_x())["y"]
    np.testing.assert_array_equal(OrtEvaluator(threads=1).run(model, _x())["y"], written)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_closed_session_gives_its_memory_back(tmp_path: Path) -> None:
    """64 MB of weights: no reference to the session may stay behind."""
    proto = onnx.parser.parse_model(_TEXT.replace("40", "4096").replace("30", "4096"))
    for name, shape in (("w", (4096, 4096)), ("b", (4096,))):
        array = np.ones(shape, np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    del proto, array
    release_memory()
    before = _resident_bytes()
    make_session(path, threads=1).run({"x": np.ones((1, 4096), np.float32)})
    release_memory()
    assert _resident_bytes() - before < 32 << 20


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


def test_local_functions_run() -> None:
    """FakeQuant is a function: the evaluator runs what is not an operator."""
    node = helper.make_node("Twice", ["x"], ["y"], domain="octavo")
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("octavo", 1)]
    function = helper.make_function("octavo", "Twice", ["a"], ["b"], body, opsets[:1])
    values = [helper.make_tensor_value_info(name, 1, [2]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function])
    x = np.array([1, 2], np.float32)
    made = Model(onnx_ir.from_proto(proto), Source("g", "", 0))
    np.testing.assert_array_equal(OrtEvaluator().run(made, {"x": x})["y"], 2 * x)


def test_listed_feeds_are_batches() -> None:
    batches: Batches = _Listed()
    assert batches.samples == len(list(batches))
