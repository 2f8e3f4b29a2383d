"""Check a file for TensorRT: rules that need no wheel, then a build where one is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.backends import trt_engine, trt_rtx
from octavo.backends.trt_commands import profiles
from octavo.backends.trt_rules import broken_rules
from octavo.backends.trt_target import PART_OF
from octavo.ir.conformance import Conformance
from octavo.ir.read_onnx import read_verbatim

if TYPE_CHECKING:
    from pathlib import Path

    from octavo.ir.target import Target

_KERNELS = "which kernels TensorRT takes and how fast they are, which needs a device"
_BUILD = "that the file parses and compiles, which the wheels of TensorRT for RTX tell without one"


def check(path: Path, target: Target) -> Conformance:
    """All findings, errors first.

    Raises ModelError or UsageError for what is no ONNX file, UsageError for wheels of another
    version.
    """
    findings, checked = broken_rules(path, target), ["conformance rules"]
    if (version := trt_rtx.version()) is not None:
        part = PART_OF[target.name]
        findings += trt_rtx.build(path, part, profiles(read_verbatim(path)))
        capability = "{}.{}".format(*trt_rtx.built_for(part))
        checked.append(f"parsed and built by TensorRT for RTX {version} for {capability}")
    ordered = sorted(findings, key=lambda finding: not finding.error)
    return Conformance(tuple(ordered), tuple(checked), unverified())


def unverified() -> tuple[str, ...]:
    """What nobody checks here, in sentences."""
    if trt_engine.version() is not None:
        return ()
    missing = () if trt_rtx.version() is not None else (f"{_BUILD}: {trt_rtx.INSTALL}",)
    return tuple(f"not verified: {text}" for text in (*missing, _KERNELS))
