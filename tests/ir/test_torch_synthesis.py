"""The terms of synthesis against plain numpy, and what the descent makes of a network."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from octavo.ir import torch_synthesis
from octavo.ir.read import read
from octavo.ir.torch_image_terms import low_passed, moved, patch_entropy, total_variation
from octavo.ir.torch_module import TorchGraph, differentiable
from octavo.ir.torch_synthesis import Descent, Moments, Objective, Outcome, Start, Terms

# Sums of float32 in another order.
FLOAT32_RELATIVE = 1e-4

NETWORK = """
<ir_version: 10, opset_import: ["" : 21]>
net (float[N, 2, 6, 6] x) => (float[N, 5] y) <float[4, 2, 3, 3] w = {0}, float[4, 5] v = {0}> {
    c = Conv <pads = [1, 1, 1, 1]> (x, w)
    r = Relu (c)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    y = MatMul (f, v)
}
"""


def _graph() -> TorchGraph:
    proto = onnx.parser.parse_model(NETWORK)
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        drawn = rng.standard_normal(tuple(tensor.dims)).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(drawn, tensor.name))
    return differentiable(read(proto), ["c", "y"])


def _wanted() -> Moments:
    mean = np.array([1.0, -2.0, 0.5, 0.0], np.float32)
    return Moments("c", 1, mean, np.array([1.0, 2.0, 0.5, 1.5], np.float32))


def _start(seed: int = 0, **bounds: float) -> dict[str, Start]:
    drawn = np.random.default_rng(seed).standard_normal((16, 2, 6, 6)).astype(np.float32)
    return {"x": Start(drawn, 1.0, **bounds)}


def _run(terms: Terms, steps: int = 80, seconds: float = 60.0, **bounds: float) -> Outcome:
    objective = Objective(_graph(), (_wanted(),), (), "y", terms)
    descent = Descent(steps, 0.1, seconds, seed=0)
    return descent.run(objective, _start(**bounds), {}, lambda done, total: None)


def _distance(images: Any) -> float:
    """By definition, on what numpy says of the convolution's output."""
    with torch.no_grad():
        c = _graph().run({"x": torch.from_numpy(images)})["c"].numpy()
    wanted = _wanted()
    mean, spread = c.mean((0, 2, 3)), c.std((0, 2, 3))
    error = np.square(mean - wanted.mean) + np.square(spread - wanted.deviation)
    return float(error.mean() / np.square(wanted.deviation).mean())


def test_statistics_come_out_as_they_were_asked_for() -> None:
    found = _run(Terms())
    before, after = _distance(_start()["x"].array), _distance(found.arrays["x"])
    assert after < 0.15 * before
    assert found.distance == pytest.approx(after, rel=0.5)
    assert (found.steps, found.restarts, found.late) == (80, 0, False)


def test_the_same_seed_gives_the_same_images() -> None:
    first, second = (_run(Terms(labels=0.1, roll=0.2), steps=5).arrays["x"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_inputs_stay_inside_their_bounds() -> None:
    images = _run(Terms(), steps=20, low=-0.5, high=0.25).arrays["x"]
    assert images.min() >= -0.5
    assert images.max() <= 0.25


def test_classes_are_seen_where_they_are_asked_for() -> None:
    images = _run(Terms(statistics=0.0, labels=1.0)).arrays["x"]
    with torch.no_grad():
        logits = _graph().run({"x": torch.from_numpy(images)})["y"]
    # Three is the step through five classes.
    wanted = torch.arange(16) * 3 % 5
    assert (logits.argmax(1) == wanted).float().mean() > 0.8


def test_the_clock_ends_it_after_one_step_at_least() -> None:
    found = _run(Terms(), seconds=0.0)
    assert (found.steps, found.late) == (1, True)


def test_no_step_begins_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of three seconds: the fourth of ten seconds would end after twelve."""
    now = [0.0]
    monkeypatch.setattr(torch_synthesis, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def step(done: int, total: int) -> None:
        now[0] += 3.0

    objective = Objective(_graph(), (_wanted(),), (), "y", Terms())
    found = Descent(80, 0.1, 10.0, seed=0).run(objective, _start(), {}, step)
    assert (found.steps, found.late) == (3, True)


def test_a_loss_that_is_not_finite_begins_again_and_gives_up() -> None:
    unreachable = Moments("c", 1, np.full(4, np.nan, np.float32), np.ones(4, np.float32))
    objective = Objective(_graph(), (unreachable,), (), "", Terms())
    found = Descent(5, 0.1, 60.0, 0).run(objective, _start(), {}, lambda done, total: None)
    assert (found.steps, found.restarts, found.distance) == (0, 3, np.inf)
    np.testing.assert_array_equal(found.arrays["x"], _start()["x"].array)


def test_the_filter_is_the_centred_gaussian_of_the_spectrum() -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 10)).astype(np.float32)
    reach = 0.3 * 10
    rows, columns = np.arange(8) - 4, np.arange(10) - 5
    gain = np.exp(-(rows[:, None] ** 2 + columns[None, :] ** 2) / (2 * reach**2))
    spectrum = np.fft.fftshift(np.fft.fft2(images), (-2, -1)) * gain
    expected = np.fft.ifft2(np.fft.ifftshift(spectrum, (-2, -1))).real
    actual = low_passed(torch.from_numpy(images), 0.3).numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_patch_entropy_is_the_entropy_of_the_estimated_density() -> None:
    tokens = np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype(np.float32)
    mean = tokens.mean(1)
    unit = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    entropies = []
    for rows in unit:
        similar = (rows @ rows.T).reshape(-1)
        width = 1.06 * similar.std(ddof=1) * similar.size**-0.2
        points = np.linspace(similar.min(), similar.max(), 10)
        kernel = np.exp(-(((points[:, None] - similar) / width) ** 2) / 2)
        density = kernel.mean(1) / (width * np.sqrt(2 * np.pi))
        entropies.append(np.trapezoid(-density * np.log(density + 1e-4), points))
    found = patch_entropy(torch.from_numpy(tokens), torch.Generator().manual_seed(0))
    assert float(found) == pytest.approx(np.mean(entropies), rel=FLOAT32_RELATIVE)


def test_alike_tokens_have_less_entropy_than_diverse_ones() -> None:
    rng = np.random.default_rng(0)
    diverse = torch.from_numpy(rng.standard_normal((4, 16, 8)).astype(np.float32))
    alike = torch.ones(4, 16, 8) + 0.1 * diverse
    draw = torch.Generator().manual_seed(0)
    assert patch_entropy(diverse, draw) > patch_entropy(alike, draw)


def test_total_variation_counts_both_directions() -> None:
    image = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    assert float(total_variation(image)) == 1.0 + 2.0


def test_moved_images_hold_the_same_pixels() -> None:
    images = torch.arange(2 * 36, dtype=torch.float32).reshape(2, 1, 6, 6)
    found = moved(images, 2, torch.Generator().manual_seed(1))
    assert not torch.equal(found, images)
    assert torch.equal(found.flatten(1).sort().values, images.flatten(1).sort().values)
