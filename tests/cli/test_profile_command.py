"""`octavo profile`: figures against the clock, the cache, other devices, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from octavo.backends.bench import bench
from octavo.backends.ort_session import environment
from octavo.backends.ort_target import ORT_CPU
from octavo.backends.ort_timing import time_nodes
from octavo.cli.profiling import DEFAULT_KINDS, Check, Kind, with_neighbours
from octavo.cli.recorded_profile import cost_of_profile
from octavo.ir.backend import Timing
from octavo.ir.cache import ENVIRONMENT
from octavo.ir.errors import UnknownName
from octavo.ir.facts import FLOAT, Choice, Option, Plan
from octavo.ir.latency_table import LatencyTable, read_table
from octavo.ir.read import read

Octavo = Callable[..., Any]
SHAPE = ("--shape", "input=4x1x28x28")
QUICK = ("--seconds", "0.1", "--kind", "static", "--kind", "dynamic")
# Two short measurements of one file on a machine that others use.
FACTOR = 2.5


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "cache"))


def test_a_profile_adds_up_to_the_clock(octavo: Octavo, network: Path, tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    result = octavo("profile", network, "-o", path, *SHAPE, *QUICK, "--json")
    assert result.code == 0, result.err
    content, table = json.loads(result.out), read_table(path)
    assert content["environment"] == table.environment == environment(1)
    assert {row["signature"]: row["seconds"] for row in content["rows"]} == table.rows
    feed = {"input": np.zeros((4, 1, 28, 28), np.float32)}
    wall = bench([network], feed, seconds_limit=0.2).rows[0].median_seconds
    total = sum(row["nodes"] * row["seconds"]["float"] for row in content["rows"])
    assert wall / FACTOR < total < wall * FACTOR
    # The checks time the files that were built: float, all static, all dynamic.
    assert [check["kind"] for check in content["checks"]] == ["float", "static", "dynamic"]
    for check in content["checks"]:
        ratio = check["predicted_seconds"] / check["measured_seconds"]
        assert 1 / FACTOR < ratio < FACTOR
        assert check["error"] == pytest.approx(ratio - 1, abs=1e-12)


def test_every_node_is_counted_and_integer_kernels_are_faster(
    octavo: Octavo, network: Path, tmp_path: Path
) -> None:
    path = tmp_path / "device.json"
    result = octavo("profile", network, "-o", path, *SHAPE, *QUICK, "--json")
    rows = json.loads(result.out)["rows"]
    convolutions = [row for row in rows if row["signature"].startswith("Conv{")]
    nodes = onnx.load(network).graph.node
    assert sum(row["nodes"] for row in convolutions) == sum(n.op_type == "Conv" for n in nodes)
    assert len(convolutions) < sum(row["nodes"] for row in convolutions)
    # Integer 1x1 kernels take less than half of float's time.
    pointwise = [row for row in convolutions if "kernel_shape=[1,1]" in row["signature"]]
    sums = {
        key: sum(row["nodes"] * row["seconds"][key] for row in pointwise)
        for key in ("float", "static")
    }
    assert sums["static"] < sums["float"]
    assert all("dynamic" not in row["seconds"] for row in convolutions)


def test_what_was_measured_is_not_measured_again(
    octavo: Octavo, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert octavo("profile", network, "-o", first, *SHAPE, *QUICK).code == 0
    timed: list[object] = []

    def counted(artifacts: Any, *rest: Any, **options: Any) -> Any:
        timed.append([artifact.path.parent.name for artifact in artifacts])
        return time_nodes(artifacts, *rest, **options)

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a session was made")

    monkeypatch.setattr("octavo.backends.ort_timing.time_nodes", counted)
    with monkeypatch.context() as patched:
        patched.setattr("octavo.backends.ort_session._load", refused)
        result = octavo("profile", network, "-o", second, *SHAPE, *QUICK)
    assert result.code == 0, result.err
    assert "nothing was run" in result.out
    assert second.read_bytes() == first.read_bytes()
    # A way that is new is timed beside float; what is known keeps its figures.
    more = ("--kind", "weight-only:s4/block32")
    assert octavo("profile", network, "-o", second, *SHAPE, *QUICK, *more).code == 0
    assert timed == [["float", "weight-only-s4-block32"]]
    before, after = read_table(first).rows, read_table(second).rows
    assert all(before[name].items() <= after[name].items() for name in before)
    assert any("weight-only:s4/block32@1" in row for row in after.values())


def test_without_a_cache_everything_is_measured(
    octavo: Octavo, network: Path, tmp_path: Path
) -> None:
    path = tmp_path / "device.json"
    options = (*SHAPE, "--seconds", "0", "--kind", "dynamic", "--no-cache", "--json")
    for _ in range(2):
        assert json.loads(octavo("profile", network, "-o", path, *options).out)["checks"]
    assert not (tmp_path / "cache").exists()


def test_a_profile_of_this_device_is_extended(
    octavo: Octavo, network: Path, tmp_path: Path
) -> None:
    path = tmp_path / "device.json"
    LatencyTable(environment(1), {"Exp(float 9) -> 9": {"float": 1e-6}}).write(path)
    options = (*SHAPE, "--seconds", "0", "--kind", "dynamic")
    assert octavo("profile", network, "-o", path, *options).code == 0
    rows = read_table(path).rows
    assert rows["Exp(float 9) -> 9"] == {"float": 1e-6}
    assert len(rows) > 10


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("-o", "new.json", "--target", "ort-cqu"), "unknown target 'ort-cqu'"),
        (("-o", "new.json", "--kind", "statik"), "unknown way to compute 'statik'"),
        (("-o", "missing/new.json"), "cannot be written"),
        (("-o", "."), "it is not a file"),
        (("-o", "foreign.json"), "runtime: the profile has 'onnxruntime 0.1'"),
        (("-o", "else.json"), "is no latency profile"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    octavo: Octavo,
    network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = environment(1).partition(", ")[2]
    LatencyTable(f"onnxruntime 0.1, {elsewhere}").write(tmp_path / "foreign.json")
    (tmp_path / "else.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    result = octavo("profile", network, *arguments)
    assert result.code == 2
    assert text in result.err
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json")} == before


def test_a_model_without_nodes_is_refused(octavo: Octavo, tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph([], "g", [value], [value])
    opset = [onnx.helper.make_opsetid("", 21)]
    proto = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.save(proto, tmp_path / "empty.onnx")
    result = octavo("profile", tmp_path / "empty.onnx", "-o", tmp_path / "device.json")
    assert result.code == 2
    assert "no node to measure" in result.err


def test_a_profile_of_another_device_gives_warnings(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y)
        { [a] t = Exp (x) [b] y = Tanh (t) }"""
    model = read(onnx.parser.parse_model(text))
    runtime, _, rest = environment(1).partition(", ")
    processor = rest.rpartition(", ")[0]
    path = tmp_path / "board.json"
    LatencyTable(
        f"{runtime}, Board CPU, 4 thread(s)", {"Exp(float 2) -> 2": {"float": 5e-6}}
    ).write(path)
    feed = {"x": np.zeros(2, np.float32)}
    cost, warnings = cost_of_profile(path, model, ORT_CPU, feed, 1)
    assert warnings == (
        f"board.json was recorded elsewhere: processor: the profile has 'Board CPU', "
        f"here is '{processor}'",
        "board.json was recorded elsewhere: threads: the profile has '4 thread(s)', "
        "here is '1 thread(s)'",
        "1 of 2 nodes are not in board.json: their seconds are estimated",
    )
    assert cost.seconds(model.graph[0], "float") == 5e-6
    LatencyTable(environment(1), cost.table.rows).write(path)
    _, warnings = cost_of_profile(path, model, ORT_CPU, feed, 1)
    assert warnings == ("1 of 2 nodes are not in board.json: their seconds are estimated",)


