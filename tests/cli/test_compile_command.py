"""`octavo compile` from end to end, and what it leaves behind when it does not get there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from octavo.cli import compilation

EVIDENCE = {"manifest.json", "plan.json", "passes.jsonl", "audit.json", "report.html"}
FILES = {"model.onnx", "probes.npz", *EVIDENCE}
# Two int8 networks of one model agree to this share of the largest output.
INT8_TOLERANCE = 0.1
Octavo = Callable[..., Any]


def _run(model: Path, images: Any) -> Any:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def test_the_artifact_is_complete_smaller_and_computes_the_same(
    artifact: Path, network: Path
) -> None:
    assert {path.name for path in artifact.iterdir()} == FILES
    assert (artifact / "model.onnx").stat().st_size < 0.5 * network.stat().st_size
    images = np.random.default_rng(0).random((4, 1, 28, 28), dtype=np.float32)
    expected, actual = _run(network, images), _run(artifact / "model.onnx", images)
    assert np.abs(actual - expected).max() <= INT8_TOLERANCE * np.abs(expected).max()


def test_compiling_again_gives_the_same_bytes(
    octavo: Octavo, artifact: Path, network: Path, tmp_path: Path
) -> None:
    data = network.with_name("fashion.npz")
    out = tmp_path / "out"
    assert octavo("compile", network, "-o", out, "-c", data, "--no-measure").code == 0
    for name in ("model.onnx", "manifest.json", "probes.npz"):
        assert (out / name).read_bytes() == (artifact / name).read_bytes()


def test_the_report_states_what_was_assumed(octavo: Octavo, network: Path, tmp_path: Path) -> None:
    result = octavo("compile", network, "-o", tmp_path / "out", "-c", "none", "--no-measure")
    assert (result.code, result.err) == (0, "")
    for part in ("none given (--calibration)", "seed:        0", "1 thread(s)", "random", "1.00x"):
        assert part in result.out


def test_json_is_nothing_but_json(octavo: Octavo, network: Path, tmp_path: Path) -> None:
    arguments = ("-o", tmp_path / "out", "-c", "none", "--no-measure", "--json")
    result = octavo("compile", network, *arguments)
    content = json.loads(result.out)
    assert content["audit"]["ok"] is True
    assert content["manifest"]["source"]["name"] == network.name
    assert content["bench"]["rows"][0]["speed"] == 1.0


def test_dumps_show_every_change(octavo: Octavo, network: Path, tmp_path: Path) -> None:
    arguments = ("-c", "none", "--no-measure", "--dump-ir", tmp_path / "ir")
    assert octavo("compile", network, "-o", tmp_path / "out", *arguments).code == 0
    names = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert names[0] == "000_source.onnx.txt"
    assert names[-1].endswith("_insert-fake-quant.onnx.txt")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_failure_leaves_nothing(
    octavo: Octavo,
    network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    def failing(*arguments: object, **options: object) -> None:
        raise error("sudden")

    monkeypatch.setattr(compilation, "compile_model", failing)
    result = octavo("compile", network, "-o", tmp_path / "out", "-c", "none")
    if error is KeyboardInterrupt:
        assert (result.code, result.err) == (
            130,
            "error: interrupted; nothing is left half written\n",
        )
    else:
        assert result.code == 1
        assert result.err.splitlines()[0] == "error: ZeroDivisionError: sudden"
    assert list(tmp_path.iterdir()) == []


def test_a_bug_shows_its_traceback_only_on_request(
    octavo: Octavo, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "compile_model", lambda *a, **k: 1 / 0)
    arguments = ("compile", network, "-o", tmp_path / "out", "-c", "none")
    assert "Traceback" not in octavo(*arguments).err
    shown = octavo(*arguments, "--traceback")
    assert shown.code == 1
    assert "Traceback" in shown.err
    assert shown.err.rstrip().endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize(("cause", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_signal_that_native_code_wraps_is_still_one(
    octavo: Octavo,
    network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cause: BaseException,
    code: int,
) -> None:
    def failing(*arguments: object, **options: object) -> None:
        raise ImportError("a module did not load") from cause

    monkeypatch.setattr(compilation, "compile_model", failing)
    result = octavo("compile", network, "-o", tmp_path / "out", "-c", "none")
    assert result.code == code
    assert "ImportError" not in result.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_cleans_up(
    network: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-m", "octavo", "compile", network, "-o", tmp_path / "out"]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, cwd=tmp_path)
    deadline = time.monotonic() + 30
    # The hidden folder beside the output says that the work has begun.
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert b"Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []
