"""Whole models through `octavo.compile`: smaller, as accurate, proven, and again the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import octavo as api
from octavo.backends.ort_session import make_session
from octavo.cli.compilation import Compiled
from octavo.ir.cache import Cache
from octavo.ir.errors import OctavoError, UnknownName, UsageError

MODELS = Path(__file__).resolve().parents[2] / "models"
DATA = MODELS / "fashion.npz"
NETWORKS = ("resnet", "mobile", "vit", "lstm")
EVIDENCE = {"manifest.json", "plan.json", "passes.jsonl", "audit.json", "report.html"}
FILES = {"model.onnx", "probes.npz", *EVIDENCE}
# Node names weigh in a network of 70 kB.
BYTES_RATIO = {"mobile": 0.45}
ACCURACY_DROP = 0.01
OctavoCommand = Callable[..., Any]


@dataclass(frozen=True)
class Result:
    """A compiled network, and the cache its measurements are in."""

    source: Path
    compiled: Compiled
    folder: Path
    cache: Cache
    sha256: str


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module", params=NETWORKS)
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Each shipped network, compiled once with its calibration data."""
    source = MODELS / f"fashion_{request.param}.onnx"
    folder = tmp_path_factory.mktemp(request.param)
    before, cache = sha256(source), Cache(folder / "cache")
    compiled = api.compile(source, calibration=DATA, cache=cache)
    compiled.save(folder / "out")
    return Result(source, compiled, folder / "out", cache, before)


def accuracy(path: Path) -> float:
    with np.load(MODELS / "fashion_test.npz") as data:
        images, labels = data["input"], data["label"]
    session = make_session(path, threads=2)
    (name,) = session.inputs
    right = 0
    for at in range(0, len(images), 250):
        (scores,) = session.run({name: images[at : at + 250]}).values()
        right += int((np.asarray(scores).argmax(1) == labels[at : at + 250]).sum())
    return right / len(images)


def test_the_artifact_is_proven(result: Result) -> None:
    assert {path.name for path in result.folder.iterdir()} == FILES
    assert result.compiled.audit.ok, [r for r in result.compiled.audit.rows if not r.ok]
    assert any(row.option != "float" for row in result.compiled.audit.rows)


def test_the_artifact_is_small(result: Result) -> None:
    network = result.source.stem.removeprefix("fashion_")
    size = (result.folder / "model.onnx").stat().st_size
    assert size <= BYTES_RATIO.get(network, 0.3) * result.source.stat().st_size


def test_the_artifact_is_accurate(result: Result) -> None:
    before, after = accuracy(result.source), accuracy(result.folder / "model.onnx")
    assert before > 0.85
    assert after >= before - ACCURACY_DROP


