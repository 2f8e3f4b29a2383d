"""Distances of outputs against their formulas."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from octavo.backends.fidelity import compare, run_file
from octavo.ir.errors import VerificationFailed


def outputs(**arrays: object) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in arrays.items()}


def floats(*values: object) -> np.ndarray:
    return np.array(values, np.float32)


def test_equal_outputs_have_no_distance() -> None:
    rows = floats([1, 2, 3], [3, 2, 1])
    found = compare([{"y": rows}], [{"y": rows.copy()}])
    assert found.cosine == pytest.approx(1.0)
    assert (found.relative_error, found.agreement, found.samples) == (0.0, 1.0, 1)


def test_sums_run_over_all_feeds() -> None:
    reference = [{"y": floats([3, 0])}, {"y": floats([0, 4])}]
    actual = [{"y": floats([3, 1])}, {"y": floats([2, 4])}]
    found = compare(reference, actual)
    assert found.relative_error == pytest.approx(math.sqrt((1 + 4) / (9 + 16)))
    assert found.cosine == pytest.approx((9 + 16) / math.sqrt((9 + 16) * (9 + 1 + 4 + 16)))
    assert found.samples == 2


def test_agreement_is_the_share_of_rows_with_one_maximum() -> None:
    reference = floats([1, 2, 3], [3, 2, 1], [1, 3, 2], [9, 1, 1])
    actual = floats([1, 2, 4], [1, 2, 3], [1, 3, 2], [9, 8, 1])
    assert compare([{"y": reference}], [{"y": actual}]).agreement == 0.75


def test_the_worst_output_counts() -> None:
    reference = outputs(good=floats(1, 1), bad=floats(1, 1))
    actual = outputs(good=floats(1, 1), bad=floats(1, 3))
    found = compare([reference], [actual])
    assert found.relative_error == pytest.approx(math.sqrt(2))
    assert found.agreement is None


def test_small_weights_of_half_precision_do_not_overflow() -> None:
    big = np.full((2, 300), 60000, np.float16)
    found = compare([{"y": big}], [{"y": big}])
    assert found.relative_error == 0.0
    assert found.cosine == pytest.approx(1.0)


@pytest.mark.parametrize("array", [np.arange(4), np.array([True]), np.zeros((0, 3), np.float32)])
def test_outputs_without_a_distance_are_passed_over(array: np.ndarray) -> None:
    found = compare([{"y": array}], [{"y": array}])
    assert (found.relative_error, found.cosine, found.agreement) == (0.0, 1.0, None)


def test_an_error_of_a_zero_reference_is_absolute() -> None:
    assert compare([{"y": floats(0, 0)}], [{"y": floats(3, 4)}]).relative_error == 5.0


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(VerificationFailed, match="'y' is not finite"):
        compare([{"y": floats(1, 2)}], [{"y": floats(1, math.nan)}])


def test_another_shape_is_refused() -> None:
    with pytest.raises(VerificationFailed, match="another shape") as error:
        compare([{"y": floats(1, 2)}], [{"y": floats(1, 2, 3)}])
    assert error.value.why == "(3,) instead of (2,)"


def test_feeds_must_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare([{"y": floats(1)}, {"y": floats(1)}], [{"y": floats(1)}])


def test_a_file_runs_every_feed(tmp_path: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Neg (x) }'
    )
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    # A feed may hold more than the model reads.
    found = run_file(path, [{"x": floats(1, 2)}, {"x": floats(3, 4), "z": floats(5)}], threads=1)
    assert [result["y"].tolist() for result in found] == [[-1, -2], [-3, -4]]


def test_a_few_numbers_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    reference, actual = ([{"y": rng.standard_normal((6, 5)).astype(np.float32)}] for _ in "ab")
    whole = compare(reference, actual)
    monkeypatch.setattr("octavo.backends.fidelity._ELEMENTS", 7)
    parts = compare(reference, actual)
    assert parts.relative_error == pytest.approx(whole.relative_error, rel=1e-12)
    assert parts.cosine == pytest.approx(whole.cosine, rel=1e-12)
    assert parts.agreement == whole.agreement
