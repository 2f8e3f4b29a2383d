"""Binary coding whose codes and levels are learned: UniQuanF (arXiv 2506.03781) in torch.

The transform is FlexRound's, the map takes the nearest of the levels Σ ±α_i + z of a channel:
ŵ = e^d1 · level(w / e^(d1 + d2 + d3)), with d1 and d3 per channel and d2 per weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np
import torch
from torch import Tensor

from octavo.ir.levels import binary_levels
from octavo.ir.torch_rounding import LearnedWeight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]

# α and z move by a tenth of what the factors do (UniQuanF's learning rates).
_SLOWER = 0.1
# A start lies within its present cell by this share of the cell's width.
_MARGIN = 1e-3


@final
class CodedWeight(LearnedWeight):
    """A weight of levels that starts where it is; only neighbours of a level are looked at.

    Every `period`-th use looks for nearer levels. The gradient passes straight through where a
    number is no further from its level than the smallest |α|.
    """

    def __init__(
        self, weight: Float32, rounded: Float32, levels: Float32, axis: int, period: int = 2
    ) -> None:
        """`rounded` is what is left of `weight`, in levels `[N, 2^k]` of the channels of `axis`."""
        self.shape, self.axis, self.count = weight.shape, axis, weight.size
        self.period, self.uses = period, 0
        bits = levels.shape[1].bit_length() - 1
        alone = 1 << np.arange(bits)[::-1]
        alpha = (levels[:, alone] - levels[:, :1]) / 2
        self.alpha = torch.from_numpy(alpha.astype(np.float32))
        self.offset = torch.from_numpy((levels[:, 0] + alpha.sum(axis=1)).astype(np.float32))
        every = np.eye(bits, dtype=np.float32)
        self.signs = torch.from_numpy(binary_levels(every, np.zeros(bits, np.float32)))
        channels, present = len(levels), torch.from_numpy(self._rows(rounded))
        self.stretch = torch.zeros(channels, requires_grad=True)
        self.factor = torch.zeros(channels, requires_grad=True)
        self.factors = torch.zeros(present.shape, requires_grad=True)
        self.grown = torch.zeros(alpha.shape, requires_grad=True)
        self.shift = torch.zeros(channels, requires_grad=True)
        with torch.no_grad():
            self.number = self._nearest(present, self._levels())
            self.real = self._inside(torch.from_numpy(self._rows(weight)))

    def code_variables(self) -> Sequence[Tensor]:
        return (self.factor, self.factors, self.grown, self.shift)

    def soft(self) -> Tensor:
        levels, real = self._levels(), self._transformed()
        if self.uses % self.period == 0:
            self.number = self._neighbour(real.detach(), levels.detach())
        self.uses += 1
        own = levels.gather(1, self.number)
        least = self._alpha().detach().abs().amin(dim=1, keepdim=True)
        near = (real - own).detach().abs() <= least
        mapped = own + torch.where(near, real - real.detach(), 0)
        return self._restored(mapped * self.stretch.exp()[:, None])

    @torch.no_grad()
    def hard(self) -> Tensor:
        return torch.from_numpy(self.result()[0])

    @torch.no_grad()
    def result(self) -> tuple[Float32, Float32]:
        """The weight and its levels: plain binary coding with α·e^d1 and z·e^d1 as float16."""
        number = self._nearest(self._transformed(), self._levels())
        grown = self.stretch.exp()
        alpha = (self._alpha() * grown[:, None]).half().float().numpy()
        offset = (self._offset() * grown).half().float().numpy()
        levels = binary_levels(alpha, offset)
        rows = np.take_along_axis(levels, number.numpy(), axis=1)
        return self._restored(torch.from_numpy(rows)).contiguous().numpy(), levels

    def _alpha(self) -> Tensor:
        return self.alpha * (_SLOWER * self.grown).exp()

    def _offset(self) -> Tensor:
        unit = self.alpha.abs().mean(dim=1)
        return self.offset + unit * _SLOWER * self.shift

    def _levels(self) -> Tensor:
        """All levels of every channel `[N, 2^k]`, numbered by their signs."""
        return self._alpha() @ self.signs + self._offset()[:, None]

    def _transformed(self) -> Tensor:
        """The float weight over all learned factors, `[N, K]`."""
        return self.real * (-(self.stretch + self.factor)[:, None] - self.factors).exp()

    def _nearest(self, real: Tensor, levels: Tensor) -> Tensor:
        """Numbers of the nearest levels, the lower one in a tie."""
        rising, order = levels.sort(dim=1, stable=True)
        bounds = (rising[:, 1:] + rising[:, :-1]) / 2
        return order.gather(1, torch.searchsorted(bounds.contiguous(), real.contiguous()))

    def _neighbour(self, real: Tensor, levels: Tensor) -> Tensor:
        """The nearest of the present level and the two beside it."""
        rising, order = levels.sort(dim=1, stable=True)
        rank = order.argsort(dim=1).gather(1, self.number)
        last = levels.shape[1] - 1
        ranks = torch.stack([rank, (rank - 1).clamp(min=0), (rank + 1).clamp(max=last)])
        values = torch.stack([rising.gather(1, each) for each in ranks])
        chosen = (values - real).abs().argmin(dim=0, keepdim=True)
        return order.gather(1, ranks.gather(0, chosen)[0])

    def _inside(self, real: Tensor) -> Tensor:
        """The float weight, no further away than the cells of the present levels reach."""
        rising, order = self._levels().sort(dim=1, stable=True)
        rank = order.argsort(dim=1).gather(1, self.number)
        bounds = (rising[:, 1:] + rising[:, :-1]) / 2
        far = torch.full_like(bounds[:, :1], torch.inf)
        low, high = torch.cat([-far, bounds], dim=1), torch.cat([bounds, far], dim=1)
        own = rising.gather(1, rank)
        below, above = own - low.gather(1, rank), high.gather(1, rank) - own
        keep = 1 - _MARGIN
        return torch.minimum(torch.maximum(real, own - keep * below), own + keep * above)

    def _rows(self, array: Float32) -> Float32:
        moved = np.moveaxis(array, self.axis, 0)
        return np.ascontiguousarray(moved.reshape(len(moved), -1), np.float32)

    def _restored(self, rows: Tensor) -> Tensor:
        axis = self.axis % len(self.shape)
        moved = [self.shape[axis], *self.shape[:axis], *self.shape[axis + 1 :]]
        return rows.reshape(moved).movedim(0, axis)
