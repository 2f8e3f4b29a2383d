"""What users read when a request cannot work: `errors/NAME.txt`, one case a file.

The first line is the command, the second the exit code, the rest is standard error, with PLACE
for the folder it ran in.
`pytest --update-golden` rewrites everything but the command.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CASES = sorted(Path(__file__).with_name("errors").glob("*.txt"))
Octavo = Callable[..., Any]


@pytest.fixture
def workplace(
    tmp_path: Path, network: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with a good model and with everything that is wrong."""
    shutil.copy(network, tmp_path / "net.onnx")
    (tmp_path / "garbage.onnx").write_bytes(b"this is no model")
    (tmp_path / "engine.plan").write_bytes(b"ftrt" + bytes(100))
    (tmp_path / "truncated.onnx").write_bytes(network.read_bytes()[:50_000])
    shutil.copytree(artifact, tmp_path / "artifact")
    shutil.copytree(artifact, tmp_path / "changed")
    with (tmp_path / "changed" / "model.onnx").open("r+b") as file:
        file.write(b"changed!")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    np.savez(tmp_path / "wrong_name.npz", inptu=np.zeros((1, 1, 28, 28), np.float32))
    pair = np.zeros((2, 1, 28, 28), np.float32)
    np.savez(tmp_path / "wrong_names.npz", inptu=pair, other=pair)
    np.savez(tmp_path / "empty.npz")
    np.savez(tmp_path / "wrong_shape.npz", input=np.zeros((1, 3, 28, 28), np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_an_error_reads_as_written_down(
    path: Path, workplace: Path, octavo: Octavo, pytestconfig: pytest.Config
) -> None:
    command, _, expected = path.read_text(encoding="utf-8").partition("\n")
    before = sorted(str(p) for p in workplace.rglob("*"))
    result = octavo(*shlex.split(command)[1:])
    actual = f"exit {result.code}\n{result.err}".replace(str(workplace), "PLACE")
    if pytestconfig.getoption("--update-golden"):
        path.write_text(f"{command}\n{actual}", encoding="utf-8")
    else:
        assert actual == expected
    assert result.code in (2, 4, 5)
    assert "Traceback" not in result.err
    assert sorted(str(p) for p in workplace.rglob("*")) == before


def test_there_are_cases() -> None:
    assert len(CASES) >= 20
