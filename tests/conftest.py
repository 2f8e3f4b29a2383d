"""Fixtures and options that all tests share."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.backends.ort_session import OrtEvaluator
from octavo.backends.ort_target import ORT_CPU
from octavo.ir.cost import AnalyticCost
from octavo.ir.read import read
from octavo.passes.base import PassContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.ir.target import Target


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "rewrite the expected half of golden files"
    parser.addoption("--update-golden", action="store_true", help=text)


_TINY = """
<ir_version: 10, opset_import: ["" : 21]>
tiny (float[N,3,8,8] x) => (float[N,10] y)
<float[8,3,3,3] kernel = {0}, float[8] bias = {0}, float[8,10] weight = {0}> {
    [conv] features = Conv <pads: ints = [1, 1, 1, 1]> (x, kernel, bias)
    [relu] active = Relu (features)
    [pool] pooled = GlobalAveragePool (active)
    [flat] row = Flatten (pooled)
    [dense] y = MatMul (row, weight)
}
"""


@pytest.fixture
def tiny_model() -> Model:
    """Conv, Relu, pooling and MatMul with seeded weights: `[N, 3, 8, 8]` to `[N, 10]`."""
    proto = onnx.parser.parse_model(_TINY)
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        array = rng.standard_normal(tuple(tensor.dims)).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return read(proto)


@dataclass(frozen=True)
class ListedBatches:
    """Calibration data held in a list."""

    feeds: tuple[Feed, ...]
    labels: NDArray[np.generic] | None = None

    @property
    def samples(self) -> int:
        return len(self.feeds)

    @property
    def sha256(self) -> str:
        parts = [
            f"{k}{v.dtype}{v.shape}".encode() + v.tobytes()
            for f in self.feeds
            for k, v in f.items()
        ]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.feeds)


def random_feed(model: Model, seed: int, free_dimension: int = 2) -> Feed:
    """Seeded inputs of a model: normal floats, small integers, one size for all free dimensions."""
    rng = np.random.default_rng(seed)
    feed = {}
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        assert value.shape is not None
        assert value.dtype is not None
        shape = [d if isinstance(d, int) else free_dimension for d in value.shape]
        drawn = np.asarray(rng.standard_normal(shape))
        dtype = value.dtype.numpy()
        positive = np.asarray(abs(drawn) * 4)
        feed[value.name or ""] = (drawn if dtype.kind == "f" else positive).astype(dtype)
    return feed


@pytest.fixture(scope="session")
def feed_of() -> Callable[..., Feed]:
    """`feed_of(model, seed)`: seeded inputs of a model."""
    return random_feed


def assert_agrees(actual: Feed, expected: Feed, relative: float) -> None:
    """Same names, types and shapes; floats within `relative` of the largest magnitude."""
    assert list(actual) == list(expected)
    for name, truth in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (truth.dtype, truth.shape)
        if truth.dtype.kind == "f":
            wide, close = truth.astype(np.float64), actual[name].astype(np.float64)
            bound = relative * float(np.abs(wide).max(initial=0.0))
            np.testing.assert_allclose(close, wide, rtol=0, atol=bound, err_msg=name)
        else:
            np.testing.assert_array_equal(actual[name], truth, err_msg=name)


@pytest.fixture(scope="session")
def agrees() -> Callable[[Feed, Feed, float], None]:
    """`agrees(actual, expected, relative)` asserts that two sets of outputs are the same."""
    return assert_agrees


@pytest.fixture
def pass_context(tmp_path: Path) -> Iterator[PassContext]:
    """Services for one pass: ORT CPU, analytic costs, an unoptimized runtime, no calibration."""
    with ThreadPoolExecutor(1) as executor:
        yield PassContext(
            target=ORT_CPU,
            cost=AnalyticCost(ORT_CPU),
            evaluator=OrtEvaluator(threads=1, optimization="none"),
            executor=executor,
            workdir=tmp_path,
        )


@pytest.fixture
def calibrated(pass_context: PassContext) -> Callable[..., PassContext]:
    """`calibrated(model)`: the same services, with four seeded feeds as calibration data.

    For another `target`, seconds are its analytic ones.
    """

    def with_calibration(
        model: Model, free_dimension: int = 2, target: Target = ORT_CPU
    ) -> PassContext:
        feeds = tuple(random_feed(model, seed, free_dimension) for seed in range(4))
        cost = AnalyticCost(target)
        return replace(pass_context, target=target, cost=cost, calibration=ListedBatches(feeds))

    return with_calibration
