"""Kernels without calibration data, where ranges found at run time lose what a model answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

import octavo as public
from octavo.backends.ort_backend import OrtBackend
from octavo.cli.measured import Measured

if TYPE_CHECKING:
    from octavo.ir.artifact import Artifact
    from octavo.ir.model import Model

_TEXT = """<ir_version: 10, opset_import: ["" : 21]> g (float[N,256] x) => (float[N,256] y)
    <float[256,512] a, float[512,512] b, float[512,256] c> {
        [first] h = MatMul (x, a) [relu] r = Relu (h)
        [second] s = MatMul (r, b) [tanh] t = Tanh (s)
        [third] y = MatMul (t, c)
    }"""
_SHAPES = {"x": (64, 256)}


def _model(path: Path, seed: int, largest: float) -> Path:
    """One of 512 channels is so large that a scale for all leaves the others few codes."""
    proto = onnx.parser.parse_model(_TEXT)
    rng = np.random.default_rng(seed)
    shapes = {"a": (256, 512), "b": (512, 512), "c": (512, 256)}
    weights = {name: rng.standard_normal(s) / np.sqrt(s[0]) for name, s in shapes.items()}
    weights["a"][:, 0] *= largest
    weights["b"][0] /= 3 * largest
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(array), name))
    onnx.save(proto, path)
    return path


def test_kernels_that_change_the_answers_are_neither_used_nor_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(tmp_path / "model.onnx", 0, 300)
    lowered: list[str] = []
    lower = OrtBackend.lower

    def spied(self: OrtBackend, planned: Model, path: Path) -> Artifact:
        lowered.append(path.parent.name)
        return lower(self, planned, path)

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


@pytest.mark.parametrize(("bits", "method"), [(4, "weight-only"), (8, "storage")])
def test_stored_weights_replace_slower_kernels_only_where_they_answer_alike(
    bits: int, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale per channel instead of one per block costs answers at few bits, none at eight."""

    def speeds(self: Measured, artifacts: list[Artifact]) -> list[float]:
        return [0.8, 1.1][: len(artifacts)]

    monkeypatch.setattr(Measured, "speeds", speeds)
    model = _model(tmp_path / "model.onnx", 0, 300)
    text = f"canonicalize,choose-kernels{{static=false,bits={bits},block-size=16}}"
    compiled = public.compile(model, pipeline=f"{text},insert-fake-quant", shapes=_SHAPES)
    assert {row.option.partition(":")[0] for row in compiled.artifact.planned} == {method}
    said = [note for note in compiled.notes if "slower than float here" in note]
    (note,) = [text for text in said if "artifact" not in text]
    assert ("not used" in note) == (method == "weight-only")


def test_kernels_that_are_asked_for_stay_where_they_are_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measured, "speeds", lambda self, artifacts: [0.8, 1.1][: len(artifacts)])
    model = _model(tmp_path / "model.onnx", 0, 300)
    text = "canonicalize,choose-kernels{weight-only=true,bits=8,block-size=32},insert-fake-quant"
    compiled = public.compile(model, pipeline=text, shapes=_SHAPES)
    assert {row.option.partition(":")[0] for row in compiled.artifact.planned} == {"weight-only"}
    assert not any("only stored" in note for note in compiled.notes)


def test_what_pruning_costs_is_not_held_against_a_kernel(tmp_path: Path) -> None:
    model = _model(tmp_path / "model.onnx", 3, 60)
    data = np.random.default_rng(4).standard_normal((64, 256)).astype(np.float32)
    text = "canonicalize,prune-channels{ratio=0.08,repair=none},choose-kernels{static=false}"
    compiled = public.compile(
        model, pipeline=f"{text},insert-fake-quant", calibration={"x": data}, shapes=_SHAPES
    )
    # Beside the source both kernels lose more rows than are allowed, weight-only ones fewer.
    assert compiled.fidelity.agreement is not None
    assert compiled.fidelity.agreement < 0.6
    assert not any("weight-only used" in note for note in compiled.notes)
