"""Latency rows, and the default feeds they are measured with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest
from onnx import numpy_helper

from octavo.backends import bench as bench_module
from octavo.backends.bench import bench, feed_shapes, file_bytes, random_feed
from octavo.ir.calibration import Feed
from octavo.ir.errors import UnknownName, UsageError
from octavo.ir.model import Model, Source

_HEADER = '<ir_version: 10, opset_import: ["" : 21]> g'


def _matmul(path: Path, width: int) -> Path:
    proto = onnx.parser.parse_model(f"{_HEADER} (float[64,256] x) => (y) {{ y = MatMul (x, w) }}")
    weight = np.ones((256, width), np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(proto, path)
    return path


def _model(signature: str, body: str) -> Model:
    proto = onnx.parser.parse_model(f"{_HEADER} {signature} {{ {body} }}")
    return Model(onnx_ir.from_proto(proto), Source("g", "", 0))


@dataclass
class _Recorder:
    """A session that writes down its runs."""

    name: str
    log: list[str]
    seconds: float = 0.0
    inputs: tuple[str, ...] = ("x",)
    fed: list[Feed] = field(default_factory=list)

    def bound(self, feed: Feed) -> Callable[[], None]:
        self.fed.append(feed)
        return self.run

    def run(self) -> None:
        self.log.append(self.name)
        time.sleep(self.seconds)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []

    def make(path: Path, **_: object) -> _Recorder:
        return _Recorder(path.stem, log, seconds=0.002)

    monkeypatch.setattr(bench_module, "make_session", make)
    monkeypatch.setattr(bench_module, "file_bytes", lambda path: 0)
    return log


def test_more_work_is_slower(tmp_path: Path) -> None:
    files = [_matmul(tmp_path / "a.onnx", 64), _matmul(tmp_path / "b.onnx", 2048)]
    found = bench(files, {"x": np.ones((64, 256), np.float32)})
    first, second = found.rows
    assert (first.file, second.file) == tuple(map(str, files))
    assert first.speed == 1.0
    assert second.speed < 0.5
    assert second.median_seconds > 2 * first.median_seconds
    assert all(row.low_seconds <= row.median_seconds <= row.high_seconds for row in found.rows)
    assert found.threads == 1
    assert found.shapes == {"x": "float32[64, 256]"}
    assert "1 thread(s)" in found.environment
    assert found.to_json()["rounds"] == found.rounds


def test_rounds_interleave_and_rotate(recorded: list[str]) -> None:
    files = [Path(name) for name in ("a", "b", "c")]
    found = bench(files, {}, rounds=3, warm_up=1)
    assert found.rounds == 3
    assert "".join(recorded) == "abc" + "abc" + "bca" + "cab"


def test_large_files_take_turns(monkeypatch: pytest.MonkeyPatch, recorded: list[str]) -> None:
    monkeypatch.setattr(bench_module, "_LARGE_BYTES", -1)
    found = bench([Path("a"), Path("b")], {}, rounds=4, warm_up=1)
    assert "".join(recorded) == "a" * 5 + "b" * 5
    assert found.rounds == 4
    assert found.rows[0].speed == 1.0


def test_time_limit_still_gives_three_rounds(recorded: list[str]) -> None:
    found = bench([Path("a"), Path("b")], {}, seconds_limit=0.0, warm_up=5)
    assert found.rounds == 3
    assert len(recorded) == 2 + 2 * 3  # one warm-up round took the time of all


def test_steady_timings_stop_early(monkeypatch: pytest.MonkeyPatch, recorded: list[str]) -> None:
    monkeypatch.setattr(bench_module, "_seconds", lambda call: call() or 1.0)
    assert bench([Path("a"), Path("b")], {}, rounds=500).rounds < 20


def test_unsteady_timings_use_all_rounds(
    monkeypatch: pytest.MonkeyPatch, recorded: list[str]
) -> None:
    ticks = iter(np.random.default_rng(0).uniform(1, 3, 1000))
    monkeypatch.setattr(bench_module, "_seconds", lambda call: float(next(ticks)))
    assert bench([Path("a"), Path("b")], {}, rounds=100).rounds == 100


def test_a_small_model_takes_a_moment(tmp_path: Path) -> None:
    files = [_matmul(tmp_path / "a.onnx", 8)] * 2
    begin = time.perf_counter()
    bench(files, {"x": np.ones((64, 256), np.float32)})
    assert time.perf_counter() - begin < 1.0  # 0.05 s on an idle machine


def test_no_file_is_an_error() -> None:
    with pytest.raises(UsageError, match="no file"):
        bench([], {})


def test_bytes_include_external_data(tmp_path: Path) -> None:
    path = _matmul(tmp_path / "a.onnx", 64)
    assert file_bytes(path) == path.stat().st_size
    proto = onnx.load(path)
    outside = tmp_path / "outside.onnx"
    onnx.save(proto, outside, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert file_bytes(outside) == outside.stat().st_size + 256 * 64 * 4


@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        ("float[N,3,H,W]", "float32[1, 3, 224, 224]"),
        ("float[N,C,H,W]", "float32[1, 3, 224, 224]"),
        ("float[N,H,W,3]", "float32[1, 224, 224, 3]"),
        ("float[N,3,48,W]", "float32[1, 3, 48, 224]"),
        ("float[2,1,28,28]", "float32[2, 1, 28, 28]"),
        ("int64[batch,seq]", "int64[1, 32]"),
        ("float[batch,frames,80]", "float32[1, 32, 80]"),
        ("float[batch,8,past_length,64]", "float32[1, 8, 0, 64]"),
        ("double[N]", "float64[1]"),
        ("bool[N,5]", "bool[1, 5]"),
    ],
)
def test_default_shapes(declared: str, shape: str) -> None:
    feed = random_feed(_model(f"({declared} x) => (y)", "y = Identity (x)"))
    assert feed_shapes(feed) == {"x": shape}


def test_one_name_gets_one_size() -> None:
    model = _model("(int64[B,S] x, int64[B,S] y, float[S,S] m) => (z)", "z = Add (x, y)")
    feed = random_feed(model, {"x": (2, 7)})
    assert feed_shapes(feed) == {"x": "int64[2, 7]", "y": "int64[2, 7]", "m": "float32[7, 7]"}


def test_indices_stay_inside_their_table() -> None:
    model = _model(
        "(int64[B,S] ids, float[B,S] types, int32[B,S] flags, int64[B,S] attention_mask) => (y)"
        " <float[9,4] table, float[3,4] small>",
        """r = Unsqueeze (ids, k) i = Cast <to : int = 6> (r) a = Gather (table, i)
        t = Cast <to : int = 7> (types) b = Gather (small, t) y = Add (a, b)""",
    )
    for name, shape in (("table", [9, 4]), ("small", [3, 4])):
        gathers = (n for n in model.graph if n.op_type == "Gather")
        value = next(v for n in gathers for v in n.inputs if v is not None and v.name == name)
        value.shape = onnx_ir.Shape(shape)
    feed = random_feed(model, {"ids": (4, 50)})
    assert set(np.unique(feed["ids"]).tolist()) == set(range(9))
    assert set(np.unique(feed["types"]).tolist()) == {0.0, 1.0, 2.0}
    assert set(np.unique(feed["flags"]).tolist()) == {0, 1}
    assert set(np.unique(feed["attention_mask"]).tolist()) == {1}


def test_feeds_are_the_same_for_one_seed() -> None:
    model = _model("(float[N,4] x) => (y)", "y = Identity (x)")
    feeds = [random_feed(model, seed=seed)["x"] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(feeds[0], feeds[1])
    assert not np.array_equal(feeds[0], feeds[2])


def test_shapes_that_cannot_be_are_errors() -> None:
    model = _model("(float[N,4] images) => (y)", "y = Identity (images)")
    with pytest.raises(UnknownName, match="unknown input 'image'") as unknown:
        random_feed(model, {"image": (1, 4)})
    assert "images" in unknown.value.hint
    for shape in ((1, 5), (1, 4, 1), (-1, 4)):
        with pytest.raises(UsageError, match="does not fit input 'images'"):
            random_feed(model, {"images": shape})


def test_text_inputs_have_no_default() -> None:
    with pytest.raises(UsageError, match="no default feed"):
        random_feed(_model("(string[N] s) => (y)", "y = Identity (s)"))
