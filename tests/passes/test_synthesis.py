"""Synthesis from whole models: what it reads from the graph, and what it makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest

from octavo.ir.cache import Cache
from octavo.ir.errors import CalibrationError, UnknownName, UsageError
from octavo.ir.read import read
from octavo.ir.synthetic import Synthetic
from octavo.passes import optimised_inputs
from octavo.passes.evidence import Evidence
from octavo.passes.histogram import Histogram
from octavo.passes.input_laws import InputLaw
from octavo.passes.pipeline import Pipeline
from octavo.passes.synthesis import Synthesis
from octavo.passes.trust import Truster, combined, covered, distance_of_moments, overlap

if TYPE_CHECKING:
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

MODELS = Path(__file__).resolve().parents[2] / "models"
FAST = 1e19
QUICK = Synthesis(samples=16, batch=8, steps=12)

ATTENTION = """
<ir_version: 10, opset_import: ["" : 21]>
attention (float[N, 6, 8] x) => (float[N, 6, 8] y)
<float[8, 8] wq = {0}, float[8, 8] wk = {0}, float[8, 8] wv = {0}> {
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    v = MatMul (x, wv)
    t = Transpose <perm = [0, 2, 1]> (k)
    s = MatMul (q, t)
    p = Softmax (s)
    y = MatMul (p, v)
}
"""
PLAIN = """
<ir_version: 10, opset_import: ["" : 21]>
plain (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }
"""


def _canonical(source: Any, ctx: PassContext) -> Model:
    return Pipeline.parse("canonicalize").run(read(source), ctx).model


def _random(text: str) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        drawn = rng.standard_normal(tuple(tensor.dims)).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(drawn, tensor.name))
    return proto


@pytest.fixture
def mobile(pass_context: PassContext) -> Model:
    return _canonical(MODELS / "fashion_mobile.onnx", pass_context)


def _batchnorm_distances(images: Any) -> list[float]:
    """Per BatchNormalization of the file, by what its input shows and what it has stored."""
    proto = onnx.load(MODELS / "fashion_mobile.onnx")
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    norms = [n for n in proto.graph.node if n.op_type == "BatchNormalization"]
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n.input[0]) for n in norms)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    values = session.run([n.input[0] for n in norms], {"input": images})
    found = []
    for node, value in zip(norms, values, strict=True):
        mean, var = arrays[node.input[3]], arrays[node.input[4]]
        error = np.abs(value.mean((0, 2, 3)) - mean) / np.sqrt(var)
        found.append(float(error.mean()))
    return found


def _images(data: Synthetic) -> Any:
    return np.concatenate([feed["input"] for feed in data.feeds])


def test_folded_statistics_are_those_of_the_file(mobile: Model, pass_context: PassContext) -> None:
    """Every norm counts, and images are nearer to all of them together than noise is."""
    assert len(Evidence.of(mobile).moments) == 13
    data = QUICK.run(mobile, pass_context)
    assert (data.origin, data.samples, data.groups) == ("synthetic-bn", 16, (0, 1))
    made = _batchnorm_distances(_images(data))
    noise = np.random.default_rng(0).standard_normal((16, 1, 28, 28)).astype(np.float32)
    assert np.mean(made) < 0.7 * np.mean(_batchnorm_distances(noise))


def test_groups_are_independent_and_repeatable(mobile: Model, pass_context: PassContext) -> None:
    first, second = (QUICK.run(mobile, pass_context) for _ in range(2))
    assert first.sha256 == second.sha256
    assert not np.array_equal(first.feeds[0]["input"], first.feeds[1]["input"])
    other = QUICK.run(mobile, replace(pass_context, seed=1))
    assert other.sha256 != first.sha256


def test_what_is_finished_is_not_made_again(
    mobile: Model, pass_context: PassContext, tmp_path: Path
) -> None:
    ctx = replace(pass_context, cache=Cache(tmp_path / "cache"))

    def interrupt(label: str, done: int, total: int) -> None:
        if done == 36:
            raise KeyboardInterrupt

    how = replace(QUICK, samples=32)
    with pytest.raises(KeyboardInterrupt):
        how.run(mobile, replace(ctx, progress=interrupt))
    steps: list[int] = []
    whole = how.run(mobile, replace(ctx, progress=lambda label, done, total: steps.append(done)))
    # At least one of four groups of twelve steps was finished.
    assert 12 <= len(steps) <= 36
    assert whole.sha256 == how.run(mobile, pass_context).sha256


def test_the_clock_is_kept_and_mentioned(mobile: Model, pass_context: PassContext) -> None:
    found = replace(QUICK, seconds=0.0).run(mobile, pass_context)
    assert found.samples == 8
    assert found.notes == ("the clock ended the synthesis after 1 steps in 1 groups",)


def test_inputs_obey_the_given_law(mobile: Model, pass_context: PassContext) -> None:
    law = InputLaw.parse("uniform(-0.8,2)")
    images = _images(replace(QUICK, laws={"input": law}).run(mobile, pass_context))
    assert images.min() >= np.float32(-0.8)
    assert images.max() <= 2.0


def test_images_begin_as_leaves_and_anything_else_as_its_law(
    mobile: Model, pass_context: PassContext
) -> None:
    """Of an image, few neighbours differ much; of what is no image, as many as in noise."""
    how = replace(QUICK, steps=1, rate=1e-9)

    def steps(how: Synthesis) -> Any:
        return np.abs(np.diff(_images(how.run(mobile, pass_context)), axis=3))

    assert np.median(steps(how)) < 0.2
    assert np.median(steps(replace(how, start="noise"))) > 0.8
    model = _canonical(_random(ATTENTION), pass_context)
    tokens = np.concatenate([feed["x"] for feed in how.run(model, pass_context)])
    assert np.median(np.abs(np.diff(tokens, axis=2))) > 0.8


def test_attention_is_found_by_structure(pass_context: PassContext) -> None:
    model = _canonical(_random(ATTENTION), pass_context)
    assert Evidence.of(model).attended == ("y",)
    data = replace(QUICK, variation=0.0).run(model, pass_context)
    assert data.origin == "synthetic-attention"


def test_patches_count_where_statistics_do_not(mobile: Model) -> None:
    assert Synthesis().suited(mobile).entropy == 0
    assert Synthesis(statistics=0.0).suited(mobile).entropy == Synthesis().entropy > 0


def test_a_model_that_tells_nothing_says_what_to_pass(pass_context: PassContext) -> None:
    model = _canonical(onnx.parser.parse_model(PLAIN), pass_context)
    with pytest.raises(UsageError, match="nothing in this model tells") as refused:
        QUICK.run(model, pass_context)
    assert "no BatchNormalization statistics" in refused.value.why
    assert "--input 'x=normal(0,1)'" in refused.value.hint
    law = InputLaw.parse("uniform(3,4)")
    drawn = replace(QUICK, laws={"x": law}).run(model, pass_context)
    assert drawn.origin == "sampled"
    assert all(feed["x"].min() >= 3 and feed["x"].max() <= 4 for feed in drawn)
    with pytest.raises(UnknownName, match="unknown input 'z'"):
        replace(QUICK, laws={"z": law}).run(model, pass_context)


@pytest.mark.parametrize(
    ("inputs", "message", "hint"),
    [
        ("int64[N, 4] x", "'x' is of INT64, and nothing tells its range", "ids(0,"),
        ("float[N, 3, H, W] x", "'x' has a dimension without a size", "--shape x=8x3x?x?"),
        ("float[N, 0] x", "'x' has a dimension without a size", "--shape x="),
    ],
)
def test_inputs_that_nothing_fills_are_refused(
    inputs: str, message: str, hint: str, pass_context: PassContext
) -> None:
    text = f"""
        <ir_version: 10, opset_import: ["" : 21]>
        net ({inputs}) => (float y) {{ c = Cast <to = 1> (x)
          y = ReduceSum <keepdims = 0> (c) }}"""
    model = _canonical(onnx.parser.parse_model(text), pass_context)
    with pytest.raises(UsageError, match=message) as refused:
        QUICK.run(model, pass_context)
    assert hint in refused.value.hint


def test_ids_that_a_table_lacks_are_refused(pass_context: PassContext) -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 21]>
        net (int64[N, 4] i, float[N, 8] x) => (float[N, 4, 8] y) <float[50, 8] table = {0}> {
          rows = Gather (table, i)
          one = Constant <value_ints = [1]> ()
          wide = Unsqueeze (x, one)
          y = Add (rows, wide) }"""
    model = _canonical(_random(text), pass_context)
    laws = {"i": InputLaw.parse("ids(0,50)"), "x": InputLaw.parse("normal(0,1)")}
    with pytest.raises(UsageError, match=r"50 rows, and ids\(0,50\) goes beyond") as refused:
        replace(QUICK, laws=laws).run(model, pass_context)
    assert "--input 'i=ids(0,49)'" in refused.value.hint
    laws["i"] = InputLaw.parse("ids(0,49)")
    drawn = replace(QUICK, laws=laws).run(model, pass_context)
    assert max(int(feed["i"].max()) for feed in drawn) < 50


