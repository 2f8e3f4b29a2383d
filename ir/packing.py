"""Codes of 1 to 8 bits as bytes in a file, and the standard operators that turn them into int8.

ONNX has types of 4 and 8 bits below opset 25. Other widths are the bitwise or of parts: 4 bits
as a native tensor, and 1 or 2 bits as bytes that index a table of the codes they stand for. The
three codes of a symmetric 2-bit grid are digits to the base 3, five to a byte. Runtimes fold
all of it when they load the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
import onnx_ir

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from octavo.ir.quant import QuantSpec

_INT4, _UINT4, _INT8 = onnx_ir.DataType.INT4, onnx_ir.DataType.UINT4, onnx_ir.DataType.INT8
_INT32, _UINT8 = onnx_ir.DataType.INT32, onnx_ir.DataType.UINT8


@final
@dataclass(frozen=True)
class Part:
    """What one digit adds to a code by bitwise or: `values[digit]`, as signed bytes.

    A part is stored as a tensor of `native` type, or as bytes that hold several digits each.
    """

    values: tuple[int, ...]
    native: onnx_ir.DataType | None = None

    @property
    def per_byte(self) -> int:
        """Digits of one byte: the largest k with `len(values) ** k <= 256`."""
        return int(math.log(256.5, len(self.values)))

    @property
    def table(self) -> NDArray[np.int8]:
        """`[bytes, per_byte]`: the digits of every byte, lowest first, as what they add."""
        radix, count = len(self.values), self.per_byte
        index = np.arange(radix**count)
        digits = [index // radix**place % radix for place in range(count)]
        found: NDArray[np.int8] = np.array(self.values, np.int8)[np.stack(digits, axis=1)]
        return found

    @property
    def table_name(self) -> str:
        """The name of the table, the same for all that read one like it."""
        return "table_" + "_".join(map(str, self.values)).replace("-", "m")

    def bytes(self, count: int) -> int:
        """Bytes of `count` digits."""
        return -(-count // self.per_byte)


_LOW4 = Part(tuple(range(16)), _UINT4)
_PARTS = {
    1: (Part((-1, 1)),),
    2: (Part((0, 1, -2, -1)),),
    3: (Part((0, 1, 2, 3)), Part((0, -4))),
    4: (Part((*range(8), *range(-8, 0)), _INT4),),
    5: (_LOW4, Part((0, -16))),
    6: (_LOW4, Part((0, 16, -32, -16))),
    7: (_LOW4, Part((0, 16, 32, 48)), Part((0, -64))),
    8: (Part((*range(128), *range(-128, 0)), _INT8),),
}
_TERNARY = (Part((-1, 0, 1)),)


@final
@dataclass(frozen=True)
class Step:
    """One operator of an unpacking graph.

    An input is the name of a part (`part0`), of its table (`table0`) or of an earlier output, or
    the entries of an int64 constant; `to` is the type of a Cast.
    """

    op_type: str
    inputs: tuple[str | tuple[int, ...], ...]
    output: str
    to: onnx_ir.DataType | None = None


def sizes_name(sizes: tuple[int, ...]) -> str:
    """The name of an int64 constant, the same for all that read one like it."""
    return "sizes_" + "_".join(map(str, sizes)).replace("-", "m")


def parts(spec: QuantSpec) -> tuple[Part, ...]:
    """How the codes of a signed spec are stored; ValueError for unsigned codes below 8 bits."""
    if not spec.signed and spec.bits != 8:
        message = f"{spec.dtype}: only signed codes are packed"
        raise ValueError(message)
    if not spec.signed:
        return (Part(tuple(range(256)), _UINT8),)
    return _TERNARY if (spec.bits, spec.symmetric) == (2, True) else _PARTS[spec.bits]


def packed_bytes(shape: Sequence[int], spec: QuantSpec) -> int:
    """Bytes of the packed codes of a tensor, without tables, scales and names."""
    count = math.prod(shape)
    return sum(part.bytes(count) for part in parts(spec))


def pack(codes: NDArray[np.int8 | np.uint8], spec: QuantSpec) -> tuple[NDArray[Any], ...]:
    """One array per part: in the shape of `codes` where native, else the bytes of its digits.

    Raises ValueError for a code that the spec does not have.
    """
    found = parts(spec)
    if spec.bits == 8:
        return (codes,)
    return tuple(
        digits.astype(part.native.numpy()) if part.native else _joined(digits, part)
        for part, digits in zip(found, _digits(codes, found), strict=True)
    )


def unpack(
    packed: Sequence[NDArray[Any]], shape: Sequence[int], spec: QuantSpec
) -> NDArray[np.int8 | np.uint8]:
    """The codes again, computed as the graph of `steps` computes them."""
    dtype = np.int8 if spec.signed else np.uint8
    codes: NDArray[np.int8 | np.uint8] = np.zeros(shape, dtype)
    for part, array in zip(parts(spec), packed, strict=True):
        if part.native is not None:
            codes |= array.astype(dtype)
        else:
            codes |= part.table[array.astype(np.int32)].reshape(-1)[: codes.size].reshape(shape)
    return codes


def steps(shape: tuple[int, ...], spec: QuantSpec) -> tuple[Step, ...]:
    """The operators from the parts to int8 codes of `shape`; none where they are one int8 tensor.

    The last one makes the codes.
    """
    found = parts(spec)
    made: list[Step] = []
    for index, part in enumerate(found):
        if part.native not in (_INT8, _UINT8):
            made += _part_steps(index, part, shape)
    for index in range(1, len(found)):
        before = made[-1].output if index > 1 else "codes0"
        made.append(Step("BitwiseOr", (before, f"codes{index}"), f"or{index}"))
    return tuple(made)


def pack_blocks(codes: NDArray[np.int8], bits: int, size: int) -> NDArray[np.uint8]:
    """Signed codes `[N, K]` as MatMulNBits reads them: `[N, ceil(K/size), size·bits/8]`.

    Codes are offset by 2^(bits-1), the zero point the kernel assumes, the first lowest in its
    byte; the last block is filled with zeros.
    """
    rows, columns = codes.shape
    blocks, per_byte = -(-columns // size), 8 // bits
    padded = np.pad(codes, ((0, 0), (0, blocks * size - columns)))
    digits = (padded.astype(np.int16) + (1 << (bits - 1))).reshape(rows, blocks, -1, per_byte)
    return (digits @ (1 << bits * np.arange(per_byte, dtype=np.int16))).astype(np.uint8)


def _part_steps(index: int, part: Part, shape: tuple[int, ...]) -> Iterator[Step]:
    """From one part to what it adds to the codes, `codes<index>`."""
    if part.native is not None:
        yield Step("Cast", (f"part{index}",), f"codes{index}", _INT8)
        return
    count, found = math.prod(shape), f"digits{index}"
    yield Step("Cast", (f"part{index}",), f"index{index}", _INT32)
    yield Step("Gather", (f"table{index}", f"index{index}"), found)
    if count % part.per_byte:
        yield Step("Reshape", (found, (-1,)), f"flat{index}")
        yield Step("Slice", (f"flat{index}", (0,), (count,)), f"whole{index}")
        found = f"whole{index}"
    yield Step("Reshape", (found, shape), f"codes{index}")


def _digits(
    codes: NDArray[np.int8 | np.uint8], found: tuple[Part, ...]
) -> Iterator[NDArray[np.int16]]:
    """The digit of every part by code; for native parts the value that is stored."""
    sums = np.array([0], np.int16)
    for part in found:
        sums = (sums[:, None] | np.array(part.values, np.int16)).reshape(-1)
    lookup = np.full(256, -1, np.int16)
    lookup[sums & 255] = np.arange(sums.size)
    numbers = lookup[codes.astype(np.int16) & 255]
    if numbers.min(initial=0) < 0:
        message = f"a code outside of {sums.min()} to {sums.max()}"
        raise ValueError(message)
    rest = sums.size
    for part in found:
        rest //= len(part.values)
        digit = numbers // rest % len(part.values)
        yield np.array(part.values, np.int16)[digit] if part.native else digit


def _joined(digits: NDArray[np.int16], part: Part) -> NDArray[np.uint8]:
    """Digits as bytes, the first lowest; the last byte is filled with zeros."""
    short = -digits.size % part.per_byte
    rows = np.pad(digits.reshape(-1), (0, short)).reshape(-1, part.per_byte)
    places = len(part.values) ** np.arange(part.per_byte, dtype=np.int16)
    return (rows @ places).astype(np.uint8)
