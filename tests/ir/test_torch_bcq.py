"""Learned binary coding: where it starts, what it emits, and where its gradients pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from octavo.ir.levels import binary_levels, level_weight, nearest_levels

torch = pytest.importorskip("torch")

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.torch_bcq import CodedWeight

    Float32 = NDArray[np.float32]

_CASES = [((5, 40), 0), ((40, 5), 1), ((5, 4, 3, 3), 0)]
FLOAT32_RELATIVE = 1e-6


def numbers(shape: tuple[int, ...], axis: int, bits: int = 3) -> tuple[Float32, Float32, Float32]:
    """A weight, levels of its channels that float16 holds, and other levels than the nearest."""
    rng = np.random.default_rng(bits)
    weight = rng.standard_normal(shape).astype(np.float32)
    alpha = (2.0 ** -np.arange(bits) * rng.uniform(0.6, 1, (shape[axis], bits))).astype(np.float16)
    offset = rng.uniform(-0.2, 0.2, shape[axis]).astype(np.float16)
    levels = binary_levels(alpha.astype(np.float32), offset.astype(np.float32))
    moved = weight + rng.normal(0, 0.3, shape).astype(np.float32)
    return weight, levels, level_weight(nearest_levels(moved, levels, axis), levels, axis)


def coded(shape: tuple[int, ...], axis: int, bits: int = 3) -> CodedWeight:
    from octavo.ir.torch_bcq import CodedWeight

    weight, levels, rounded = numbers(shape, axis, bits)
    return CodedWeight(weight, rounded, levels, axis)


@pytest.mark.parametrize(("shape", "axis"), _CASES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_starts_at_the_given_levels(shape: tuple[int, ...], axis: int, bits: int) -> None:
    """Also where they are not the nearest ones: it continues the work of whoever chose them."""
    _, levels, rounded = numbers(shape, axis, bits)
    weight = coded(shape, axis, bits)
    np.testing.assert_allclose(weight.soft().detach().numpy(), rounded, atol=1e-6)
    found, kept = weight.result()
    np.testing.assert_array_equal(found, rounded)
    np.testing.assert_array_equal(kept, levels)


@pytest.mark.parametrize(("shape", "axis"), _CASES)
def test_factors_disappear_into_alpha_and_offset(shape: tuple[int, ...], axis: int) -> None:
    """Unification: e^d1·level(w / e^(d1 + d2 + d3)) is plain binary coding with α·e^d1, z·e^d1."""
    weight = coded(shape, axis)
    generator = torch.Generator().manual_seed(0)
    variables = [*weight.code_variables(), weight.stretch]
    with torch.no_grad():
        for variable in variables:
            variable.copy_(0.3 * torch.randn(variable.shape, generator=generator))
    factor, factors, grown, shift = (v.detach().numpy() for v in weight.code_variables())
    stretch = weight.stretch.detach().numpy()
    alpha = weight.alpha.numpy() * np.exp(0.1 * grown)
    offset = weight.offset.numpy() + 0.1 * shift * np.abs(weight.alpha.numpy()).mean(axis=1)
    levels = binary_levels(alpha, offset)
    inner = weight.real.numpy() / np.exp((stretch + factor)[:, None] + factors)
    mapped = level_weight(nearest_levels(inner, levels, 0), levels, 0)
    truth = np.exp(stretch)[:, None] * mapped
    found, own = weight.result()
    rows = np.moveaxis(found, axis, 0).reshape(len(levels), -1)
    # Each of four float16 numbers is off by at most half of 2^-10 of its size.
    half = 2.0**-11 * np.exp(stretch)[:, None] * (np.abs(alpha).sum(1) + np.abs(offset))[:, None]
    assert np.all(np.abs(rows - truth) <= half + 1e-6)
    assert all(np.isin(row, each).all() for row, each in zip(rows, own, strict=True))
    np.testing.assert_array_equal(weight.hard().numpy(), found)


def test_gradients_stop_far_from_a_level() -> None:
    """Inside the smallest |α| the gradient of a weight's factor passes, outside it does not."""
    weight = coded((5, 40), 0)
    weight.soft().sum().backward()  # type: ignore[no-untyped-call]
    _, factors, grown, shift = weight.code_variables()
    real = weight.real
    levels = (weight.alpha @ weight.signs + weight.offset[:, None]).gather(1, weight.number)
    near = (real - levels).abs() <= weight.alpha.abs().amin(dim=1, keepdim=True)
    assert near.any()
    assert not near.all()
    assert factors.grad is not None
    # d(real · e^-d2) / d(d2) = -real.
    expected = torch.where(near, -real, torch.zeros_like(real))
    torch.testing.assert_close(factors.grad, expected, rtol=1e-5, atol=1e-6)
    assert grown.grad is not None
    assert shift.grad is not None
    torch.testing.assert_close(
        shift.grad, 0.1 * 40 * weight.alpha.abs().mean(dim=1), rtol=1e-5, atol=1e-6
    )


def test_codes_move_by_one_level_at_every_second_use() -> None:
    """Local and periodic: a number far away gets there step by step."""
    from octavo.ir.torch_bcq import CodedWeight

    levels = binary_levels(np.array([[2, 1, 0.5]], np.float32), np.zeros(1, np.float32))
    start = np.full((1, 4), levels.min(), np.float32)
    weight = CodedWeight(start, start, levels, 0)
    weight.real = torch.full((1, 4), float(levels.max()))
    rising = np.sort(levels[0])
    with torch.no_grad():
        found = [float(weight.soft()[0, 0]) for _ in range(6)]
    np.testing.assert_allclose(found, np.repeat(rising[1:4], 2), rtol=FLOAT32_RELATIVE)
