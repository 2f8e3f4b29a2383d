"""Tables of latencies: files that come back equal, damaged ones, other devices, costs by table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.backends.ort_target import ORT_CPU
from octavo.ir.cost import AnalyticCost
from octavo.ir.errors import UsageError
from octavo.ir.facts import FLOAT, Option
from octavo.ir.latency_table import LatencyTable, read_table
from octavo.ir.quant import PerAxis, PerBlock, QuantSpec
from octavo.ir.read import read
from octavo.ir.table_cost import TableCost

if TYPE_CHECKING:
    from octavo.ir.facts import Method
    from octavo.ir.model import Model

HERE = "onnxruntime 1.31.1, Some CPU, 16 cores, 1 thread(s)"
MATMUL = "MatMul(float 4x128, const float 128x64) -> 4x64"
TABLE = LatencyTable(
    HERE,
    {MATMUL: {"float": 8e-6, "static": 2e-6, "weight-only:s4/block32@0": 5e-6}},
    1e-10,
    3e-10,
)


def test_a_file_gives_the_table_back(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    TABLE.write(path)
    assert read_table(path) == TABLE
    again = tmp_path / "again.json"
    read_table(path).write(again)
    assert again.read_bytes() == path.read_bytes()


def _content() -> dict[str, Any]:
    return {
        "format": "octavo latencies 1",
        "environment": HERE,
        "quantize_seconds_per_byte": 1e-10,
        "dequantize_seconds_per_byte": 1e-10,
        "rows": {MATMUL: {"float": 1e-6}},
    }


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": "else"}, "format"),
        ({"environment": 3}, "environment"),
        ({"rows": []}, "rows"),
        ({"rows": {MATMUL: {"float": "fast"}}}, "MatMul"),
        ({"rows": {MATMUL: {"float": -1.0}}}, "MatMul"),
        ({"rows": {MATMUL: {"float": float("nan")}}}, "MatMul"),
        ({"rows": {MATMUL: {"float": True}}}, "MatMul"),
        ({"rows": {MATMUL: 1e-6}}, "MatMul"),
        ({"quantize_seconds_per_byte": None}, "rates"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    path = tmp_path / "device.json"
    path.write_text(json.dumps(_content() | change))
    with pytest.raises(UsageError) as caught:
        read_table(path)
    assert why in caught.value.why
    assert "octavo profile" in caught.value.hint
    path.write_text(json.dumps(_content()))
    assert read_table(path).rows == {MATMUL: {"float": 1e-6}}


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b'{"format": '])
def test_any_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "device.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is no latency profile"):
        read_table(path)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_table(tmp_path / "missing.json")
    with pytest.raises(UsageError, match="cannot be written"):
        TABLE.write(tmp_path / "missing" / "device.json")


def test_differences_name_each_part() -> None:
    assert TABLE.differences(HERE) == ()
    assert TABLE.differences("onnxruntime 1.32.0, Some CPU, 16 cores, 2 thread(s)") == (
        "runtime: the profile has 'onnxruntime 1.31.1', here is 'onnxruntime 1.32.0'",
        "threads: the profile has '1 thread(s)', here is '2 thread(s)'",
    )
    (processor,) = TABLE.differences("onnxruntime 1.31.1, Other CPU, 1 thread(s)")
    assert "'Some CPU, 16 cores'" in processor


def test_merging_keeps_both_and_prefers_the_newer() -> None:
    newer = LatencyTable(HERE, {MATMUL: {"float": 9e-6, "dynamic": 3e-6}, "Exp": {"float": 1e-6}})
    merged = TABLE.merge(newer)
    assert merged.rows == {
        MATMUL: {
            "float": 9e-6,
            "static": 2e-6,
            "weight-only:s4/block32@0": 5e-6,
            "dynamic": 3e-6,
        },
        "Exp": {"float": 1e-6},
    }
    assert TABLE.rows[MATMUL]["float"] == 8e-6


def _model() -> Model:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[N,128] x) => (float[N,64] y) {
        [m] t = MatMul (x, w)  [e] y = Exp (t) }"""
    proto = onnx.parser.parse_model(text)
    weight = np.ones((128, 64), np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return read(proto)


def _cost(table: LatencyTable = TABLE) -> TableCost:
    return TableCost.of(_model(), table, ORT_CPU, {"x": np.zeros((4, 128), np.float32)})


def _weights(method: Method, dtype: Any, block: int = 0) -> Option:
    return Option(method, QuantSpec(dtype, PerBlock(0, block) if block else PerAxis(1)))


def test_rows_of_the_table_win() -> None:
    cost, (matmul, _) = _cost(), list(_model().graph)
    assert cost.option_seconds(matmul, FLOAT) == cost.seconds(matmul, "float") == 8e-6
    assert cost.option_seconds(matmul, _weights("storage", "s4")) == 8e-6
    assert cost.option_seconds(matmul, _weights("static", "s8")) == 2e-6
    assert cost.option_seconds(matmul, _weights("static", "s3")) == 2e-6
    assert cost.option_seconds(matmul, _weights("weight-only", "s4", 32)) == 5e-6
    # The block size that was measured stands in for its neighbour, another width does not.
    assert cost.option_seconds(matmul, _weights("weight-only", "s4", 128)) == 5e-6
    assert cost.option_seconds(matmul, _weights("weight-only", "s2", 128)) != 5e-6
    assert cost.seconds(matmul, "weight-only") == 5e-6
    assert cost.macs(matmul) == 4 * 128 * 64


def test_what_the_table_lacks_is_estimated_and_counted() -> None:
    cost, (matmul, exp) = _cost(), list(_model().graph)
    analytic = AnalyticCost(ORT_CPU, {"x": 512, "t": 256, "y": 256})
    own, dynamic = analytic.seconds(matmul, "float"), analytic.seconds(matmul, "dynamic")
    other = analytic.seconds(exp, "float")
    assert own is not None
    assert dynamic is not None
    assert other is not None
    # Eight microseconds were measured for what is estimated as `own`.
    scale = 8e-6 / own
    assert cost.seconds(matmul, "dynamic") == pytest.approx(dynamic * scale, rel=1e-12)
    assert cost.seconds(exp, "float") == pytest.approx(other * scale, rel=1e-12)
    assert cost.seconds(exp, "static") is None
    assert cost.source == f"measured on {HERE}, 1 of 2 nodes estimated"


def test_a_table_of_other_models_is_analytic_and_says_so() -> None:
    cost, (matmul, _) = _cost(LatencyTable(HERE, {"Exp": {"float": 1.0}})), list(_model().graph)
    expected = AnalyticCost(ORT_CPU, {"x": 512, "t": 256}).seconds(matmul, "float")
    assert cost.seconds(matmul, "float") == expected
    assert cost.source.startswith("analytic")


def test_a_border_costs_the_mean_rate() -> None:
    value = _model().graph.inputs[0]
    assert _cost().boundary_seconds(value) == pytest.approx(1e-6 + 4 * 512 * 2e-10, rel=1e-12)
