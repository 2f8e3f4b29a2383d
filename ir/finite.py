"""Refuse weights that are not numbers: one streaming look at every float tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.ir.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_CHUNK = 1 << 20
# Operators that mask or bound with infinity. Elsewhere an infinite constant spoils every output.
_MASKING = frozenset(
    {
        *("Add", "Attention", "Clip", "Concat", "ConstantOfShape", "Expand", "If", "Loop", "Max"),
        *("Cast", "Equal", "Gather", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Min"),
        *("Identity", "IsInf", "Mul", "Neg", "Pad", "Reshape", "Scan", "ScatterElements"),
        *("ScatterND", "SequenceConstruct", "Slice", "Squeeze", "Sub", "Tile", "Trilu"),
        *("Unsqueeze", "Where"),
    }
)


def check_finite(model: onnx_ir.Model, where: str) -> None:
    """Raise ModelError for NaN in a constant, and for infinity where it is not a mask or bound.

    Reads external data through a small buffer, so the resident memory does not grow.
    """
    seen: set[int] = set()
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or id(tensor) in seen or not _may_be_infinite(tensor.dtype):
                continue
            seen.add(id(tensor))
            _check(value, tensor, where)


def _check(value: onnx_ir.Value, tensor: onnx_ir.TensorProtocol, where: str) -> None:
    for chunk in _chunks(tensor):
        if np.isfinite(chunk).all():
            continue
        readers = {node.op_type for node in value.consumers()}
        bad = "NaN" if np.isnan(chunk).any() else "infinite values"
        if bad == "NaN" or not (tensor.size == 1 or readers <= _MASKING):
            message = f"the weights '{value.name}' hold {bad}"
            hint = "the training or conversion of this model went wrong: export it again"
            read_by = ", ".join(sorted(f"'{node.name}'" for node in value.consumers()))
            raise ModelError(message, where=where, why=f"read by {read_by}", hint=hint)


def _may_be_infinite(dtype: onnx_ir.DataType) -> bool:
    return dtype.is_floating_point() and dtype.bitwidth >= 8


def _chunks(tensor: onnx_ir.TensorProtocol) -> Iterator[NDArray[np.generic]]:
    """The entries of a tensor, flat, at most `_CHUNK` at a time."""
    if not isinstance(tensor, onnx_ir.ExternalTensor):
        flat = tensor.numpy().reshape(-1)
        yield from (flat[k : k + _CHUNK] for k in range(0, flat.size, _CHUNK))
        return
    dtype = tensor.dtype.numpy()
    left, buffer = tensor.nbytes, bytearray(min(tensor.nbytes, _CHUNK * dtype.itemsize))
    with Path(tensor.path).open("rb") as file:
        file.seek(tensor.offset or 0)
        while left > 0:
            got = file.readinto(memoryview(buffer)[:left])
            if not got:
                message = f"the external data of '{tensor.name}' ends too early"
                raise ModelError(message, where=str(tensor.path))
            yield np.frombuffer(buffer, dtype, got // dtype.itemsize)
            left -= got
