"""A build without a GPU, by the wheels of TensorRT for RTX.

They share the ONNX parser with TensorRT and compile ahead of time for a given part. That a file
passes says that it parses, that its types are legal, and that it compiles; not which kernels
TensorRT takes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from octavo.ir.conformance import Finding
from octavo.ir.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from octavo.backends.trt_commands import Shapes
    from octavo.backends.trt_target import Part

BINDINGS, LIBRARIES = "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"
KNOWN = "1.7"
INSTALL = "pip install 'octavo[tensorrt-check]'"
# The parts that the wheels compile for; datacenter parts by the one that has the same formats.
_STAND_INS = {(9, 0): (8, 9)}
_UINT8 = re.compile(r"uint8", re.IGNORECASE)
_UNNAMED = "(unnamed"


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


def build(path: Path, part: Part, shapes: dict[str, Shapes]) -> list[Finding]:
    """Parse and compile a file for a part; what fails, by node, with what avoids it."""
    trt, logger = _runtime()
    logger.messages.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return [_refused(parser.get_error(k)) for k in range(parser.num_errors)]
    found = [_warned(text) for text in logger.texts(trt.ILogger.WARNING) if _UINT8.search(text)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    name = "SM{}{}".format(*built_for(part))
    config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
    if shapes:
        profile = builder.create_optimization_profile()
        for input_name, shape in shapes.items():
            profile.set_shape(input_name, shape.least, shape.typical, shape.most)
        config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        found.append(_failed(logger.texts(trt.ILogger.ERROR), name))
    return found


@cache
def _runtime() -> tuple[Any, Any]:
    """The module, and the one logger of the process: it would ignore another one."""
    trt = importlib.import_module("tensorrt_rtx_bindings")

    class Collector(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append((severity, message))

        def texts(self, severity: Any) -> list[str]:
            return list(dict.fromkeys(text for level, text in self.messages if level == severity))

    return trt, Collector()


def _refused(error: Any) -> Finding:
    """A parser error: the node it names, and what it says."""
    reason = " ".join(str(error.desc()).split())
    name = str(error.node_name())
    fix = "leave the operator out of the model, or replace it before compiling"
    if operator := re.search(r"No importer registered for op: (\w+)", reason):
        fix = f"replace {operator[1]}: canonicalize folds norms, Gelu and shape arithmetic"
    return Finding("parser", "" if name.startswith(_UNNAMED) else name, reason, fix)


def _warned(text: str) -> Finding:
    fix = "calibrate for symmetric signed codes"
    return Finding("uint8", "", " ".join(text.split()), fix)


def _failed(texts: list[str], name: str) -> Finding:
    reason = " ".join(texts[0].split()) if texts else "the build failed and says nothing"
    node = re.search(r"\[([^\]\s]*/[^\]\s]*)\]|node (?:named )?['\"]?(\S+?)['\"]? ", reason)
    where = next((group for group in node.groups() if group), "") if node else ""
    fix = f"keep the node float (--keep-float) when compiling for {name.lower()}"
    return Finding("builder", where, reason[:300], fix)
