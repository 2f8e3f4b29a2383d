"""Kernels without calibration data, where ranges found at run time lose what a model answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

import octavo as public
from octavo.backends.ort_backend import OrtBackend

_TEXT = """<ir_version: 10, opset_import: ["" : 21]> g (float[N,256] x) => (float[N,256] y)
    <float[256,512] a, float[512,512] b, float[512,256] c> {
        [first] h = MatMul (x, a) [relu] r = Relu (h)
        [second] s = MatMul (r, b) [tanh] t = Tanh (s)
        [third] y = MatMul (t, c)
    }"""
_SHAPES = {"x": (64, 256)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One of 512 channels is so large that a scale for all leaves the others few codes."""
    proto = onnx.parser.parse_model(_TEXT)
    rng = np.random.default_rng(0)
    shapes = {"a": (256, 512), "b": (512, 512), "c": (512, 256)}
    weights = {name: rng.standard_normal(s) / np.sqrt(s[0]) for name, s in shapes.items()}
    weights["a"][:, 0] *= 300
    weights["b"][0] /= 900
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(array), name))
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_kernels_that_change_the_answers_are_neither_used_nor_lowered(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered: list[str] = []
    lower = OrtBackend.lower

    def spied(self: OrtBackend, planned: object, path: Path) -> object:
        lowered.append(path.parent.name)
        return lower(self, planned, path)  # type: ignore[arg-type]

    monkeypatch.setattr(OrtBackend, "lower", spied)
    compiled = public.compile(model, shapes=_SHAPES)
    (said,) = (note for note in compiled.notes if "weight-only used" in note)
    assert not any("estimated" in name for name in lowered)
    assert lowered
    assert {row.option.partition(":")[0] for row in compiled.artifact.planned} <= {
        "weight-only", "storage",
    }  # fmt: skip
    # The share that it was refused for is that of the file it would have become.
    refused = public.compile(model, shapes=_SHAPES, measure=False)
    assert {row.option for row in refused.artifact.planned} == {"dynamic:s8/axis1"}
    share = float(said.split("arg-max of ")[1].split("%")[0]) / 100
    assert refused.fidelity.agreement == pytest.approx(share, abs=1.1 / 64)
    assert share < 0.6
