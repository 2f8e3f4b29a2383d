"""Packed codes: every code of every width, odd sizes, and the operators against the numpy truth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from octavo.ir.packing import (
    block_parts,
    block_steps,
    blocks_shape,
    kernel_bits,
    pack,
    pack_blocks,
    packed_bytes,
    parts,
    steps,
    unpack,
)
from octavo.ir.quant import QuantSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from octavo.ir.packing import Part, Step
    from octavo.ir.quant import QuantType

SPECS = (
    *(QuantSpec(dtype, symmetric=True) for dtype in ("s1", "s2", "s3", "s4", "s5", "s6", "s7")),
    QuantSpec("s8", symmetric=True),
    *(QuantSpec(dtype) for dtype in ("s2", "s3", "s4", "s5", "s6", "s7", "s8", "u8")),
)
SHAPES = ((1,), (3,), (4, 5), (7, 3, 3), (8, 5), (40,), (2, 3, 5, 7))


def _name(value: object) -> str:
    return (
        f"{value}{'-' if value.symmetric else ''}" if isinstance(value, QuantSpec) else str(value)
    )


def _all_codes(spec: QuantSpec) -> NDArray[np.int8 | np.uint8]:
    """Every code the type holds (of a symmetric grid: that it uses)."""
    dtype = np.int8 if spec.signed else np.uint8
    if spec.bits == 1:
        return np.array([-1, 1], dtype)
    least = spec.qmin - (spec.symmetric and spec.bits > 2)
    return np.arange(least, spec.qmax + 1).astype(dtype)


def _drawn(spec: QuantSpec, shape: tuple[int, ...]) -> NDArray[np.int8 | np.uint8]:
    return np.random.default_rng(math.prod(shape)).choice(_all_codes(spec), shape)


@pytest.mark.parametrize("spec", SPECS, ids=_name)
def test_every_code_survives_beside_every_other(spec: QuantSpec) -> None:
    codes = _all_codes(spec)
    left, right = (a.reshape(-1) for a in np.meshgrid(codes, codes))
    pairs = np.stack([left, right, right[::-1]], axis=1)
    np.testing.assert_array_equal(unpack(pack(pairs, spec), pairs.shape, spec), pairs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=_name)
def test_any_size_survives(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    codes = _drawn(spec, shape)
    found = unpack(pack(codes, spec), shape, spec)
    assert found.dtype == codes.dtype
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize(
    ("dtype", "count", "size"),
    [
        ("s1", 80, 10), ("s1", 81, 11), ("s2", 80, 16), ("s2", 81, 17), ("s3", 80, 30),
        ("s4", 81, 41), ("s5", 80, 50), ("s6", 80, 60), ("s7", 80, 70), ("s7", 81, 41 + 21 + 11),
        ("s8", 81, 81),
    ],
)  # fmt: skip
def test_the_bytes_of_a_width(dtype: QuantType, count: int, size: int) -> None:
    spec = QuantSpec(dtype, symmetric=True)
    assert packed_bytes((count,), spec) == size
    stored = zip(parts(spec), pack(_drawn(spec, (count,)), spec), strict=True)
    tensors = [
        helper.make_tensor("t", part.native, a.shape, a.astype(np.int32).tolist())
        if part.native is not None and spec.bits < 8
        else numpy_helper.from_array(a)
        for part, a in stored
    ]
    assert sum(len(t.raw_data) or len(t.int32_data) for t in tensors) == size


def test_a_two_bit_grid_of_four_codes_takes_two_bits() -> None:
    assert packed_bytes((80,), QuantSpec("s2")) == 20


@pytest.mark.parametrize("shape", [(4, 5), (7, 3, 3), (8, 5)], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=_name)
def test_the_operators_compute_what_numpy_does(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    codes = _drawn(spec, shape)
    found = steps(shape, spec)
    if spec.bits == 8:
        assert not found
        return
    made = _ran(found, parts(spec), pack(codes, spec), shape)
    assert made.dtype == np.int8
    np.testing.assert_array_equal(made, codes)


def _ran(
    made: Sequence[Step],
    stored: Sequence[Part],
    packed: Sequence[NDArray[Any]],
    shape: tuple[int, ...],
) -> NDArray[Any]:
    """What the operators compute, by ONNX's reference."""
    (found,) = ReferenceEvaluator(_graph(made, stored, packed, shape)).run(None, {})
    return np.asarray(found)


