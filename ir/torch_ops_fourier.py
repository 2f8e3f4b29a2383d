"""Fourier transforms of ONNX in torch; complex numbers are pairs in the last axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def dft(
    x: Tensor,
    length: Tensor | None = None,
    axis: Tensor | int | None = None,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """DFT along one axis, of real numbers or pairs."""
    given = axis.reshape(-1).tolist()[0] if isinstance(axis, Tensor) else axis
    where = -2 if given is None else int(given)
    where = where % x.dim()
    n = x.shape[where] if length is None else int(length.reshape(-1).tolist()[0])
    if inverse and onesided:
        half = torch.view_as_complex(x.contiguous())
        n = 2 * (n - 1) if length is None else n
        whole: Tensor = torch.fft.irfft(half, n, dim=where)
        return whole.unsqueeze(-1)
    values = _complex(x)
    found = torch.fft.ifft(values, n, dim=where) if inverse else torch.fft.fft(values, n, dim=where)
    found = found.narrow(where, 0, n // 2 + 1) if onesided else found
    return torch.view_as_real(found)


def stft(
    x: Tensor,
    step: Tensor,
    window: Tensor | None = None,
    length: Tensor | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """STFT: the transform of each windowed frame, [batch, frames, bins, 2]."""
    known = window.shape[0] if window is not None else x.shape[1]
    n = known if length is None else int(length.reshape(-1).tolist()[0])
    frames = _complex(x).unfold(1, n, int(step.reshape(-1).tolist()[0]))
    frames = frames if window is None else frames * window
    found = torch.fft.fft(frames, n, dim=-1)
    return torch.view_as_real(found.narrow(-1, 0, n // 2 + 1) if onesided else found)


def _complex(x: Tensor) -> Tensor:
    """Complex numbers from pairs, or from real numbers in a last axis of one."""
    if x.shape[-1] == 2:
        pairs: Tensor = torch.view_as_complex(x.contiguous())
        return pairs
    real = x.squeeze(-1)
    found: Tensor = torch.complex(real, torch.zeros_like(real))
    return found


OPS: dict[str, Callable[..., Any]] = {"DFT": dft, "STFT": stft}
