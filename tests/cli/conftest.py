"""The command as its users meet it: arguments in, text and an exit code out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from octavo.cli.main import main

MODELS = Path(__file__).resolve().parents[2] / "models"


@dataclass(frozen=True)
class Outcome:
    """What one command left behind."""

    code: int
    out: str
    err: str


Octavo = Callable[..., Outcome]


@pytest.fixture
def octavo(capsys: pytest.CaptureFixture[str]) -> Octavo:
    """`octavo("inspect", path)`: runs a command in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def network() -> Path:
    """The smallest network that ships."""
    return MODELS / "fashion_mobile.onnx"


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory, network: Path) -> Path:
    """That network compiled with its calibration data; tests that change it copy it."""
    out = tmp_path_factory.mktemp("compiled") / "out"
    data = str(MODELS / "fashion.npz")
    assert main(["compile", str(network), "-o", str(out), "-c", data, "--no-measure"]) == 0
    return out
