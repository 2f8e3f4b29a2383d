"""Learned rounding against brute force, where it starts, and where its gradients pass."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest

from octavo.ir.quant import (
    PerAxis,
    PerBlock,
    PerTensor,
    QuantParams,
    QuantSpec,
    dequantize,
    params_for_weight,
    quantize,
)
from octavo.ir.read import read

torch = pytest.importorskip("torch")

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.quant import Granularity, QuantType
    from octavo.ir.torch_reconstruction import Prefix, Reconstructed
    from octavo.ir.torch_rounding import RoundingMethod
    from octavo.ir.torch_student import Student

    Float32 = NDArray[np.float32]

_LINEAR = """<ir_version: 10, opset_import: ["" : 21]>
linear (float[N,{k}] x, float[{k},{n}] w) => (float[N,{n}] y) {{ y = MatMul (x, w) }}"""
METHODS: tuple[RoundingMethod, ...] = ("fixed", "adaround", "flexround", "straight-through")
FLOAT32_RELATIVE = 1e-6


def spec(bits: int, granularity: Granularity) -> QuantSpec:
    dtype: QuantType = f"s{bits}"  # type: ignore[assignment]
    return QuantSpec(dtype, granularity, symmetric=True)


def rounded(weight: Float32, params: QuantParams) -> Float32:
    return dequantize(quantize(weight, params), params)


def correlated(seed: int, k: int, samples: int = 64) -> Float32:
    """Inputs whose columns go together, so that errors of codes can cancel."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((samples, 1))
    return (rng.standard_normal((samples, k)) + 2 * common).astype(np.float32)


def student_of(method: RoundingMethod, weight: Float32, params: QuantParams) -> Student:
    from octavo.ir.torch_module import differentiable
    from octavo.ir.torch_rounding import weight_rounding
    from octavo.ir.torch_student import Student

    k, n = weight.shape
    graph = differentiable(read(onnx.parser.parse_model(_LINEAR.format(k=k, n=n))))
    start = weight_rounding(method, weight, rounded(weight, params), params)
    return Student(graph, {"w": start}, (), {})


def learned(
    student: Student, x: Float32, y: Float32, *, codes_rate: float, seconds: float = 60.0
) -> Reconstructed:
    from octavo.ir.torch_fit import Samples
    from octavo.ir.torch_reconstruction import Schedule, reconstruct, target_name

    (weight,) = student.weights.values()
    method: RoundingMethod = "adaround" if hasattr(weight, "v") else "flexround"
    prefix: Prefix = "quantized"
    plan = Schedule(method, prefix, 300, 32, codes_rate, 0.0, 0.0, penalty=1.0)
    samples = Samples([{"x": x, target_name("y"): y}], rows=True)
    return reconstruct(student, samples, samples, plan, seconds, seed=0)


def column_errors(x: Float32, weight: Float32, left: Float32) -> NDArray[np.float64]:
    """‖X(w - ŵ)‖² of every column, in float64."""
    wide = x.astype(np.float64)
    found: NDArray[np.float64] = np.square(wide @ weight - wide @ left).sum(0)
    return found


def best_errors(x: Float32, weight: Float32, params: QuantParams) -> NDArray[np.float64]:
    """The least error of every column over all of its codes."""
    codes = range(params.spec.qmin, params.spec.qmax + 1)
    every = np.array(list(itertools.product(codes, repeat=len(weight))), np.float32).T
    least = [
        column_errors(x, column[:, None], every * scale).min()
        for column, scale in zip(weight.T, params.scale, strict=True)
    ]
    return np.array(least)


@pytest.mark.parametrize(
    ("method", "codes_rate", "bits", "k"), [("adaround", 0.02, 2, 6), ("flexround", 0.005, 3, 4)]
)
def test_finds_the_best_codes_where_the_nearest_are_not(
    method: RoundingMethod, codes_rate: float, bits: int, k: int
) -> None:
    """Never below what brute force finds; kept where it is better, it closes nearly all the gap."""
    gap, left = 0.0, 0.0
    for seed in (3, 4, 5):
        x = correlated(seed, k)
        weight = np.random.default_rng(seed + 100).standard_normal((k, 1)).astype(np.float32)
        params = params_for_weight(weight, spec(bits, PerAxis(1)))
        student = student_of(method, weight, params)
        result = learned(student, x, x @ weight, codes_rate=codes_rate)
        (least,) = best_errors(x, weight, params)
        (nearest,) = column_errors(x, weight, rounded(weight, params))
        (reached,) = column_errors(x, weight, student.weights["w"].result()[0])
        assert result.after / result.before == pytest.approx(reached / nearest, rel=1e-4)
        assert reached >= least * (1 - 1e-4)
        gap += nearest / least - 1
        left += min(reached, nearest) / least - 1
    assert gap > 1
    assert left < 0.05 * gap


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1), PerBlock(0, 4), PerBlock(0, 5)])
def test_starts_at_the_given_codes(method: RoundingMethod, granularity: Granularity) -> None:
    """Codes that are up to two steps from the nearest are those it starts with."""
    from octavo.ir.torch_rounding import weight_rounding

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((12, 3)).astype(np.float32)
    params = params_for_weight(weight, spec(4, granularity))
    moved = quantize(weight, params) + rng.integers(-2, 3, weight.shape)
    codes = np.clip(moved, params.spec.qmin, params.spec.qmax).astype(np.int8)
    given = dequantize(codes, params)
    start = weight_rounding(method, weight, given, params)
    found, kept = start.result()
    np.testing.assert_array_equal(start.hard_codes().numpy(), codes)
    np.testing.assert_allclose(found, given, rtol=FLOAT32_RELATIVE)
    np.testing.assert_array_equal(quantize(found, kept), codes)