def test_the_source_is_not_touched(result: Result) -> None:
    assert sha256(result.source) == result.sha256
    manifest = json.loads((result.folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["source"]["sha256"] == result.sha256


def test_a_rebuild_gives_the_same_bytes(result: Result, tmp_path: Path) -> None:
    again = api.compile(result.source, calibration=DATA, cache=result.cache)
    again.save(tmp_path / "out")
    for name in ("model.onnx", "manifest.json", "plan.json", "probes.npz"):
        assert (tmp_path / "out" / name).read_bytes() == (result.folder / name).read_bytes(), name


def test_verify_accepts_what_was_built(octavo: OctavoCommand, result: Result) -> None:
    outcome = octavo("verify", result.folder)
    assert (outcome.code, outcome.err) == (0, "")


def test_a_loaded_artifact_computes_its_probes(result: Result) -> None:
    session = api.load(result.folder)
    for feed, expected in zip(
        result.compiled.probes.feeds, result.compiled.probes.outputs, strict=True
    ):
        actual = session.run(feed)
        assert list(actual) == list(expected)
        for name, truth in expected.items():
            np.testing.assert_array_equal(actual[name], truth)


@pytest.mark.parametrize("name", ["model.onnx", "probes.npz"])
def test_verify_notices_a_changed_byte(
    octavo: OctavoCommand, artifact: Path, tmp_path: Path, name: str
) -> None:
    changed = shutil.copytree(artifact, tmp_path / "changed") / name
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    outcome = octavo("verify", changed.parent)
    assert outcome.code == 4
    assert name in outcome.err


def test_verify_notices_other_outputs(
    octavo: OctavoCommand, artifact: Path, tmp_path: Path
) -> None:
    """Hashes that fit do not hide a model that computes something else."""
    changed = shutil.copytree(artifact, tmp_path / "changed")
    model = onnx.load(changed / "model.onnx")
    bias = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    array = onnx.numpy_helper.to_array(bias) * np.float32(3)
    bias.CopyFrom(onnx.numpy_helper.from_array(array, bias.name))
    onnx.save(model, changed / "model.onnx")
    manifest = json.loads((changed / "manifest.json").read_text(encoding="utf-8"))
    entry = manifest["files"]["model.onnx"]
    entry["sha256"] = sha256(changed / "model.onnx")
    entry["bytes"] = (changed / "model.onnx").stat().st_size
    (changed / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    outcome = octavo("verify", changed)
    assert outcome.code == 4
    assert "probe outputs differ" in outcome.err


NETWORK = MODELS / "fashion_resnet.onnx"


def test_float_nodes_stay_float(tmp_path: Path) -> None:
    kept = next(n.name or "" for n in api.read(NETWORK).graph if n.op_type == "Conv")
    free = api.compile(NETWORK, calibration=DATA, measure=False)
    held = api.compile(NETWORK, calibration=DATA, measure=False, keep_float=[kept, "type:Gemm"])
    rows = {row.node: row for row in held.audit.rows}
    assert {r.node: r.option.partition(":")[0] for r in free.audit.rows}[kept] == "static"
    assert rows[kept].option == "float"
    assert "QLinear" not in rows[kept].kernel
    assert "Conv" in rows[kept].kernel
    assert rows[kept].reason == f"kept float by '{kept}'"
    assert not [row for row in held.audit.rows if row.op_type == "Gemm" and row.option != "float"]
    held.save(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["config"]["keep_float"] == f"{kept} type:Gemm"


def test_a_float_pattern_must_match() -> None:
    with pytest.raises(UsageError, match="selects no node") as error:
        api.compile(NETWORK, measure=False, keep_float=["type:Convolution"])
    assert "type:Conv" in error.value.hint


def test_without_measuring_the_plan_rests_on_estimates() -> None:
    found = api.compile(NETWORK, calibration=DATA, measure=False)
    assert found.notes == ("latency was not measured: the plan rests on estimates",)
    assert found.audit.ok


@pytest.mark.parametrize(("most", "probes"), [(0, 1), (1 << 20, 2)])
def test_outputs_that_take_many_bytes_are_kept_for_one_probe(
    most: int, probes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.cli.measured._KEPT_BYTES", most)
    compiled = api.compile(NETWORK, calibration=DATA, pipeline="int8-dynamic", measure=False)
    assert len(compiled.probes.feeds) == len(compiled.probes.outputs) == probes


def test_a_pipeline_text_is_obeyed() -> None:
    text = "canonicalize,choose-kernels{dynamic=false},insert-fake-quant"
    found = api.compile(NETWORK, pipeline=text, measure=False)
    assert str(found.pipeline).split(",")[0] == "canonicalize"
    assert [record.spec.partition("{")[0] for record in found.records] == [
        "canonicalize",
        "choose-kernels",
        "insert-fake-quant",
    ]
    assert {row.option.partition(":")[0] for row in found.audit.rows} <= {"storage", "float"}
    assert found.fidelity.relative_error < 0.02


@pytest.mark.parametrize(("target", "pipeline"), [("ort-cpuu", "int8"), ("ort-cpu", "int9")])
def test_unknown_names_have_near_misses(target: str, pipeline: str) -> None:
    with pytest.raises(UnknownName, match="unknown") as error:
        api.compile(NETWORK, measure=False, target=target, pipeline=pipeline)
    assert "did you mean" in error.value.hint


def test_a_loaded_folder_must_be_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(OctavoError):
        api.load(tmp_path)
