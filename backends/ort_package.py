"""ONNX Runtime's own format, and the kernels a reduced build of the runtime must keep."""

from __future__ import annotations

import logging
import platform
import time
import warnings
from statistics import median
from typing import TYPE_CHECKING

import onnxruntime

from octavo.backends.ort_session import make_session, processor
from octavo.ir.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from octavo.ir.artifact import Artifact

RUNTIME = f"onnxruntime {onnxruntime.__version__}"
_LARGEST_BYTES = (1 << 31) - 1
# Weights it has rearranged fit only the vector width of the processor that did so.
_BLOCKED_LAYOUT, _BLOCKED_DOMAIN = "NchwcTransformer", "com.microsoft.nchwc"
_LOADS = 3


def write_ort(artifact: Artifact, path: Path, *, any_processor: bool = False) -> None:
    """Write an artifact as the runtime optimises it here, in the runtime's own format (`.ort`).

    `any_processor` keeps weights as they are, where the runtime would rearrange those of float
    convolutions for the vector width of this processor. Raises UsageError where the format, which
    ends at 2 GB, cannot hold the model.
    """
    if artifact.bytes > _LARGEST_BYTES:
        message = f"{artifact.path.name} does not fit into ONNX Runtime's own format"
        raise UsageError(message, why="it ends at 2 GB", hint="deploy model.onnx itself")
    make_session(
        artifact.path,
        threads=1,
        config={**artifact.session_options, "session.save_model_format": "ORT"},
        optimized_path=path,
        disabled_optimizers=(_BLOCKED_LAYOUT,) if any_processor else (),
    )


def required_kernels(path: Path) -> str:
    """Operators and types of an `.ort` file, as the runtime's `--include_ops_by_config` reads them.

    They are those of the optimised graph: fused and rearranged kernels, which the `.onnx` file
    does not name, included.
    """
    from onnxruntime.tools.logger import get_logger
    from onnxruntime.tools.ort_format_model import create_config_from_models

    get_logger("ort_format_model.utils").setLevel(logging.WARNING)
    written = path.with_suffix(".config")
    with warnings.catch_warnings():
        # It leaves closing the file to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        create_config_from_models([path], written, enable_type_reduction=True)
    lines = written.read_text(encoding="utf-8").splitlines()
    written.unlink()
    # Its own first lines hold a path of this machine.
    kept = [line for line in lines if not line.startswith("#")]
    return "\n".join([f"# {path.name}, as {RUNTIME} optimised it", *kept, ""])


def runs_on(kernels: str) -> str:
    """The processors an `.ort` file with these kernels runs on."""
    return processor() if _BLOCKED_DOMAIN in kernels else platform.machine()


def load_seconds(path: Path, config: Mapping[str, str]) -> float:
    """Seconds to load a model file on one thread, the median of three."""
    return median(_load_seconds(path, config) for _ in range(_LOADS))


def _load_seconds(path: Path, config: Mapping[str, str]) -> float:
    begin = time.perf_counter()
    make_session(path, threads=1, config=config)
    return time.perf_counter() - begin
