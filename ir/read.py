"""Read a model, whatever it comes as."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.ir.errors import UsageError

if TYPE_CHECKING:
    from octavo.ir.model import Model


def read(source: Any, inputs: Any = None) -> Model:
    """Read a path (`.onnx`, `.pt2`), `onnx.ModelProto`, `onnx_ir.Model` or torch program.

    A `Model` that was read before is returned as it is.

    `inputs` are the example inputs that a `torch.nn.Module` needs to be traced. Raises
    ModelError for what cannot be read and UsageError for what is no model at all.
    """
    is_path = isinstance(source, str | Path)
    if (is_path and Path(source).suffix == ".pt2") or _is_torch(source):
        from octavo.ir.read_torch import read_torch

        return read_torch(source, inputs)
    if inputs is not None:
        raise UsageError("example inputs are for torch modules only")
    if is_path:
        from octavo.ir.read_onnx import read_onnx

        return read_onnx(Path(source))
    return _read_graph(source)


def _read_graph(source: Any) -> Model:
    import onnx
    import onnx_ir

    from octavo.ir.model import Model
    from octavo.ir.read_onnx import from_ir, from_proto

    if isinstance(source, Model):
        return source
    if isinstance(source, onnx.ModelProto):
        return from_proto(source)
    if isinstance(source, onnx_ir.Model):
        return from_ir(source.clone())
    message = f"a {type(source).__name__} is not a model"
    hint = "give a path, an onnx.ModelProto, an onnx_ir.Model or a torch program"
    raise UsageError(message, hint=hint)


def _is_torch(source: object) -> bool:
    """Whether it is a torch module or exported program; only a caller who has torch has one."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    return isinstance(source, torch.nn.Module | torch.export.ExportedProgram)
