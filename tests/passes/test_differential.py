"""Every pass on every small model: what it computes before and after, in onnxruntime.

The runtime's own graph optimization is off, so that a difference is the pass's doing.
"""

from __future__ import annotations

import math
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from octavo.ir.read import read
from octavo.passes.pipeline import Pipeline
from octavo.passes.presets import PRESETS
from octavo.passes.registry import PASSES

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

# How far float32 outputs may move, relative to their largest magnitude: passes that decide change
# no bit, folding rounds each weight once more.
FLOAT32_RELATIVE = {
    "canonicalize": 1e-5,
    "fold-scales": 1e-4,
    # One number in float16 has 11 bits.
    "halve-constants": 2e-3,
    "collect-moments": 0.0,
    "calibrate": 0.0,
    "bound-ranges": 0.0,
    "choose-kernels": 0.0,
    "offer-options": 0.0,
    "sensitivity": 0.0,
    "offer-structure": 0.0,
    "allocate": 0.0,
    "refine": 0.0,
    "place-quantizers": 0.0,
}
# Passes that quantize to 8 bits: root mean square of the error, relative to that of the output.
QUANTIZED_RMS = {"insert-fake-quant": 0.1}
# Passes that choose codes, scales and biases of 8-bit weights: as much, from what they were given.
# Four random feeds are too few to learn from, so that little is asked of those that do.
REPAIRS: dict[str, dict[str, object]] = {
    "clip-weights": {},
    "round-gptq": {},
    "round-squant": {},
    "round-nupes": {},
    "round-uniquanf": {"steps": 0},
    "round-learned": {"steps": 2},
    "match-moments": {},
    "correct-bias": {},
    "recover": {"steps": 2},
    "repair-low-rank": {"rank": 1},
}
REPAIRED_RMS = 0.1
# Passes that change structure: options that keep everything a model computes, and how far float32
# outputs may then move.
STRUCTURE = {
    "factor-low-rank": ("{energy=0.99999999,multiple=1}", 1e-3),
    "prune-weights": ("{sparsity=1e-9,allocation=uniform}", 1e-4),
    "rotate-residual": ("", 1e-4),
    "rotate-values": ("", 1e-4),
}
# Passes that leave out a part of the model whatever their options: tests of their own hold them.
LOSSY = ("apply-structure", "drop-blocks", "prune-channels", "prune-heads")
TEXTS = Path(__file__).with_name("differential_models.txt").read_text(encoding="utf-8")
BUILT = {text.split(maxsplit=1)[0]: text for text in TEXTS.split("// -----\n")}
SHIPPED = ("fashion_resnet", "fashion_mobile", "fashion_vit", "fashion_lstm")
FREE_DIMENSION = 3
CONSTANTS = {
    "zero": np.float32(0),
    "one": np.float32(1),
    "half": np.float32(0.5),
    "six": np.float32(6),
    "root": np.float32(math.sqrt(2)),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "twice": np.array([1, 1, 2, 2], np.float32),
    "heads": np.array([0, 0, 2, 4]),
    "flat": np.array([0, 0, -1]),
    "first": np.array([1]),
}


@cache
def model_of(name: str) -> Model:
    if name in SHIPPED:
        return read(Path(str(files("octavo.models"))) / f"{name}.onnx")
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]>{_declared(BUILT[name])}'
    )
    rng = np.random.default_rng(len(name))
    for value in [
        v for v in proto.graph.input if v.name in CONSTANTS or v.name[:2] in ("w_", "v_")
    ]:
        proto.graph.input.remove(value)
        array = CONSTANTS.get(value.name)
        if array is None:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
            drawn = rng.standard_normal(shape) / math.sqrt(fan_in)
            array = (abs(drawn) + 0.5 if value.name[0] == "v" else drawn).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), value.name))
    return read(proto)


