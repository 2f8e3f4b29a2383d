"""What natural images have and noise has not: smoothness, few high frequencies, diverse patches."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_POINTS = 10
_TINY = 1e-4
# Pairs that a density is estimated from; more change its entropy less than a step does.
_PAIRS = 512


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbours along the last two axes; a scalar."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return down + (images[..., 1:] - images[..., :-1]).abs().mean()


def low_passed(images: Tensor, share: float) -> Tensor:
    """Images without most of what varies faster than `share` of their width, `[…, H, W]`.

    SynQ's filter (arXiv 2603.18423): the spectrum times exp(-(u² + v²) / (2·D²)), u and v whole
    frequencies counted from the lowest, D = share · W.
    """
    height, width = images.shape[-2:]
    reach = share * width
    vertical = torch.fft.fftfreq(height, 1 / height)
    horizontal = torch.fft.rfftfreq(width, 1 / width)
    distance = vertical[:, None].square() + horizontal[None, :].square()
    kept = torch.exp(-distance / (2 * reach * reach))
    spectrum = torch.fft.rfft2(images) * kept
    filtered: Tensor = torch.fft.irfft2(spectrum, s=(height, width))
    return filtered.to(images.dtype)


def patch_entropy(attended: Tensor, generator: torch.Generator) -> Tensor:
    """Entropy of how similar the tokens of a sample are to each other, in nats, mean over samples.

    `attended` is what attention hands on, `[B, heads, T, D]` (heads are averaged) or `[B, T, D]`.
    Cosine similarities of pairs of tokens, a Gaussian kernel density on ten points between the
    least and the largest, its differential entropy by the trapezoid rule (PSAQ-ViT, arXiv
    2203.02250, equations 3 to 6). All noise looks alike to a trained network; parts of an image
    do not.
    """
    tokens = attended.mean(1) if attended.dim() == 4 else attended
    unit = functional.normalize(tokens, dim=-1)
    similar = (unit @ unit.transpose(-1, -2)).flatten(1)
    if similar.shape[1] > _PAIRS:
        similar = similar[:, torch.randperm(similar.shape[1], generator=generator)[:_PAIRS]]
    width = 1.06 * similar.std(1, keepdim=True).clamp_min(_TINY) * similar.shape[1] ** -0.2
    low, high = similar.amin(1, keepdim=True), similar.amax(1, keepdim=True)
    points = low + (high - low) * torch.linspace(0, 1, _POINTS)
    scaled = (points[:, :, None] - similar[:, None, :]) / width[:, :, None]
    density = torch.exp(-0.5 * scaled.square()).mean(2) / (width * math.sqrt(2 * math.pi))
    entropy: Tensor = torch.trapezoid(-density * torch.log(density + _TINY), points, dim=1)
    return entropy.mean()


def moved(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """All images rolled by up to `reach` rows and columns, every other time mirrored."""
    down, right = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    rolled = torch.roll(images, (down, right), (-2, -1))
    mirrored = bool(torch.randint(0, 2, (1,), generator=generator))
    return rolled.flip(-1) if mirrored else rolled
