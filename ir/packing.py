"""Codes of 1 to 8 bits as bytes in a file, and the standard operators that turn them into int8.

ONNX has types of 4 and 8 bits below opset 25. Other widths are the bitwise or of parts: 4 bits
as a native tensor, and 1 or 2 bits as bytes that index a table of the codes they stand for. The
three codes of a symmetric 2-bit grid are digits to the base 3, five to a byte. Few different
codes are indices into a table of them. Kernels that read blocks of 2-, 4- or 8-bit codes get
those of other widths the same way, several per byte. Runtimes fold all of it when they load the
model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import numpy as np
import onnx_ir

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from octavo.ir.quant import Codes, QuantSpec

_INT4, _UINT4, _INT8 = onnx_ir.DataType.INT4, onnx_ir.DataType.UINT4, onnx_ir.DataType.INT8
_INT32, _UINT8 = onnx_ir.DataType.INT32, onnx_ir.DataType.UINT8
_FLOAT16 = onnx_ir.DataType.FLOAT16


@final
@dataclass(frozen=True)
class Part:
    """What one digit adds to a code by bitwise or: `values[digit]`, as signed bytes.

    A part is stored as a tensor of `native` type, or as bytes that hold several digits each, and
    becomes bytes of type `to`. Its table has `joined` codes in each of them, the first lowest,
    where a kernel reads several.
    """

    values: tuple[int, ...]
    native: onnx_ir.DataType | None = None
    joined: int = 1
    to: onnx_ir.DataType = _INT8

    @property
    def per_byte(self) -> int:
        """Digits of one byte: the largest k with `len(values) ** k <= 256`."""
        return int(math.log(256.5, len(self.values)))

    @property
    def table(self) -> NDArray[np.int8 | np.uint8]:
        """`[bytes, per_byte / joined]`: the digits of every byte, lowest first, as they add."""
        radix, count = len(self.values), self.per_byte
        index = np.arange(radix**count)
        digits = [index // radix**place % radix for place in range(count)]
        found = np.array(self.values, np.int16)[np.stack(digits, axis=1)]
        places = 1 << _CODE_BITS // self.joined * np.arange(self.joined)
        joined: NDArray[np.int8 | np.uint8] = found.reshape(len(found), -1, self.joined) @ places
        return joined.astype(self.to.numpy())

    @property
    def table_name(self) -> str:
        """The name of the table, the same for all that read one like it."""
        values = "_".join(map(str, self.values)).replace("-", "m")
        return f"table_{values}" + ("" if self.to == _INT8 else f"_x{self.joined}")

    @property
    def entries(self) -> int:
        """Bytes that one stored byte becomes."""
        return self.per_byte // self.joined

    def bytes(self, count: int) -> int:
        """Bytes of `count` digits."""
        if self.native == _FLOAT16:
            return 2 * count
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
_HALF = (Part((), _FLOAT16),)
_CODE_BITS = 8


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
    """How the codes of a spec are stored; ValueError for unsigned codes below 8 bits."""
    if spec.half:
        return _HALF
    if spec.index_bits is not None:
        return _PARTS[spec.index_bits]
    if not spec.signed and spec.bits != _CODE_BITS:
        message = f"{spec.dtype}: only signed codes are packed"
        raise ValueError(message)
    if not spec.signed:
        return (Part(tuple(range(256)), _UINT8),)
    return _TERNARY if (spec.bits, spec.symmetric) == (2, True) else _PARTS[spec.bits]


def packed_bytes(shape: Sequence[int], spec: QuantSpec) -> int:
    """Bytes of the packed codes of a tensor, without tables, scales and names."""
    count = math.prod(shape)
    return sum(part.bytes(count) for part in parts(spec))


def pack(codes: Codes, spec: QuantSpec) -> tuple[NDArray[Any], ...]:
    """One array per part: in the shape of `codes` where native, else the bytes of its digits.

    Behind them the codebook of a spec with `index_bits`. Raises ValueError for a code that the
    spec does not have, and for more different codes than it has indices.
    """
    found = parts(spec)
    if spec.index_bits is not None:
        indices, codebook = _indexed(codes, spec.index_bits)
        return (*_packed(indices, found), codebook)
    return (codes,) if spec.bits >= _CODE_BITS else _packed(codes, found)


def unpack(packed: Sequence[NDArray[Any]], shape: Sequence[int], spec: QuantSpec) -> Codes:
    """The codes again, computed as the graph of `steps` computes them."""
    if spec.half:
        return packed[0]
    dtype = np.int8 if spec.signed else np.uint8
    codes: NDArray[np.int8 | np.uint8] = np.zeros(shape, dtype)
    for part, array in zip(parts(spec), packed, strict=False):
        if part.native is not None:
            codes |= array.astype(dtype)
        else:
            codes |= part.table[array.astype(np.int32)].reshape(-1)[: codes.size].reshape(shape)
    return codes if spec.index_bits is None else np.asarray(packed[-1][codes])


def steps(shape: tuple[int, ...], spec: QuantSpec) -> tuple[Step, ...]:
    """The operators from the parts to int8 codes of `shape`; none where they are one tensor.

    The last one makes the codes.
    """
    made = _all_steps(parts(spec), shape)
    if spec.index_bits is not None:
        made.append(Step("Cast", (made[-1].output,), "indices", _INT32))
        made.append(Step("Gather", ("codebook", "indices"), "chosen"))
    return tuple(made)


def codebook_size(index_bits: int) -> int:
    """Entries of a codebook; the indices of one bit are 1 and -1, which counts from its end."""
    return 3 if index_bits == 1 else 1 << index_bits


def signed_indices(index_bits: int) -> NDArray[np.int8]:
    """What stands for the indices 0, 1, … in signed codes: the upper half counts from the end."""
    if index_bits == 1:
        return np.array([1, -1], np.int8)
    index = np.arange(1 << index_bits)
    return np.where(index < index.size // 2, index, index - index.size).astype(np.int8)


def kernel_bits(bits: int) -> int:
    """The width of the codes that a kernel of blocks reads for stored ones of `bits`."""
    return next(width for width in (2, 4, 8) if bits <= width)


def block_parts(bits: int) -> tuple[Part, ...]:
    """How codes of `bits` are stored for a kernel that reads blocks; none where it reads them.

    Its codes are offset by 2^(kernel_bits - 1), the zero point that it assumes.
    """
    width = kernel_bits(bits)
    if width == bits:
        return ()
    *low, last = _PARTS[bits]
    offset = 1 << (width - 1)
    high = Part(tuple(value + offset for value in last.values))
    joined = _CODE_BITS // width
    return tuple(replace(part, joined=joined, to=_UINT8) for part in (*low, high))


def blocks_shape(rows: int, columns: int, bits: int, size: int) -> tuple[int, int, int]:
    """The shape of the bytes that MatMulNBits reads: `[N, ceil(K/size), size·bits/8]`."""
    return rows, -(-columns // size), size * kernel_bits(bits) // _CODE_BITS


def pack_blocks(codes: Codes, bits: int, size: int) -> tuple[NDArray[Any], ...]:
    """Codes `[N, K]` as blocks of rows: one array per part, or what the kernel reads.

    Unsigned codes are those of a kernel that is given zero points. What fills the last block,
    zeros or binary ones, meets no input.
    """
    rows, columns = codes.shape
    short = -columns % size
    filled = int(bits == 1)
    padded = np.pad(codes, ((0, 0), (0, short)), constant_values=filled) if short else codes
    blocks = padded.reshape(rows, -1, size)
    if block_parts(bits):
        return _packed(blocks, _PARTS[bits])
    digits = np.ascontiguousarray(blocks).view(np.uint8)
    if blocks.dtype == np.int8:
        digits = digits + np.uint8(1 << (bits - 1))
    return (_bytes_of(digits, bits),)


def zeros_shape(rows: int, columns: int, bits: int, size: int) -> tuple[int, int]:
    """The shape of the zero points of blocks, in bytes: `[N, ceil(blocks·bits/8)]`."""
    return rows, math.ceil(math.ceil(columns / size) * bits / _CODE_BITS)


def pack_zero_points(zeros: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Zero points `[N, blocks]` of 2-, 4- or 8-bit codes as bytes, rows filled with zeros."""
    short = -zeros.shape[1] % (_CODE_BITS // bits)
    return _bytes_of(np.pad(zeros, ((0, 0), (0, short))).astype(np.uint8), bits)


def _bytes_of(digits: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Digits of the last axis joined to bytes, the first lowest."""
    per_byte = _CODE_BITS // bits
    joined = np.zeros((*digits.shape[:-1], digits.shape[-1] // per_byte), np.uint8)
    for place in range(per_byte):
        joined |= digits[..., place::per_byte] << np.uint8(bits * place)
    return joined


def block_steps(shape: tuple[int, int, int], bits: int) -> tuple[Step, ...]:
    """The operators from the parts of `block_parts` to the bytes of `blocks_shape`."""
    return tuple(_all_steps(block_parts(bits), shape))


def _all_steps(found: tuple[Part, ...], shape: tuple[int, ...]) -> list[Step]:
    made: list[Step] = []
    for index, part in enumerate(found):
        if part.native not in (_INT8, _UINT8, _FLOAT16):
            made += _part_steps(index, part, shape)
    for index in range(1, len(found)):
        before = made[-1].output if index > 1 else "codes0"
        made.append(Step("BitwiseOr", (before, f"codes{index}"), f"or{index}"))
    return made


def _part_steps(index: int, part: Part, shape: tuple[int, ...]) -> Iterator[Step]:
    """From one part to what it adds to the codes, `codes<index>`."""
    if part.native is not None:
        yield Step("Cast", (f"part{index}",), f"codes{index}", part.to)
        return
    count, found = math.prod(shape), f"digits{index}"
    yield Step("Cast", (f"part{index}",), f"index{index}", _INT32)
    yield Step("Gather", (f"table{index}", f"index{index}"), found)
    if count % part.entries:
        yield Step("Reshape", (found, (-1,)), f"flat{index}")
        yield Step("Slice", (f"flat{index}", (0,), (count,)), f"whole{index}")
        found = f"whole{index}"
    yield Step("Reshape", (found, shape), f"codes{index}")


def _packed(codes: Codes, found: tuple[Part, ...]) -> tuple[NDArray[Any], ...]:
    return tuple(
        digits.astype(part.native.numpy()) if part.native else _joined(digits, part)
        for part, digits in zip(found, _digits(codes, found), strict=True)
    )


def _indexed(codes: Codes, index_bits: int) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Indices in the shape of `codes`, the upper half negative, and the codes they stand for."""
    values, places = np.unique(codes, return_inverse=True)
    count = 1 << index_bits
    if values.size > count:
        message = f"{values.size} different codes, {index_bits} bits tell {count} apart"
        raise ValueError(message)
    codebook = np.zeros(codebook_size(index_bits), np.int8)
    signed = signed_indices(index_bits)
    codebook[signed[: values.size]] = values
    return signed[places.reshape(codes.shape)], codebook


def _digits(codes: Codes, found: tuple[Part, ...]) -> Iterator[NDArray[np.int8 | np.uint8]]:
    """The digit of every part by code; for native parts the value that is stored.

    Every temporary is of one byte per code.
    """
    sums = np.array([0], np.int16)
    for part in found:
        sums = (sums[:, None] | np.array(part.values, np.int16)).reshape(-1)
    known = np.zeros(256, np.bool_)
    known[sums & 255] = True
    code_bytes = np.ascontiguousarray(codes).view(np.uint8)
    if not known[code_bytes].all():
        message = f"a code outside of {sums.min()} to {sums.max()}"
        raise ValueError(message)
    rest = sums.size
    for part in found:
        rest //= len(part.values)
        digit = np.arange(sums.size) // rest % len(part.values)
        lookup = np.zeros(256, np.uint8)
        lookup[sums & 255] = np.array(part.values)[digit] & 255 if part.native else digit
        digits = lookup[code_bytes]
        yield digits.view(np.int8) if part.native == _INT4 else digits


def _joined(digits: NDArray[np.int8 | np.uint8], part: Part) -> NDArray[np.uint8]:
    """Digits as bytes, the first lowest; the last byte is filled with zeros."""
    flat = digits.reshape(-1)
    joined = np.zeros(part.bytes(flat.size), np.uint8)
    for place in range(part.per_byte):
        each = flat[place :: part.per_byte]
        joined[: each.size] += each * np.uint8(len(part.values) ** place)
    return joined