def _declared(text: str) -> str:
    """The text with its weights as inputs: `w_4x3` is normal, `v_4` positive, both seeded."""
    names = sorted(set(re.findall(r"\b[wv]_\d[\dx]*(?:_[a-z])?\b", text)))
    shapes = {name: ",".join(name.split("_")[1].split("x")) for name in names}
    weights = "".join(f", float[{shape}] {name}" for name, shape in shapes.items())
    head, arrow, rest = text.partition("=>")
    return head.rstrip()[:-1] + weights + ") " + arrow + rest


def through(name: str, model: Model, ctx: PassContext) -> tuple[Model, Model]:
    """The model before and after a pass, at its place in the first preset that has it."""
    if name in STRUCTURE:
        text = f"canonicalize,{name}{STRUCTURE[name][0]}"
    elif name in REPAIRS:
        text = f"{PRESETS['int8']},{name}"
    else:
        named = {t: [p.name for p in Pipeline.parse(t).passes] for t in PRESETS.values()}
        text = next(t for t, names in named.items() if name in names)
    # Four feeds are too few to clip by: the error shall be that of rounding alone.
    pipeline = Pipeline.parse(text).with_options("calibrate", method="minmax")
    # What is measured decides nothing here; little of it is enough.
    cheap = {} if name == "sensitivity" else {"estimator": "weight-error"}
    cheap["rounding"] = "nearest"
    pipeline = pipeline.with_options(name, **REPAIRS.get(name, {}))
    pipeline = pipeline.with_options("sensitivity", samples=1, **cheap)
    pipeline = pipeline.with_options("refine", generations=1, seconds=5.0, samples=2)
    before, rest = pipeline.split(name)
    assert rest.passes
    reached = before.run(model, ctx).model
    return reached, Pipeline(rest.passes[:1]).run(reached, ctx).model


@pytest.mark.parametrize("model_name", [*BUILT, *SHIPPED])
@pytest.mark.parametrize("pass_name", [name for name in PASSES if name not in LOSSY])
def test_pass_keeps_what_a_model_computes(
    pass_name: str,
    model_name: str,
    calibrated: Callable[..., PassContext],
    feed_of: Callable[..., Feed],
    agrees: Callable[[Feed, Feed, float], None],
) -> None:
    model = model_of(model_name)
    ctx = calibrated(model, FREE_DIMENSION)
    before, after = through(pass_name, model, ctx)
    for seed in (100, 101):
        feed = feed_of(model, seed, FREE_DIMENSION)
        expected, actual = ctx.evaluator.run(before, feed), ctx.evaluator.run(after, feed)
        if pass_name in QUANTIZED_RMS or pass_name in REPAIRS:
            most = QUANTIZED_RMS.get(pass_name, REPAIRED_RMS)
            for name, truth in expected.items():
                error = np.subtract(actual[name], truth, dtype=np.float64)
                assert _rms(error) <= most * _rms(truth.astype(np.float64))
        else:
            relative = {**FLOAT32_RELATIVE, **{k: v for k, (_, v) in STRUCTURE.items()}}
            agrees(actual, expected, relative[pass_name])


def _rms(array: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(array))))


@pytest.mark.parametrize("model_name", [*BUILT, *SHIPPED])
def test_canonicalize_twice_is_canonicalize_once(
    model_name: str, pass_context: PassContext
) -> None:
    once = Pipeline.parse("canonicalize").run(model_of(model_name), pass_context).model
    twice = Pipeline.parse("canonicalize").run(once, pass_context).model
    assert twice.fingerprint == once.fingerprint


@pytest.mark.parametrize("model_name", [*BUILT, *SHIPPED])
def test_pipeline_is_deterministic(model_name: str, calibrated: Callable[..., PassContext]) -> None:
    model, pipeline = model_of(model_name), Pipeline.parse(PRESETS["int8"])
    first = pipeline.run(model, calibrated(model, FREE_DIMENSION)).model
    second = pipeline.run(model, calibrated(model, FREE_DIMENSION)).model
    assert first.fingerprint == second.fingerprint
