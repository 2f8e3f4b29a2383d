"""The versions that decide what a compilation does, recorded wherever results are kept."""

from __future__ import annotations

from importlib import metadata

_PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def versions() -> dict[str, str]:
    """Package name → version of octavo and what it computes with; "" where not installed."""
    from octavo import __version__

    return {"octavo": __version__, **{name: _installed(name) for name in _PACKAGES}}


def _installed(name: str) -> str:
    # Read from metadata: asking must not import a runtime.
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
