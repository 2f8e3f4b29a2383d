"""The calibrate pass against whole activations that onnxruntime computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.parser
import onnxruntime
import pytest

from octavo.backends.ov_target import OPENVINO
from octavo.backends.trt_target import TARGETS
from octavo.ir.cache import Cache
from octavo.ir.errors import CalibrationError
from octavo.ir.facts import Range, Ranges
from octavo.ir.read_onnx import from_proto
from octavo.passes.base import PassContext, Statistic
from octavo.passes.calibrate import Calibrate
from octavo.passes.clipping import choose_interval
from octavo.passes.histogram import Histogram
from octavo.passes.range_probe import build_probe
from octavo.passes.sweep import sweep_ranges

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from octavo.ir.model import Model

MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
net (float[N, 3, H, H] image, int64[N] index, float scale) => (float[N, 4] out, float[K] none)
<int64[1] zero = {0}, int64[1] minus = {-1}, float[4, 3, 3, 3] w = {WEIGHT}> {
    conv = Conv <pads = [1, 1, 1, 1]> (image, w)
    relu = Relu (conv)
    pool = GlobalAveragePool (relu)
    flat = Flatten (pool)
    scaled = Mul (flat, scale)
    rooted = Sqrt (scaled)
    half = Cast <to = 10> (flat)
    wide = Cast <to = 1> (half)
    ones = Equal (index, zero)
    row = Reshape (scale, minus)
    none = Slice (row, zero, zero)
    out = Add (rooted, wide)
}
"""


