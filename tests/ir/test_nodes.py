"""Every ONNX node case: read, copy, write, run in onnxruntime, compare with what ONNX expects.

`unsupported_node_cases.txt` lists what cannot pass and why; a listed case that passes is a
failure, so that the list only shrinks.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from onnx.helper import np_dtype_to_tensor_dtype as onnx_type
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from octavo.ir.errors import OctavoError
from octavo.ir.read import read
from octavo.ir.write import serialize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnx.backend.test.case.test_case import TestCase as NodeCase

LIST = Path(__file__).with_name("unsupported_node_cases.txt")
CASES = 1884
GROUPS = 6
MACHINE = "depends on the machine"
BITS = {
    TensorProto.BFLOAT16: np.uint16,
    TensorProto.FLOAT8E4M3FN: np.uint8,
    TensorProto.FLOAT8E4M3FNUZ: np.uint8,
    TensorProto.FLOAT8E5M2: np.uint8,
    TensorProto.FLOAT8E5M2FNUZ: np.uint8,
}
FAILURES = (
    OctavoError,
    AssertionError,
    TypeError,
    ValueError,
    RuntimeError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


@cache
def node_cases() -> tuple[NodeCase, ...]:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        # numpy warns of the overflows and divisions that some cases are about.
        warnings.simplefilter("ignore", RuntimeWarning)
        return tuple(load_model_tests(kind="node"))


def unsupported() -> dict[str, str]:
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return dict(line.split(": ", 1) for line in lines if line and not line.startswith("#"))


def problem(case: NodeCase, content: bytes | None = None) -> str:
    """Why a case fails, in one line; empty if it passes."""
    assert case.model is not None
    assert case.data_sets is not None
    try:
        if content is None:
            content = serialize(read(case.model).clone())
        for inputs, expected in case.data_sets:
            outputs = run(content, [value.name for value in case.model.graph.input], inputs)
            assert len(outputs) == len(expected)
            for actual, truth in zip(outputs, expected, strict=True):
                compare(actual, as_array(truth), case)
    except FAILURES as error:
        return " ".join(f"{type(error).__name__} {error}".split())[:200]
    return ""


def run(content: bytes, names: list[str], inputs: Sequence[Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feed = dict(zip(names, map(as_array, inputs), strict=False))
    if not any(type_of(array) in BITS for array in feed.values()):
        outputs: list[Any] = session.run(None, feed)
        return outputs
    values = {name: as_ort_value(array) for name, array in feed.items()}
    return [value.numpy() for value in session.run_with_ort_values(None, values)]


def type_of(value: Any) -> int | None:
    return None if value is None or isinstance(value, list) else onnx_type(value.dtype)


def as_ort_value(array: np.ndarray) -> onnxruntime.OrtValue:
    """A tensor of a type that numpy lacks is handed over by its bits."""
    kind = onnx_type(array.dtype)
    if kind not in BITS:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    bits = np.ascontiguousarray(array).view(BITS[kind])
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)


def as_array(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if isinstance(value, list):
        return [as_array(entry) for entry in value]
    return value if value is None else np.asarray(value)


def compare(actual: Any, truth: Any, case: NodeCase) -> None:
    if isinstance(truth, list):
        assert len(actual) == len(truth)
        for one, other in zip(actual, truth, strict=True):
            compare(one, other, case)
    elif truth is None or np.asarray(truth).dtype == object:
        np.testing.assert_array_equal(actual, truth)
    else:
        truth = np.asarray(truth)
        if onnx_type(truth.dtype) in BITS and actual.dtype == BITS[onnx_type(truth.dtype)]:
            actual = actual.view(truth.dtype)
        assert (actual.dtype, actual.shape) == (truth.dtype, truth.shape)
        if onnx_type(truth.dtype) in BITS:
            actual, truth = actual.astype(np.float32), truth.astype(np.float32)
        np.testing.assert_allclose(actual, truth, rtol=case.rtol, atol=case.atol)


def test_all_cases_are_there() -> None:
    names = {case.name for case in node_cases()}
    assert len(names) == CASES
    assert set(unsupported()) <= names


@pytest.mark.nodes
@pytest.mark.parametrize("group", range(GROUPS))
def test_node_cases_survive_reading_and_writing(group: int) -> None:
    listed = unsupported()
    found = {case.name: problem(case) for case in node_cases()[group::GROUPS]}
    broken = {name: why for name, why in found.items() if why and name not in listed}
    fixed = {name for name, why in listed.items() if not why.startswith(MACHINE)}
    mended = [name for name, why in found.items() if not why and name in fixed]
    assert not broken
    assert not mended, "these cases pass now: remove them from the list"
