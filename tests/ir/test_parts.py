"""A model that runs part by part gives what it gives as a whole, and no part holds much of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from octavo.backends import ort_session
from octavo.backends.ort_session import OrtEvaluator
from octavo.ir.model import weight_bytes
from octavo.ir.parts import parts
from octavo.ir.read import read

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.model import Model

MODELS = Path(__file__).resolve().parents[2] / "models"
# Both sides run unoptimized: the same kernels on the same numbers.
EVALUATOR = OrtEvaluator(threads=1, optimization="none")
WIDTH = 16
MATRIX_BYTES = 4 * WIDTH * WIDTH

BRANCHES = """
agraph (float[2, 16] x, float[16] unused) => (float[2, 16] y, float[2, 16] early, float[16, 16] sum)
  <float[16, 16] a, float[16, 16] b, float[16, 16] c> {
  early = MatMul(x, a)
  sum = Add(a, b)
  dead = Relu(early)
  right = MatMul(early, sum)
  left = MatMul(early, c)
  both = Add(left, right)
  y = MatMul(both, a)
}
"""


def built(text: str) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    for info in proto.graph.value_info:
        array = np.random.default_rng([*info.name.encode()]).standard_normal((WIDTH, WIDTH))
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), info.name))
    del proto.graph.value_info[:]
    return read(proto)


def assert_same(
    model: Model, feeds: list[dict[str, NDArray[np.float32]]], limit_bytes: int
) -> None:
    alive: list[dict[str, NDArray[np.generic]]] = [dict(feed) for feed in feeds]
    for part in parts(model, limit_bytes):
        for held in alive:
            names = [value.name or "" for value in part.model.graph.inputs]
            held |= EVALUATOR.run(part.model, {name: held[name] for name in names})
            for name in part.drops:
                del held[name]
    for held, feed in zip(alive, feeds, strict=True):
        for name, expected in EVALUATOR.run(model, feed).items():
            np.testing.assert_array_equal(held[name], expected)


@pytest.mark.parametrize("limit_bytes", [0, 2 * MATRIX_BYTES, 1 << 40])
def test_branches_constants_and_early_outputs_survive_the_cuts(limit_bytes: int) -> None:
    model = built(BRANCHES)
    feeds = [
        {"x": np.full((2, WIDTH), k, np.float32), "unused": np.zeros(WIDTH, np.float32)}
        for k in (1, 2)
    ]
    assert_same(model, feeds, limit_bytes)


def test_a_part_holds_no_more_than_it_may_and_all_parts_more_than_one() -> None:
    found = list(parts(built(BRANCHES), 2 * MATRIX_BYTES))
    assert len(found) > 1
    assert all(weight_bytes(part.model) <= 2 * MATRIX_BYTES for part in found)


def test_what_nobody_reads_any_more_is_dropped_once() -> None:
    dropped = [name for part in parts(built(BRANCHES), 0) for name in part.drops]
    assert sorted(dropped) == ["both", "left", "right", "x"]


@pytest.mark.parametrize("name", ["fashion_resnet", "fashion_vit", "fashion_lstm"])
def test_shipped_models_run_from_part_to_part(name: str) -> None:
    model = read(MODELS / f"{name}.onnx")
    (value,) = model.graph.inputs
    with np.load(MODELS / "fashion_test.npz") as data:
        assert_same(model, [{value.name or "": data["input"][:4]}], weight_bytes(model) // 5)


def test_the_evaluator_runs_large_models_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = read(MODELS / "fashion_resnet.onnx")
    with np.load(MODELS / "fashion_test.npz") as data:
        feeds = [{"input": data["input"][:2]}, {"input": data["input"][2:4]}]
    expected = [EVALUATOR.run(model, feed) for feed in feeds]
    loaded: list[int] = []
    session = ort_session.model_session

    def counted(part: Model, threads: int, optimization: ort_session.Optimization) -> object:
        loaded.append(weight_bytes(part))
        return session(part, threads, optimization)

    monkeypatch.setattr(ort_session, "model_session", counted)
    monkeypatch.setattr(ort_session, "_IN_MEMORY_BYTES", 1)
    monkeypatch.setattr(ort_session, "_PART_BYTES", weight_bytes(model) // 3)
    found = EVALUATOR.outputs(model, feeds)
    assert len(loaded) >= 3
    assert max(loaded) < weight_bytes(model)
    for own, truth in zip(found, expected, strict=True):
        assert own.keys() == truth.keys()
        for name, array in truth.items():
            np.testing.assert_array_equal(own[name], array)
