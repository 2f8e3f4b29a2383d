"""`--target openvino` from end to end: compile, load, verify, and bench beside ONNX Runtime."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import octavo as api
from octavo.backends import ov_session
from octavo.ir.artifact_io import read_artifact

Octavo = Callable[..., Any]
DATA = Path(__file__).resolve().parents[2] / "models" / "fashion.npz"


def test_without_the_wheel_the_extra_is_named_before_anything_runs(
    octavo: Octavo, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    ov_session.runtime.cache_clear()
    result = octavo("compile", network, "-c", DATA, "--target", "openvino", "-o", tmp_path / "out")
    ov_session.runtime.cache_clear()
    assert result.code == 2
    assert "the target openvino needs OpenVINO" in result.err
    assert "pip install 'octavo[openvino]'" in result.err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def compiled(network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from octavo.cli.main import main

    pytest.importorskip("openvino", reason="needs the extra openvino")
    out = tmp_path_factory.mktemp("openvino") / "out"
    arguments = ("compile", str(network), "-c", str(DATA), "-o", str(out), "--target", "openvino")
    assert main([*arguments, "--no-measure"]) == 0
    return out


def test_the_artifact_runs_in_integers_and_agrees_with_its_source(
    compiled: Path, network: Path
) -> None:
    saved = read_artifact(compiled)
    assert saved.manifest.target == "openvino"
    assert saved.manifest.session_options["INFERENCE_PRECISION_HINT"] == "f32"
    assert saved.audit.ok
    assert saved.audit.environment.startswith("openvino 20")
    convolutions = [row for row in saved.audit.rows if row.op_type == "Conv"]
    assert convolutions
    assert {row.kernel for row in convolutions} <= {"Convolution u8", "Convolution i8"}
    with np.load(DATA) as data:
        feed = {"input": data["input"][:64]}
    session = api.load(compiled)
    assert isinstance(session, ov_session.OvSession)
    (actual,) = session.run(feed).values()
    (expected,) = ov_session.open_session(network, threads=1).run(feed).values()
    assert (actual.argmax(-1) == expected.argmax(-1)).mean() >= 0.95
    assert np.linalg.norm(actual - expected) < 0.1 * np.linalg.norm(expected)


def test_it_is_verified_and_timed_beside_an_artifact_of_onnxruntime(
    octavo: Octavo, compiled: Path, artifact: Path
) -> None:
    assert octavo("verify", compiled).code == 0
    arguments = ("--rounds", "5", "--seconds", "0.2", "--shape", "input=1x1x28x28", "--json")
    timed = octavo("bench", artifact, compiled, *arguments)
    assert timed.code == 0, timed.err
    content = json.loads(timed.out)
    assert "onnxruntime" in content["environment"]
    assert "openvino" in content["environment"]
    assert all(row["median_seconds"] > 0 for row in content["rows"])


def test_it_is_no_package_for_onnxruntime(octavo: Octavo, compiled: Path) -> None:
    result = octavo("package", compiled)
    assert result.code == 2
    assert "an artifact for openvino is not packaged for ONNX Runtime" in result.err