def test_kinds_read_as_they_print() -> None:
    for kind in DEFAULT_KINDS:
        assert Kind.parse(str(kind)) == kind
    for text in ("weight-only:s3/block32", "weight-only", "float"):
        with pytest.raises(UnknownName):
            Kind.parse(text)


def test_what_moves_between_kernels_belongs_to_the_planned_node() -> None:
    """In float the bias is a kernel; an integer kernel absorbs it and undoes a later fusion."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[4,8] x) => (float[4,8] y) {
        [front] s = Exp (x)  [m] p = MatMul (s, s8)  [bias] q = Add (p, b)  [act] r = Tanh (q)
        [far] t = Exp (r)  [n] y = MatMul (t, s8) }"""
    proto = onnx.parser.parse_model(text)
    for name, shape in (("s8", (8, 8)), ("b", (8,))):
        array = np.ones(shape, np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = read(proto)
    options = dict.fromkeys(("front", "bias", "act", "far", "n"), FLOAT)
    options["m"] = Option("dynamic")
    plan = Plan({name: Choice(option, "") for name, option in options.items()}, "")
    before = Timing(0.0, {"front": 1.0, "m": 50.0, "bias": 7.0, "act": 3.0, "far": 2.0}, {})
    after = Timing(0.0, {"front": 1.5, "m": 20.0, "act": 4.0, "far": 9.0, "n": 99.0}, {})
    # 20, the input 0.5 slower, the bias 7 less, the activation 1 more; nothing of farther nodes.
    assert with_neighbours(model, plan, before, after) == {"m": pytest.approx(14.5)}


def test_a_machine_that_changes_its_pace_does_not_change_ratios(
    octavo: Octavo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float takes 20 µs, then 30, then 10; every other kernel half of float beside it."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[4,64] x) => (float[4,64] y)
        { [m] y = MatMul (x, w) }"""
    proto = onnx.parser.parse_model(text)
    weight = np.ones((64, 64), np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, tmp_path / "m.onnx")
    paces = iter((20e-6, 30e-6, 10e-6))

    def timed(artifacts: Any, *_: Any, **__: Any) -> list[Timing]:
        pace = next(paces)
        seconds = (pace, pace / 2)[: len(artifacts)]
        return [Timing(s, {"m": s}, {}) for s in seconds]

    monkeypatch.setattr("octavo.backends.ort_timing.time_nodes", timed)
    kinds = ("static", "dynamic", "weight-only:s4/block32")
    path = tmp_path / "device.json"
    options = [option for kind in kinds for option in ("--kind", kind)]
    result = octavo("profile", tmp_path / "m.onnx", "-o", path, "--seconds", "0", *options)
    assert result.code == 0, result.err
    (row,) = read_table(path).rows.values()
    # The best pace is the one that stays, in the file and in the cache.
    assert row.pop("float") == pytest.approx(10e-6)
    assert list(row.values()) == pytest.approx([5e-6] * 3)
    again = tmp_path / "again.json"
    assert octavo("profile", tmp_path / "m.onnx", "-o", again, *options).code == 0
    assert read_table(again) == read_table(path)


def test_the_error_of_a_prediction_is_relative() -> None:
    assert Check("float", 3.0, 2.0).error == pytest.approx(0.5)