def _graph(
    made: Sequence[Step],
    stored: Sequence[Part],
    packed: Sequence[NDArray[Any]],
    shape: tuple[int, ...],
) -> onnx.ModelProto:
    constants = [numpy_helper.from_array(a, "codebook") for a in packed[len(stored) :]]
    for index, (part, array) in enumerate(zip(stored, packed, strict=False)):
        if part.native is None:
            constants.append(numpy_helper.from_array(array, f"part{index}"))
            constants.append(numpy_helper.from_array(part.table, f"table{index}"))
        else:
            values = array.astype(np.int32).reshape(-1).tolist()
            constants.append(helper.make_tensor(f"part{index}", part.native, array.shape, values))
    nodes = []
    for step in made:
        names = [n if isinstance(n, str) else "sizes" + "_".join(map(str, n)) for n in step.inputs]
        for name, given in zip(names, step.inputs, strict=True):
            if not isinstance(given, str) and name not in {t.name for t in constants}:
                constants.append(numpy_helper.from_array(np.array(given, np.int64), name))
        attributes: dict[str, Any] = {} if step.to is None else {"to": int(step.to)}
        nodes.append(helper.make_node(step.op_type, names, [step.output], **attributes))
    kinds = {part.to for part in stored}
    output = helper.make_tensor_value_info(nodes[-1].output[0], int(kinds.pop()), shape)
    graph = helper.make_graph(nodes, "g", [], [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("bits", range(1, 9))
def test_blocks_of_every_width_are_what_kernels_read(bits: int, size: int) -> None:
    """Every code beside every other; digits are offset by the kernel's own zero point."""
    all_codes = _all_codes(QuantSpec(f"s{bits}"))  # type: ignore[arg-type]
    left, right = (a.reshape(-1) for a in np.meshgrid(all_codes, all_codes))
    short = -2 * left.size % 7
    pairs = np.stack([left, right], axis=1).reshape(-1)
    codes = np.concatenate([pairs, pairs[:short]]).reshape(7, -1)
    width = kernel_bits(bits)
    shape = blocks_shape(*codes.shape, bits, size)
    packed = pack_blocks(codes, bits, size)
    found = (
        packed[0]
        if bits == width
        else _ran(block_steps(shape, bits), block_parts(bits), packed, shape)
    )
    assert found.shape == shape
    digits = found[..., None] >> width * np.arange(8 // width) & (1 << width) - 1
    read = digits.reshape(7, -1)[:, : codes.shape[1]] - (1 << width - 1)
    np.testing.assert_array_equal(read, codes)
    stored = sum(a.size * (0.5 if a.dtype.itemsize == 1 and a.ndim == 3 and bits != width else 1)
                 for a in packed)  # fmt: skip
    assert stored == 7 * shape[1] * size * bits / 8


@pytest.mark.parametrize("shape", [(1,), (40,), (7, 3, 3)], ids=str)
@pytest.mark.parametrize("bits", range(1, 8))
def test_few_codes_are_indices(bits: int, shape: tuple[int, ...]) -> None:
    spec = QuantSpec("s8", symmetric=True, index_bits=bits)
    rng = np.random.default_rng(bits)
    chosen = rng.choice(np.arange(-127, 128), 2**bits, replace=False)
    codes = rng.choice(chosen, shape).astype(np.int8)
    packed = pack(codes, spec)
    np.testing.assert_array_equal(unpack(packed, shape, spec), codes)
    np.testing.assert_array_equal(_ran(steps(shape, spec), parts(spec), packed, shape), codes)
    assert packed[-1].size == (3 if bits == 1 else 2**bits)


def test_more_codes_than_indices_are_refused() -> None:
    with pytest.raises(ValueError, match="5 different codes, 2 bits tell 4 apart"):
        pack(np.arange(5, dtype=np.int8), QuantSpec("s8", index_bits=2))


@pytest.mark.parametrize("dtype", ["u4", "u2"])
def test_unsigned_codes_are_not_packed(dtype: QuantType) -> None:
    with pytest.raises(ValueError, match="only signed codes"):
        packed_bytes((3,), QuantSpec(dtype))


@pytest.mark.parametrize(("dtype", "code"), [("s1", 0), ("s2", -2), ("s3", 4), ("s7", -65)])
def test_a_code_the_grid_does_not_have_is_refused(dtype: QuantType, code: int) -> None:
    with pytest.raises(ValueError, match="a code outside"):
        pack(np.array([1, code], np.int8), QuantSpec(dtype, symmetric=True))