def test_asymmetric_codes_keep_their_zero_point() -> None:
    from octavo.ir.torch_rounding import weight_rounding

    params = QuantParams(
        QuantSpec("u4", PerAxis(0)), np.array([0.5, 0.25], np.float32), np.array([3, 9], np.int32)
    )
    weight = np.array([[-1.6, 0.0, 5.9], [-2.0, 0.3, 1.4]], np.float32)
    for method in METHODS:
        found, _ = weight_rounding(method, weight, rounded(weight, params), params).result()
        np.testing.assert_array_equal(found, rounded(weight, params))


def test_gradients_pass_straight_through_and_stop_at_the_clip_range() -> None:
    """d(ŵ·g)/du = s·g inside the codes, 0 outside; d/dt = ŵ·g."""
    from octavo.ir.torch_rounding import weight_rounding

    params = QuantParams(
        spec(3, PerAxis(0)), np.array([0.5, 2.0], np.float32), np.zeros(2, np.int32)
    )
    weight = np.array([[0.6, 0.5, -0.2], [9.0, -9.0, 1.0]], np.float32)
    start = weight_rounding("straight-through", weight, rounded(weight, params), params)
    upstream = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (u,) = start.code_variables()
    with torch.no_grad():
        # Outside of [-3, 3]; a start never is.
        u[1, 0], u[1, 1] = 3.6, -4.0
    (start.soft() * upstream).sum().backward()
    expected = np.array([[0.5, 1.0, 1.5], [0.0, 0.0, 12.0]], np.float32)
    np.testing.assert_allclose(u.grad.numpy(), expected)
    products = (rounded(weight, params) * upstream.numpy()).sum(1)
    np.testing.assert_allclose(start.stretch.grad.numpy(), products, rtol=FLOAT32_RELATIVE)


def test_flexround_moves_large_weights_by_more_than_one_code() -> None:
    """A target twice the weight is reached, which rounding up or down cannot do."""
    weight = np.array([[0.3], [0.1], [-0.2]], np.float32)
    params = QuantParams(spec(4, PerAxis(1)), np.array([0.1], np.float32), np.zeros(1, np.int32))
    x = correlated(3, 3)
    student = student_of("flexround", weight, params)
    result = learned(student, x, x @ (2 * weight), codes_rate=0.05)
    assert result.after < 1e-4 < result.before
    (codes,) = (w.hard_codes().numpy() for w in student.weights.values())
    np.testing.assert_array_equal(codes, [[6], [2], [-4]])


def test_a_loss_that_is_not_finite_leaves_the_start() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
    params = params_for_weight(weight, spec(3, PerAxis(1)))
    student, x = student_of("adaround", weight, params), correlated(0, 4)
    y = x @ weight
    y[3, 1] = np.nan
    result = learned(student, x, y, codes_rate=0.01)
    assert result.outcome.diverged
    assert not result.better
    (kept,) = (w.result()[0] for w in student.weights.values())
    np.testing.assert_allclose(kept, rounded(weight, params), rtol=FLOAT32_RELATIVE)


def test_steps_become_smaller_until_the_loss_is_finite() -> None:
    """Training starts over from the same variables with a quarter of the rates."""
    from octavo.ir.torch_fit import Fit, Samples
    from octavo.ir.torch_student import Rates

    weight = np.ones((2, 1), np.float32)
    params = params_for_weight(weight, spec(8, PerAxis(1)))
    student = student_of("straight-through", weight, params)
    seen: list[float] = []

    def loss(progress: float, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        (moved,) = student.weights["w"].code_variables()
        seen.append(float(moved.detach().max()))
        # Anything beyond one code from the start has no finite loss.
        return torch.where(moved.max() > 128, math.inf, 1.0) * -moved.sum()

    samples = Samples([{"x": np.ones((4, 2), np.float32)}], rows=True)
    outcome = Fit(2, 4, 60.0, 0).run(student, samples, Rates(4.0, 0, 0, 0), loss)
    assert (outcome.restarts, outcome.steps) == (1, 2)
    assert seen[:2] == [127.0, 131.0]
    assert seen[2:] == [127.0, 128.0]


def test_the_clock_ends_training() -> None:
    from octavo.ir.torch_fit import Fit, Samples
    from octavo.ir.torch_student import Rates

    weight = np.ones((2, 1), np.float32)
    student = student_of("fixed", weight, params_for_weight(weight, spec(8, PerAxis(1))))
    samples = Samples([{"x": np.ones((4, 2), np.float32)}], rows=True)

    def loss(progress: float, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return student.run(batch)["y"].square().mean()

    outcome = Fit(10**9, 4, 0.2, 0).run(student, samples, Rates(0, 1e-3, 0, 0), loss)
    assert outcome.late
    assert 0 < outcome.steps < 10**9
