"""A build without a GPU, by the wheels of TensorRT for RTX.

They share the ONNX parser with TensorRT and compile ahead of time for a given part. That a file
passes says that it parses, that its types are legal, and that it compiles; not which kernels
TensorRT takes.
"""

from __future__ import annotations

import importlib.metadata
import json
import signal
import subprocess
import sys
from dataclasses import astuple
from typing import TYPE_CHECKING

from octavo.ir.conformance import Finding
from octavo.ir.errors import UsageError, VerificationFailed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from octavo.backends.trt_commands import Shapes
    from octavo.backends.trt_target import Part

BINDINGS, LIBRARIES = "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"
KNOWN = "1.7"
INSTALL = "pip install 'octavo[tensorrt-check]'"
# The parts that the wheels compile for; datacenter parts by the one that has the same formats.
_STAND_INS = {(9, 0): (8, 9)}


def version() -> str | None:
    """The version of the wheels, `None` where they are not installed.

    Raises UsageError for wheels of another version, or of two versions.
    """
    found = {}
    for name in (BINDINGS, LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if not found:
        return None
    wrong = [f"{name} {text}" for name, text in found.items() if not text.startswith(f"{KNOWN}.")]
    if wrong or len(found) < 2 or len(set(found.values())) > 1:
        message = "the wheels of TensorRT for RTX do not fit"
        here = ", ".join(f"{name} {text}" for name, text in found.items())
        raise UsageError(message, why=f"here: {here}; known: both of {KNOWN}", hint=INSTALL)
    return found[BINDINGS]


def built_for(part: Part) -> tuple[int, int]:
    """The compute capability that the wheels compile for in place of a part's."""
    return _STAND_INS.get(part.capability, part.capability)


def build(path: Path, part: Part, shapes: Mapping[str, Shapes]) -> list[Finding]:
    """Parse and compile a file for a part; what fails, by node, with what avoids it.

    In a process of its own: there are files that the compiler crashes on.
    """
    request = {
        "path": str(path),
        "capability": "SM{}{}".format(*built_for(part)),
        "shapes": {name: astuple(found) for name, found in shapes.items()},
    }
    command = [sys.executable, "-P", "-m", "octavo.backends.trt_rtx_build"]
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if done.returncode < 0:
        reason = (
            f"the compiler of TensorRT for RTX crashes ({signal.Signals(-done.returncode).name})"
        )
        return [Finding("builder", "", reason, "mend what else is found, or quantize less")]
    if done.returncode:
        raise VerificationFailed("TensorRT for RTX cannot be asked", why=done.stderr.strip()[-300:])
    return [Finding(**found) for found in json.loads(done.stdout.splitlines()[-1])]
