"""The files of an artifact read back as they were written, and damage is noticed."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from octavo.ir.arrays_io import read_arrays, write_arrays
from octavo.ir.artifact import Artifact, Audit, AuditRow, PlannedNode, Probes
from octavo.ir.artifact_io import (
    AUDIT,
    MODEL,
    PLAN,
    PROBES,
    Manifest,
    read_artifact,
    read_probes,
    write_artifact,
    write_probes,
)
from octavo.ir.errors import UsageError, VerificationFailed
from octavo.ir.facts import Choice, Option, Plan
from octavo.ir.model import Source
from octavo.ir.output_folder import MANIFEST
from octavo.ir.quant import PerAxis, QuantSpec

_STATIC = Option("static", QuantSpec("s8", PerAxis(0), symmetric=True))
_NODES = (
    PlannedNode(
        "conv", "Conv", str(_STATIC), "fast", "y", ("a::QLinearConv",), 10, 40, seconds={"s": 1e-3}
    ),
    PlannedNode("relu", "Relu", "static", "", "y", (), 0, 0, absorbed_by="conv"),
)
_AUDIT = Audit(
    rows=(AuditRow("conv", "Conv", str(_STATIC), "a::QLinearConv", True, "", 1e-3),),
    findings=("a finding",),
    kernels={"a::QLinearConv": 1},
    environment="here",
)
_PROBES = Probes(
    feeds=({"x": np.arange(4, dtype=np.float32)}, {"x": np.zeros(4, np.float32)}),
    outputs=({"y.npy": np.array([1], np.int64)}, {"y.npy": np.array([2], np.int64)}),
)
_MANIFEST = Manifest(
    Source("/secret/place/net.onnx", "ab" * 32, 123),
    target="ort-cpu",
    pipeline="canonicalize",
    seed=7,
    calibration_sha256="cd" * 32,
    calibration_samples=8,
    config={"threads": 1, "keep_float": ""},
    results={"bytes": 5, "relative_output_error": 0.25},
)


def _write(folder: Path) -> Manifest:
    folder.mkdir()
    (folder / MODEL).write_bytes(b"model")
    (folder / f"{MODEL}.data").write_bytes(b"weights")
    artifact = Artifact(folder / MODEL, "ort-cpu", _NODES, {"session.key": "1"})
    plan = Plan({"conv": Choice(_STATIC, "fast", {"static": 1e-3})}, "analytic")
    return write_artifact(artifact, _MANIFEST, plan=plan, audit=_AUDIT, probes=_PROBES)


def test_everything_reads_back(tmp_path: Path) -> None:
    written = _write(tmp_path / "out")
    saved = read_artifact(tmp_path / "out")
    assert saved.manifest == written
    assert saved.artifact.planned == _NODES
    assert saved.artifact.session_options == {"session.key": "1"}
    assert saved.artifact.bytes == len(b"model") + len(b"weights")
    assert (saved.plan_source, saved.audit) == ("analytic", _AUDIT)
    assert saved.damaged_files() == ()
    for stored, given in zip(
        (*saved.probes().feeds, *saved.probes().outputs),
        (*_PROBES.feeds, *_PROBES.outputs),
        strict=True,
    ):
        assert stored.keys() == given.keys()
        for name, array in given.items():
            np.testing.assert_array_equal(stored[name], array)
            assert stored[name].dtype == array.dtype


def test_a_rebuild_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _write(tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_manifest_names_no_place_and_no_time(tmp_path: Path) -> None:
    _write(tmp_path / "out")
    text = (tmp_path / "out" / MANIFEST).read_text(encoding="utf-8")
    assert "secret" not in text
    assert str(tmp_path) not in text
    content = json.loads(text)
    assert content["source"]["name"] == "net.onnx"
    assert content["files"].keys() == {MODEL, f"{MODEL}.data", PROBES}
    assert not {"seconds", "time", "date", "host"} & set(content)


def test_an_artifact_without_its_model_is_not_written(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path / MODEL, "ort-cpu", ())
    with pytest.raises(FileNotFoundError):
        write_artifact(artifact, _MANIFEST, plan=None, audit=_AUDIT, probes=_PROBES)
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (MODEL, b"modle", "not the file that was written"),
        (MODEL, b"longer than before", "18 bytes, the manifest says 5"),
        (f"{MODEL}.data", None, "cannot be read"),
    ],
)
def test_a_changed_file_is_found(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    _write(tmp_path / "out")
    path = tmp_path / "out" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    (problem,) = read_artifact(tmp_path / "out").damaged_files()
    assert problem.startswith(name)
    assert says in problem


def test_a_folder_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an octavo artifact"):
        read_artifact(tmp_path)


@pytest.mark.parametrize("name", [MANIFEST, PLAN, AUDIT])
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": 1, "format": 1}'])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    _write(tmp_path / "out")
    (tmp_path / "out" / name).write_text(content, encoding="utf-8")
    with pytest.raises(VerificationFailed, match=f"{name} is damaged"):
        read_artifact(tmp_path / "out")


def test_a_manifest_that_points_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    content["files"]["../elsewhere"] = {"sha256": "", "bytes": 0}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(VerificationFailed, match="damaged") as caught:
        read_artifact(tmp_path / "out")
    assert "points out of the folder" in caught.value.why


def test_damaged_probes_are_named(tmp_path: Path) -> None:
    _write(tmp_path / "out")
    (tmp_path / "out" / PROBES).write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(VerificationFailed, match=r"probes\.npz is damaged"):
        read_artifact(tmp_path / "out").probes()


def test_probes_of_text_and_of_any_name_survive(tmp_path: Path) -> None:
    names = ("file", "a/b:0", "x.npy", "é", "0.in.y")
    feed = {name: np.array([name, "z"], dtype=object) for name in names}
    write_probes(Probes((feed,), ({},)), tmp_path / PROBES)
    (stored,) = read_probes(tmp_path / PROBES).feeds
    assert {name: array.tolist() for name, array in stored.items()} == {
        name: [name, "z"] for name in names
    }


def test_archives_carry_no_date(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", {"x": np.zeros(2)})
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert [entry.date_time for entry in archive.infolist()] == [(1980, 1, 1, 0, 0, 0)]


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(2))
    with pytest.raises(ValueError, match="no zip archive"):
        read_arrays(tmp_path / "a.npy")
