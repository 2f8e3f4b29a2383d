"""Class activation maps against finite differences, and that they can be differentiated again."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from octavo.ir.torch_class_maps import class_map  # noqa: E402

_STEP = 1e-4
_DIFFERENCES = 1e-4


def logits_of(value: torch.Tensor) -> torch.Tensor:
    """Three classes that depend on all of `[B, 2, 2, 3]` without being linear in it."""
    weights = torch.arange(36, dtype=torch.float64).reshape(12, 3).sin()
    return torch.tanh(value.flatten(1)) @ weights


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_a_map_weighs_channels_by_what_they_do_to_the_logit() -> None:
    value = drawn(2, 2, 2, 3).requires_grad_()
    classes = torch.tensor([2, 0])
    found = class_map(value, logits_of(value), classes).detach().numpy()
    base = value.detach()
    expected = np.zeros((2, 6))
    for sample in range(2):
        for channel in range(2):
            slopes = []
            for place in np.ndindex(2, 3):
                step = torch.zeros_like(base)
                step[(sample, channel, *place)] = _STEP
                high, low = (logits_of(base + s)[sample, classes[sample]] for s in (step, -step))
                slopes.append(float(high - low) / (2 * _STEP))
            expected[sample] += np.mean(slopes) * base[sample, channel].flatten().numpy()
    np.testing.assert_allclose(found, np.maximum(expected, 0), atol=_DIFFERENCES)
    assert (found > 0).any()


def test_tokens_have_their_channels_last() -> None:
    """The same numbers as an image give the same map."""
    image = drawn(2, 2, 2, 3)
    tokens = image.flatten(2).transpose(1, 2).contiguous().requires_grad_()
    logits = logits_of(tokens.transpose(1, 2).reshape(2, 2, 2, 3))
    found = class_map(tokens, logits, torch.tensor([1, 1]))
    image.requires_grad_()
    same = class_map(image, logits_of(image), torch.tensor([1, 1]))
    np.testing.assert_allclose(found.detach().numpy(), same.detach().numpy(), rtol=1e-12)


def test_a_map_has_gradients_of_its_own() -> None:
    def total(scale: torch.Tensor) -> torch.Tensor:
        value = drawn(2, 2, 2, 3) * scale
        return class_map(value, logits_of(value), torch.tensor([2, 0])).square().sum()

    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(total(scale), scale)
    ends = (total((scale + step).detach().requires_grad_()) for step in (_STEP, -_STEP))
    high, low = (float(end.detach()) for end in ends)
    assert float(slope) == pytest.approx((high - low) / (2 * _STEP), rel=_DIFFERENCES)


def test_what_no_gradient_reaches_has_no_map() -> None:
    value = drawn(2, 2, 2, 3)
    assert not class_map(value, logits_of(value), torch.tensor([2, 0])).any()
