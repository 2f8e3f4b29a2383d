"""One build by TensorRT for RTX: `python -m octavo.backends.trt_rtx_build < REQUEST`.

REQUEST is JSON: `path`, `capability` as `SM120`, and `shapes`, the least, typical and largest of
every input with a dynamic dimension. The last line that is printed is a JSON list of findings.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from octavo.ir.conformance import Finding

_UINT8 = re.compile(r"uint8", re.IGNORECASE)
_UNNAMED = "(unnamed"


def findings(
    path: str, capability: str, shapes: Mapping[str, Sequence[Sequence[int]]]
) -> list[Finding]:
    """What keeps a file from being parsed and compiled."""
    trt, logger = _runtime()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        return [_refused(parser.get_error(k)) for k in range(parser.num_errors)]
    found = [_warned(text) for text in logger.texts(trt.ILogger.WARNING) if _UINT8.search(text)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    if shapes:
        profile = builder.create_optimization_profile()
        for name, (least, typical, most) in shapes.items():
            profile.set_shape(name, tuple(least), tuple(typical), tuple(most))
        config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        found.append(_failed(logger.texts(trt.ILogger.ERROR), capability))
    return found


def _runtime() -> tuple[Any, Any]:
    """The module, and a logger that keeps what it is told."""
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
    reason, operator = " ".join(str(error.desc()).split()), str(error.node_operator())
    name = str(error.node_name())
    fix = "leave the operator out of the model, or replace it before compiling"
    if "No importer registered" in reason or reason == "false":
        reason = f"the parser has no importer for {operator}"
        fix = f"replace {operator}: canonicalize folds norms, Gelu and shape arithmetic"
    elif "Plugin not found" in reason:
        reason = f"the parser takes {operator} for a plugin, and there is none of that name"
        fix = "export it as standard operators, or build with the plugin"
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


if __name__ == "__main__":
    made = [asdict(found) for found in findings(**json.load(sys.stdin))]
    sys.stdout.write(f"{json.dumps(made)}\n")
