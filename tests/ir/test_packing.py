"""Packed codes: every code of every width, odd sizes, and the operators against the numpy truth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from octavo.ir.packing import pack, packed_bytes, parts, steps, unpack
from octavo.ir.quant import QuantSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
    (made,) = ReferenceEvaluator(_graph(codes, spec)).run(None, {})
    assert np.asarray(made).dtype == np.int8
    np.testing.assert_array_equal(np.asarray(made), codes)


def _graph(codes: NDArray[np.int8 | np.uint8], spec: QuantSpec) -> onnx.ModelProto:
    constants = []
    for index, (part, array) in enumerate(zip(parts(spec), pack(codes, spec), strict=True)):
        if part.native is None:
            constants.append(numpy_helper.from_array(array, f"part{index}"))
            constants.append(numpy_helper.from_array(part.table, f"table{index}"))
        else:
            values = array.astype(np.int32).reshape(-1).tolist()
            constants.append(helper.make_tensor(f"part{index}", part.native, array.shape, values))
    nodes = []
    for step in steps(codes.shape, spec):
        names = [n if isinstance(n, str) else "sizes" + "_".join(map(str, n)) for n in step.inputs]
        for name, given in zip(names, step.inputs, strict=True):
            if not isinstance(given, str) and name not in {t.name for t in constants}:
                constants.append(numpy_helper.from_array(np.array(given, np.int64), name))
        attributes: dict[str, Any] = {} if step.to is None else {"to": int(step.to)}
        nodes.append(helper.make_node(step.op_type, names, [step.output], **attributes))
    output = helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.INT8, codes.shape)
    graph = helper.make_graph(nodes, "g", [], [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("dtype", ["u4", "u2"])
def test_unsigned_codes_are_not_packed(dtype: QuantType) -> None:
    with pytest.raises(ValueError, match="only signed codes"):
        packed_bytes((3,), QuantSpec(dtype))


@pytest.mark.parametrize(("dtype", "code"), [("s1", 0), ("s2", -2), ("s3", 4), ("s7", -65)])
def test_a_code_the_grid_does_not_have_is_refused(dtype: QuantType, code: int) -> None:
    with pytest.raises(ValueError, match="a code outside"):
        pack(np.array([1, code], np.int8), QuantSpec(dtype, symmetric=True))
