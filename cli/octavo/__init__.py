"""octavo makes exported models small and fast, and proves what it did.

    model    = octavo.read("model.onnx")
    compiled = octavo.compile(model, calibration="images.npz")
    compiled.save("out/")
    session  = octavo.load("out/")

Everything else is in `octavo.ir`, `octavo.passes`, `octavo.backends` and `octavo.models`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.api import compile, load, package  # noqa: A004  (the public verb)
    from octavo.ir.errors import OctavoError
    from octavo.ir.read import read

__version__ = "0.1.0"
__all__ = ["OctavoError", "__version__", "compile", "load", "package", "read"]

# Imported on first use: `import octavo` must cost nothing.
_HOMES = {
    "compile": "octavo.api",
    "load": "octavo.api",
    "package": "octavo.api",
    "read": "octavo.ir.read",
    "OctavoError": "octavo.ir.errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        message = f"module 'octavo' has no attribute '{name}'"
        raise AttributeError(message)
    return getattr(importlib.import_module(_HOMES[name]), name)
