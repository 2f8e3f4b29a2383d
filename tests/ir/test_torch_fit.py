"""Batches that training draws, and gradients of their parts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from octavo.ir.torch_fit import Samples, _Descent  # noqa: E402
from octavo.ir.torch_mixing import Mixtures  # noqa: E402
from octavo.ir.torch_reconstruction import target_name  # noqa: E402

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed

_FLOAT32 = 1e-6


@pytest.mark.parametrize("count", [1, 5, 8])
def test_gradients_of_the_parts_are_those_of_the_batch(count: int) -> None:
    """Parts of different sizes, and variables that the loss does not use."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=generator, requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)
    batch = {"x": torch.randn(count, 4, generator=generator)}

    def loss(_: float, part: dict[str, torch.Tensor]) -> torch.Tensor:
        return (part["x"] @ weight).tanh().square().sum(1).mean()

    loss(0.0, batch).backward()
    expected = weight.grad.clone()
    for parts in (1, 2, 3):
        with ThreadPoolExecutor(parts) as executor:
            assert _Descent(loss, parts, executor).gradients(0.0, batch, [weight, unused])
        torch.testing.assert_close(weight.grad, expected, rtol=_FLOAT32, atol=_FLOAT32)
        assert unused.grad is None


def test_a_feed_is_one_part_whatever_its_arrays_are() -> None:
    """A scalar has no samples to divide by."""
    variable = torch.ones(1, requires_grad=True)
    feed = {"scale": torch.tensor(3.0), "x": torch.tensor([1.0, 2.0])}
    with ThreadPoolExecutor(1) as executor:
        descent = _Descent(lambda _, f: (f["scale"] * f["x"] * variable).sum(), 1, executor)
        assert descent.gradients(0.0, feed, [variable])
    assert variable.grad.item() == 9


def test_a_loss_that_is_not_finite_is_told() -> None:
    variable = torch.ones(1, requires_grad=True)
    batch = {"x": torch.tensor([1.0, float("inf")])}
    with ThreadPoolExecutor(2) as executor:
        descent = _Descent(lambda _, part: (part["x"] * variable).mean(), 2, executor)
        assert not descent.gradients(0.0, batch, [variable])


def test_mixtures_lie_between_two_samples_and_have_targets_of_their_own() -> None:
    """Corners of a simplex: a mixture shows its two samples and their shares."""
    corners = np.eye(6, dtype=np.float32)
    samples = Samples([{"x": corners, target_name("y"): corners}], rows=True)

    def teacher(feed: Feed) -> dict[str, NDArray[np.generic]]:
        return {"y": 3 * feed["x"] ** 2}

    mixtures = Mixtures(samples, ["x"], ["y"], teacher)
    assert mixtures.rows
    made = [mixtures.draw(torch.Generator().manual_seed(k), 6) for k in (0, 0, 1)]
    x = made[0]["x"].numpy()
    np.testing.assert_allclose(x.sum(1), 1, atol=_FLOAT32)
    assert ((x > 0).sum(1) <= 2).all()
    assert ((x > 0).sum(1) == 2).any()
    np.testing.assert_allclose(made[0][target_name("y")].numpy(), 3 * x**2, atol=_FLOAT32)
    assert torch.equal(made[0]["x"], made[1]["x"])
    assert not torch.equal(made[0]["x"], made[2]["x"])
