"""Element types and constants of ONNX as torch holds them.

Types of less than 8 bits live unpacked in the next larger one: 4- and 2-bit integers in int8 or
uint8, float4 in float32.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir
import torch
from onnx_ir import DataType

from octavo.ir.mapped import reading

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx_ir import TensorProtocol

# torch names these types without declaring them.
INT4, UINT4, INT2, UINT2 = (getattr(torch, name) for name in ("int4", "uint4", "int2", "uint2"))
DTYPES: dict[DataType, torch.dtype] = {
    DataType.FLOAT: torch.float32,
    DataType.DOUBLE: torch.float64,
    DataType.FLOAT16: torch.float16,
    DataType.BFLOAT16: torch.bfloat16,
    DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    DataType.FLOAT8E5M2: torch.float8_e5m2,
    DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    DataType.FLOAT8E8M0: torch.float8_e8m0fnu,
    DataType.FLOAT4E2M1: torch.float4_e2m1fn_x2,
    DataType.INT8: torch.int8,
    DataType.INT16: torch.int16,
    DataType.INT32: torch.int32,
    DataType.INT64: torch.int64,
    DataType.UINT8: torch.uint8,
    DataType.UINT16: torch.uint16,
    DataType.UINT32: torch.uint32,
    DataType.UINT64: torch.uint64,
    DataType.BOOL: torch.bool,
    DataType.INT4: INT4,
    DataType.UINT4: UINT4,
    DataType.INT2: INT2,
    DataType.UINT2: UINT2,
}
# What holds a type that torch cannot compute with: the container, lowest and highest value.
HELD_IN: dict[torch.dtype, tuple[torch.dtype, int, int]] = {
    INT4: (torch.int8, -8, 7),
    UINT4: (torch.uint8, 0, 15),
    INT2: (torch.int8, -2, 1),
    UINT2: (torch.uint8, 0, 3),
    torch.float4_e2m1fn_x2: (torch.float32, -6, 6),
}
# numpy has no such type of its own, so the bits travel as unsigned integers.
_BY_BITS = {
    torch.bfloat16: np.uint16,
    torch.float8_e4m3fn: np.uint8,
    torch.float8_e4m3fnuz: np.uint8,
    torch.float8_e5m2: np.uint8,
    torch.float8_e5m2fnuz: np.uint8,
    torch.float8_e8m0fnu: np.uint8,
}


def as_torch(array: NDArray[np.generic]) -> torch.Tensor:
    """A tensor over the array's own memory where torch has the type; never to be written to."""
    dtype = DTYPES[DataType.from_numpy(array.dtype)]
    if dtype in HELD_IN:
        held = {torch.int8: np.int8, torch.uint8: np.uint8, torch.float32: np.float32}
        array = array.astype(held[HELD_IN[dtype][0]])
    elif dtype in _BY_BITS:
        return _shared(array.view(_BY_BITS[dtype])).view(dtype)
    return _shared(array)


def tensor_of(tensor: TensorProtocol) -> torch.Tensor:
    """The torch tensor of a constant: a copy of what a file holds, else the same memory."""
    if isinstance(tensor, onnx_ir.ExternalTensor):
        return reading(tensor, lambda array: as_torch(np.array(array)))
    return as_torch(tensor.numpy())


def widened(dtype: torch.dtype, double: bool) -> torch.dtype:
    """float64 instead of float32 where a graph is to compute in double precision."""
    return torch.float64 if double and dtype == torch.float32 else dtype


def _shared(array: NDArray[np.generic]) -> torch.Tensor:
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array).reshape(array.shape)
    with warnings.catch_warnings():
        # Constants are read-only; nothing here writes to a parameter.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