@dataclass(frozen=True)
class Feeds:
    feeds: tuple[dict[str, np.ndarray[Any, Any]], ...]
    samples: int
    sha256: str = "0" * 64
    labels: None = None

    def __iter__(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        return iter(self.feeds)


@pytest.fixture(scope="module")
def proto() -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal(108)
    return onnx.parser.parse_model(MODEL.replace("WEIGHT", ", ".join(map(str, weight))))


@pytest.fixture(scope="module")
def model(proto: onnx.ModelProto) -> Model:
    return from_proto(proto)


def feeds(count: int, size: int = 40, batch: int = 2) -> Feeds:
    rng = np.random.default_rng(1)
    return Feeds(
        tuple(
            {
                "image": rng.standard_normal((batch, 3, size, size)).astype("f") * (1 + k % 3),
                "index": np.arange(batch),
                "scale": np.array(2.0, np.float32),
            }
            for k in range(count)
        ),
        count * batch,
    )


def whole(proto: onnx.ModelProto, data: Feeds, names: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    """All elements of the named values over all feeds."""
    shown = onnx.ModelProto.FromString(proto.SerializeToString())
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(
        shown.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    runs = [session.run(names, feed) for feed in data]
    return {n: np.concatenate([run[i].ravel() for run in runs]) for i, n in enumerate(names)}


def calibrated(model: Model, ctx: PassContext, pass_: Calibrate) -> dict[str, Range]:
    return dict(pass_.run(model.clone(), ctx).fact(Ranges).by_value)


def asking(ctx: PassContext, data: Feeds, *names: str) -> PassContext:
    return replace(ctx, calibration=data, statistics=tuple(Statistic("range", n) for n in names))


NAMES = ["image", "conv", "relu", "flat", "wide", "half", "out"]


def test_extremes_are_those_of_the_whole_activations(
    model: Model, proto: onnx.ModelProto, pass_context: PassContext
) -> None:
    data = feeds(5)
    truth = whole(proto, data, ["image", "conv", "relu", "flat", "wide", "out"])
    ctx = asking(pass_context, data, *NAMES)
    ranges = calibrated(model, ctx, Calibrate(method="minmax"))
    assert list(ranges) == NAMES
    for name, values in truth.items():
        # The convolution may sum in another order with another set of outputs.
        assert ranges[name].observed_low == pytest.approx(values.min(), rel=1e-5, abs=1e-5)
        assert ranges[name].observed_high == pytest.approx(values.max(), rel=1e-5, abs=1e-5)
    assert ranges["relu"].low == 0
    assert not [r for r in ctx.recorder.remarks if r.kind == "missed"]


@pytest.mark.parametrize("method", ["mse", "percentile"])
def test_intervals_of_the_sample_are_near_those_of_all_elements(
    method: Any, model: Model, proto: onnx.ModelProto, pass_context: PassContext
) -> None:
    data = feeds(8, size=96)
    truth = whole(proto, data, ["conv", "relu"])
    ctx = asking(pass_context, data, "conv", "relu")
    ranges = calibrated(model, ctx, Calibrate(method=method, percentile=99.0))
    for name, values in truth.items():
        low, high = choose_interval(Histogram.of(values), method, 99.0)
        # Two steps of the search grid; the sample holds an eighth of the elements.
        assert ranges[name].low == pytest.approx(low, rel=0.09, abs=1e-6)
        assert ranges[name].high == pytest.approx(high, rel=0.09)


def test_a_step_found_at_run_time_equals_the_one_known_before(
    model: Model, pass_context: PassContext
) -> None:
    (feed,) = feeds(1)
    names = ["image", "flat"]
    known, unknown = (build_probe(model, names, 100, f) for f in (feed, {}))
    assert any(n.op_type == "RangeStep" for n in unknown.model.graph)
    assert all(n.op_type != "RangeStep" for n in known.model.graph)
    shown = [pass_context.evaluator.run(probe.model, feed) for probe in (known, unknown)]
    for name in known.outputs:
        assert np.array_equal(shown[0][name], shown[1][name])
    for index, elements in enumerate((9600, 8)):
        sample = known.read(shown[0], index).sample
        assert min(elements, 40) / 2 <= sample.size <= 200


def test_the_graph_does_not_change(model: Model, pass_context: PassContext) -> None:
    before = model.fingerprint
    after = Calibrate().run(model.clone(), asking(pass_context, feeds(2), "relu"))
    assert after.fingerprint == before


def test_without_data_there_is_a_note_and_no_fact(model: Model, pass_context: PassContext) -> None:
    assert Calibrate().run(model, pass_context).find(Ranges) is None
    assert "no calibration data" in pass_context.recorder.remarks[0].text


def test_values_without_a_range_are_skipped_with_the_reason(
    model: Model, pass_context: PassContext
) -> None:
    ctx = asking(pass_context, feeds(2), "index", "ones", "scale", "none", "absent", "relu")
    assert list(calibrated(model, ctx, Calibrate())) == ["relu"]
    reasons = {r.where: r.text for r in ctx.recorder.remarks}
    assert reasons.keys() == {"index", "ones", "scale", "none", "absent"}
    assert "INT64" in reasons["index"]
    assert "BOOL" in reasons["ones"]
    assert "scalar" in reasons["scale"]
    assert "empty" in reasons["none"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_values_that_are_not_finite_are_named(
    bad: float, model: Model, pass_context: PassContext
) -> None:
    data = feeds(3)
    data.feeds[2]["scale"] = np.array(bad, np.float32)
    with pytest.raises(CalibrationError, match="'rooted' is not finite") as error:
        calibrated(model, asking(pass_context, data, "relu", "rooted"), Calibrate())
    assert error.value.where == "feed 3"


def test_constant_values_are_noted(model: Model, pass_context: PassContext) -> None:
    data = feeds(2)
    for feed in data:
        feed["image"][...] = 0
    ctx = asking(pass_context, data, "relu")
    assert calibrated(model, ctx, Calibrate()) == {"relu": Range(0, 0, 0, 0)}
    assert "constant" in ctx.recorder.remarks[0].text


def test_only_the_first_samples_are_used(model: Model, pass_context: PassContext) -> None:
    data = feeds(6)
    few = asking(pass_context, Feeds(data.feeds[:2], 4), "conv")
    ctx = asking(pass_context, data, "conv")
    limited = Calibrate(max_samples=3).run(model.clone(), ctx).fact(Ranges)
    assert limited.samples == 3
    assert dict(limited.by_value) == calibrated(model, few, Calibrate())


class Forbidden:
    def stream(self, *arguments: object) -> None:
        raise AssertionError("a sweep ran")


def test_a_second_run_reads_the_cache(
    model: Model, pass_context: PassContext, tmp_path: Path
) -> None:
    first = replace(asking(pass_context, feeds(3), "conv", "relu"), cache=Cache(tmp_path))
    ranges = Calibrate().run(model.clone(), first).fact(Ranges)
    blocked: Any = Forbidden()
    second = replace(first, evaluator=blocked)
    assert Calibrate().run(model.clone(), second).fact(Ranges) == ranges
    assert "no sweep" in second.recorder.remarks[-1].text
    other = replace(second, calibration=replace(feeds(3), sha256="1" * 64))
    with pytest.raises(AssertionError, match="a sweep ran"):
        Calibrate().run(model.clone(), other)
    with pytest.raises(AssertionError, match="a sweep ran"):
        Calibrate(method="entropy").run(model.clone(), second)


def test_only_values_that_nobody_swept_are_swept(
    model: Model, pass_context: PassContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[list[str]] = []

    def counted(model: Model, evaluator: Any, batches: Any, names: Any, *rest: Any) -> Any:
        swept.append(list(names))
        return sweep_ranges(model, evaluator, batches, names, *rest)

    monkeypatch.setattr("octavo.passes.calibrate.sweep_ranges", counted)
    whole = Calibrate().run(model.clone(), asking(pass_context, feeds(3), "conv", "relu"))
    cached = [
        replace(asking(pass_context, feeds(3), *names), cache=Cache(tmp_path))
        for names in (["relu"], ["conv", "relu"], ["conv"])
    ]
    found = [Calibrate().run(model.clone(), ctx).fact(Ranges) for ctx in cached]
    assert swept == [["conv", "relu"], ["relu"], ["conv"]]
    assert found[1] == whole.fact(Ranges)
    assert dict(found[2].by_value) == {"conv": found[1].by_value["conv"]}


@pytest.mark.parametrize(
    ("method", "again"),
    [("minmax", []), ("percentile", []), ("mse", ["relu"]), ("entropy", ["relu"])],
)
def test_another_grid_is_swept_for_where_the_range_depends_on_it(
    model: Model,
    pass_context: PassContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Any,
    again: list[str],
) -> None:
    swept: list[str] = []

    def counted(model: Model, evaluator: Any, batches: Any, names: Any, *rest: Any) -> Any:
        swept.extend(names)
        return sweep_ranges(model, evaluator, batches, names, *rest)

    monkeypatch.setattr("octavo.passes.calibrate.sweep_ranges", counted)
    symmetric = TARGETS["tensorrt"]
    assert symmetric.activation_grid.symmetric
    cache = Cache(tmp_path)
    found = []
    for target in (pass_context.target, OPENVINO, symmetric):
        swept.clear()
        ctx = replace(asking(pass_context, feeds(3), "relu"), cache=cache, target=target)
        found.append(calibrated(model, ctx, Calibrate(method=method))["relu"])
        expected = {"tensorrt": again, "openvino": []}.get(target.name, ["relu"])
        assert swept == expected
    assert found[0] == found[1]
    alone = replace(asking(pass_context, feeds(3), "relu"), target=symmetric)
    assert found[2] == calibrated(model, alone, Calibrate(method=method))["relu"]
