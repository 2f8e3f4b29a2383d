"""Kernel times against a profile with known numbers, and their attribution on real runs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from octavo.backends import ort_profile
from octavo.backends.ort_profile import Subject, measure_latencies, origin, profile
from octavo.ir.artifact import PlannedNode
from octavo.ir.calibration import Feed

_HEADER = '<ir_version: 10, opset_import: ["" : 21]> g'
_CONV = "Conv <pads : ints = [1,1,1,1]>"
_SHAPES = {"w": (16, 8, 3, 3), "b": (16,), "m": (32, 16, 1, 1)}
_FLOAT = f"""(float[1,8,32,32] x) => (y) {{ [conv] c = {_CONV} (x, w, b)  [relu] r = Relu (c)
    [head] h = Conv (r, m)  [gate] y = HardSigmoid (h) }}"""
_STATIC = f"""(float[1,8,32,32] x) => (y)
    <float a = {{0.05}}, uint8 z = {{0}}, uint8 i = {{128}}, float ws = {{0.01}}> {{
    [x_q] x_q = QuantizeLinear (x, a, i)  [x_dq] x_dq = DequantizeLinear (x_q, a, i)
    [w_dq] w_dq = DequantizeLinear (w, ws)  [conv] c = {_CONV} (x_dq, w_dq, b)  [relu] r = Relu (c)
    [r_q] r_q = QuantizeLinear (r, a, z)  [r_dq] r_dq = DequantizeLinear (r_q, a, z)
    [m_dq] m_dq = DequantizeLinear (m, ws)  [head] h = Conv (r_dq, m_dq)
    [h_q] h_q = QuantizeLinear (h, a, i)  [h_dq] h_dq = DequantizeLinear (h_q, a, i)
    [gate] y = HardSigmoid (h_dq) }}"""


def _saved(path: Path, text: str, codes: bool) -> Path:
    proto = onnx.parser.parse_model(f"{_HEADER} {text}")
    rng = np.random.default_rng(0)
    for name, shape in _SHAPES.items():
        array = rng.standard_normal(shape).astype(np.float32)
        if codes and name != "b":
            array = (array * 30).astype(np.int8)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(proto, path)
    return path


def _planned(
    node: str, op_type: str, output: str, option: str, absorbed_by: str = ""
) -> PlannedNode:
    return PlannedNode(node, op_type, option, "", output, (), 0, 0, absorbed_by)


def _x() -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(0).standard_normal((1, 8, 32, 32)).astype(np.float32)}


@pytest.mark.parametrize(
    ("node", "source"),
    [
        ("conv", "conv"),
        ("conv_token_17", "conv"),
        ("relu_out_nchwc", "relu_out"),
        ("a_token_3_nchwc", "a"),
        ("dense/MatMulAddFusion", "dense"),
        ("qk/MatMulScaleFusion/", "qk"),
        ("x_dq/duplicated_token_4", "x_dq"),
        ("a_token_b", "a_token_b"),
    ],
)
def test_names_lose_what_the_optimizers_appended(node: str, source: str) -> None:
    assert origin(node) == source


@dataclass(frozen=True)
class _Replayed:
    """A session whose profile is given."""

    events: Sequence[dict[str, Any]]
    path: Path
    inputs: tuple[str, ...] = ()

    def bound(self, feed: Feed) -> Callable[[], None]:
        return lambda: None

    def end_profiling(self) -> Path:
        self.path.write_text(json.dumps(list(self.events)))
        return self.path


def _event(name: str, micros: int, **arguments: object) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": micros, "args": arguments}


def test_the_least_time_counts_and_the_warm_up_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {
        "input_type_shape": [{"float": [1, 3]}, {"int8": [5]}],
        "output_type_shape": [{"uint8": [2, 3, 4]}],
    }
    events = [
        {"cat": "Session", "name": "model_run", "dur": 99},
        {"cat": "Node", "name": "conv_fence_before", "dur": 99, "args": {}},
        *(_event("conv", t, op_name="Conv", **shapes) for t in (1, 9, 5, 7)),
        *(_event("body", t, op_name="Add") for t in (1, 1, 1, 4, 3, 5, 8, 3, 6, 3, 7, 7)),
    ]
    replayed = _Replayed(events, tmp_path / "events.json")
    monkeypatch.setattr(ort_profile, "make_session", lambda *_, **__: replayed)
    ((conv, body),) = (p.kernels for p in profile([Subject(Path("m"))], {}, rounds=3))
    assert conv.seconds == pytest.approx(5e-6)
    assert (conv.op_type, *conv.names) == ("Conv", "conv")
    assert conv.inputs == (("float", 3), ("int8", 5))
    assert conv.outputs == (("uint8", 24),)
    assert body.seconds == pytest.approx(3 * 3e-6)  # three calls in every run


def test_profiles_of_real_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = _saved(tmp_path / "q.onnx", _STATIC, codes=True)
    (found,) = profile([Subject(path, read_graph=True)], _x(), rounds=2)
    assert found.graph is not None
    assert {kernel.node for kernel in found.kernels} == {node.name for node in found.graph.node}
    integer = [kernel for kernel in found.kernels if kernel.op_type == "QLinearConv"]
    assert [kernel.inputs[0][0] for kernel in integer] == ["uint8", "uint8"]
    assert integer[0].outputs == (("uint8", 16 * 32 * 32),)
    assert all(0 <= kernel.seconds < 1 for kernel in found.kernels)
    assert not list(scratch.iterdir())


def test_seconds_go_to_the_decisions(tmp_path: Path) -> None:
    source = _saved(tmp_path / "f.onnx", _FLOAT, codes=False)
    lowered = _saved(tmp_path / "q.onnx", _STATIC, codes=True)
    planned = (
        _planned("conv", "Conv", "r", "static:s8/tensor"),
        _planned("relu", "Relu", "r", "static:s8/tensor", absorbed_by="conv"),
        _planned("head", "Conv", "h", "static:s8/tensor"),
        _planned("gate", "HardSigmoid", "y", "float"),
        _planned("lost", "Conv", "nothing", "static:s8/tensor"),
    )
    found = measure_latencies(source, lowered, planned, _x())
    # Conv, Relu and the Conv with HardSigmoid are one float kernel each, called after the last.
    assert set(found.by_node["conv"]) == set(found.by_node["head"]) == {"float", "static"}
    assert found.by_node["relu"] == found.by_node["gate"] == {"float": 0.0}
    assert found.by_node["lost"] == {}
    assert "1 thread(s)" in found.environment
    conv, head = found.by_node["conv"], found.by_node["head"]
    assert 0 < conv["static"] < 0.1
    # 2.25 times the multiplications of the other one; kernels of like efficiency.
    assert conv["float"] > head["float"] > 0
    assert 0 < found.quantize_seconds_per_byte < 1e-6
    assert 0 < found.dequantize_seconds_per_byte < 1e-6


def test_a_weightless_node_without_kernel_takes_no_time(tmp_path: Path) -> None:
    """A Transpose pair cancels; nothing of it is left to run."""
    text = """(float[1,8,32,32] x) => (y) { [there] t = Transpose <perm : ints = [0,2,3,1]> (x)
        [back] s = Transpose <perm : ints = [0,3,1,2]> (t)  [exp] y = Exp (s) }"""
    path = _saved(tmp_path / "f.onnx", text, codes=False)
    planned = (
        _planned("there", "Transpose", "t", "static"),
        _planned("exp", "Exp", "y", "float"),
    )
    found = measure_latencies(path, path, planned, _x())
    assert found.by_node["there"] == {"float": 0.0, "static": 0.0}
    assert found.by_node["exp"]["float"] > 0


def test_rates_without_any_quantizer_are_nominal(tmp_path: Path) -> None:
    path = _saved(tmp_path / "f.onnx", _FLOAT, codes=False)
    found = measure_latencies(path, path, (), _x())
    assert found.by_node == {}
    assert found.quantize_seconds_per_byte == found.dequantize_seconds_per_byte == 1 / 8e9


def test_rates_are_per_byte_of_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [
        _event(name, micros, op_name=op, output_type_shape=[{"uint8": [elements]}])
        for name, op, micros, elements in (
            ("a", "QuantizeLinear", 10, 1000),
            ("b", "QuantizeLinear", 30, 3000),
            ("c", "DequantizeLinear", 8, 1000),
        )
        for _ in range(6)
    ]
    replayed = _Replayed(events, tmp_path / "events.json")
    path = _saved(tmp_path / "f.onnx", _FLOAT, codes=False)

    def replay(*_: object, **options: Any) -> _Replayed:
        if options["optimized_path"] is not None:
            graph = helper.make_graph([], "g", [], [])
            onnx.save(helper.make_model(graph), options["optimized_path"])
        return replayed

    monkeypatch.setattr(ort_profile, "make_session", replay)
    found = measure_latencies(path, path, (), {})
    assert found.quantize_seconds_per_byte == pytest.approx(40e-6 / (4 * 4000))
    assert found.dequantize_seconds_per_byte == pytest.approx(8e-6 / (4 * 1000))