def test_optimisation_that_diverges_is_an_error_with_a_way_out(
    mobile: Model, pass_context: PassContext
) -> None:
    with pytest.raises(CalibrationError, match="not finite") as refused:
        replace(QUICK, statistics=float("nan")).run(mobile, pass_context)
    assert "--input 'input=uniform(0.01,2)'" in refused.value.hint


def test_preparing_the_first_step_is_not_taken_for_the_pace(
    pass_context: PassContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(optimised_inputs, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def run(first: float, pace: float) -> float:
        now[0] = 0.0
        clock = optimised_inputs._Clock(begun=0.0, seconds=60.0, rounds=1)
        report = optimised_inputs._Watch(pass_context, clock, 50, must_fit=True).of(0)
        for step in range(1, 51):
            now[0] += first if step == 1 else pace
            report(step, 50)
        return now[0]

    assert run(first=20.0, pace=0.5) == pytest.approx(44.5)
    with pytest.raises(CalibrationError, match="more than 60 s"):
        run(first=0.1, pace=2.0)
    assert now[0] < 20


def test_an_optimisation_that_began_again_says_so(mobile: Model, pass_context: PassContext) -> None:
    """Steps of 1e19 overflow float32, smaller ones after that do not."""
    found = replace(QUICK, samples=8, steps=3, rate=FAST).run(mobile, pass_context)
    (note,) = found.notes
    assert "not finite and began again" in note
    assert all(np.isfinite(feed["input"]).all() for feed in found)


def test_overlap_is_the_share_of_the_union() -> None:
    from octavo.ir.facts import Range

    def of(**ends: tuple[float, float]) -> dict[str, Range]:
        return {name: Range(*pair, *pair) for name, pair in ends.items()}

    assert overlap(of(a=(0, 4)), of(a=(2, 6))) == pytest.approx(2 / 6)
    assert overlap(of(a=(0, 1), b=(0, 2)), of(a=(5, 6), b=(0, 2))) == pytest.approx(0.5)
    assert overlap(of(a=(0, 0)), of(a=(0, 0), c=(1, 2))) == 1.0
    assert covered(of(a=(2, 6)), of(a=(0, 4))) == pytest.approx(0.5)
    assert covered(of(a=(-9, 9)), of(a=(0, 4))) == 1.0
    assert combined({"a": 0.25, "b": 1.0, "certainty": 0.1}) == pytest.approx(0.5)


def test_moments_are_apart_by_their_means_and_by_the_ratio_of_their_deviations() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(200_000).astype(np.float32)
    first, second, third = (Histogram.of(x) for x in (values, 3 * values, values + 2))
    assert distance_of_moments({"a": first}, {"a": first}) == 0
    apart = distance_of_moments({"a": first, "b": first}, {"a": second, "b": third, "c": first})
    # Half of ln(3)² and of 2² / (1 + 1), up to the draw and the width of bins.
    assert apart == pytest.approx((np.log(3) ** 2 + 2) / 2, rel=0.01)


def test_trust_falls_where_data_is_not_what_the_model_knows(
    mobile: Model, pass_context: PassContext
) -> None:
    made = replace(QUICK, steps=40).run(mobile, pass_context)
    loud = {"input": InputLaw.parse("normal(0,5)")}
    noise = replace(QUICK, statistics=0.0, laws=loud).run(mobile, pass_context)
    truster = Truster(mobile, pass_context, {})
    good, bad = truster.of(made), truster.of(noise)
    assert set(good.parts) == {"seeds", "statistics", "bounds", "classes", "certainty"}
    assert good.value > 1.3 * bad.value
    assert good.parts["statistics"] > 2 * bad.parts["statistics"]


def test_real_samples_are_compared_with_from_four_on(
    mobile: Model, pass_context: PassContext
) -> None:
    with np.load(MODELS / "fashion.npz") as stored:
        real = stored["input"]
    made = Synthetic(({"input": real[:8]},), "synthetic-bn", (0,))
    truster = Truster(mobile, pass_context, {})
    same = truster.of(made, Synthetic(({"input": real[:8]},), "sampled", (0,)))
    assert (same.parts["real"], same.parts["moments"]) == (1.0, 1.0)
    moved = Synthetic(({"input": real[:8] * 0.1 + 2},), "synthetic-bn", (0,))
    other = truster.of(moved, Synthetic(({"input": real[:8]},), "sampled", (0,)))
    assert other.parts["moments"] < 0.7
    assert other.value < same.value
    with pytest.raises(CalibrationError, match="3 real samples are too few"):
        truster.of(made, Synthetic(({"input": real[:3]},), "sampled", (0,)))
