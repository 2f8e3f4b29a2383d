"""Nodes that stay float on targets whose speed nobody measures here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnxruntime
import pytest
from numpy.typing import NDArray

import octavo as public

_TEXT = """<ir_version: 10, opset_import: ["" : 21]> g (float[N,64] x) => (float[N,64] y)
    <float[64,96] a, float[96,96] b, float[96,64] c> {
        [first] h = MatMul (x, a) [relu] r = Relu (h)
        [second] s = MatMul (r, b) [tanh] t = Tanh (s)
        [third] y = MatMul (t, c)
    }"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One of 96 channels is so large that a scale for all leaves the others few codes."""
    proto = onnx.parser.parse_model(_TEXT)
    rng = np.random.default_rng(0)
    weights = {
        "a": rng.standard_normal((64, 96)) / 8,
        "b": rng.standard_normal((96, 96)) / 10,
        "c": rng.standard_normal((96, 64)) / 10,
    }
    weights["a"][:, 0] *= 300
    weights["b"][0] /= 3000
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(array), name))
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def _error(source: Path, other: Path, data: NDArray[np.float32]) -> float:
    """Relative, of what stock ONNX Runtime makes of two files."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    truth, found = (
        onnxruntime.InferenceSession(path, options).run(None, {"x": data})[0]
        for path in (source, other)
    )
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def test_what_costs_most_stays_float(model: Path) -> None:
    data = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    compiled = public.compile(model, target="tensorrt-sm86", calibration={"x": data})
    options = {n.node: n.option.partition(":")[0] for n in compiled.artifact.planned}
    assert {name: options[name] for name in ("first", "second", "third")} == {
        "first": "static", "second": "float", "third": "static",
    }  # fmt: skip
    (said,) = (note for note in compiled.notes if "stay float" in note)
    assert "the 1 node(s) that cost most" in said
    everywhere = float(said.split("outputs by ")[1].split(":")[0])
    assert everywhere > 0.2
    assert _error(model, compiled.artifact.path, data) <= 0.1
    reason = next(n.reason for n in compiled.artifact.planned if n.node == "second")
    assert reason == "kept float by 'second'"
