"""Tools that quantize in an environment of their own, with the calibration data of octavo."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
from cases import Case

from octavo.cli.calibration_data import load_calibration
from octavo.ir.read import read

_TRANSFORMERS = ("fashion-vit", "minilm")


def feeds(calibration: Path, source: Path, folder: Path) -> Path:
    """The feeds that octavo is calibrated with, one file each; one sample where that is known."""
    folder.mkdir()
    count = 0
    for feed in load_calibration(str(calibration), read(source)):
        samples = len(next(iter(feed.values()))) if len(feed) == 1 else 1
        for k in range(samples):
            part = {n: a[k : k + 1] if samples > 1 else a for n, a in feed.items()}
            np.savez(folder / f"{count:04d}.npz", allow_pickle=False, **part)
            count += 1
    return folder


def quantize(tool: str, python: Path, case: Case, source: Path, given: Path, target: Path) -> None:
    """A tool's int8 of a model; NNCF's is in OpenVINO's own format if `target` ends in .xml.

    Raises RuntimeError where it fails.
    """
    script = Path(__file__).with_name("quantize_elsewhere.py")
    kind = ["transformer"] if case.name in _TRANSFORMERS else []
    # Some tools write to the file they are given, and to the folder they run in.
    own = target.with_suffix(".source.onnx")
    shutil.copyfile(source, own)
    # Without -P a tool that asks for TensorRT would find the module of that name beside the script.
    command = [python.absolute(), "-P", script, tool, own, given, target, *kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=target.parent)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
