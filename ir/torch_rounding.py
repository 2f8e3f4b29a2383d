"""Weights whose rounding is learned: variables in torch that end as codes on the grid.

A weight is (c - z)·s with codes c; every kind starts at given codes, so that it continues the
work of whoever chose them, and may move the scales too: s·exp(t), one t per scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, final

import numpy as np
import torch
from torch import Tensor

from octavo.ir.kernel_codes import free_scales
from octavo.ir.quant import PerAxis, PerBlock, QuantParams, broadcast_params, quantize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

RoundingMethod = Literal["fixed", "adaround", "flexround", "straight-through"]
# The rectified sigmoid reaches 0 and 1 within finite variables (AdaRound, equation 23).
_STRETCH, _SHIFT = 1.2, -0.1
# How close to the border between two codes a start may lie: the present code stays the nearest.
_BORDER = 0.499


class LearnedWeight(ABC):
    """One quantized weight with variables; `stretch` is the log of what its numbers grow by.

    `count` is the number of its entries.
    """

    count: int
    stretch: Tensor

    @abstractmethod
    def soft(self) -> Tensor:
        """The weight to train with, in its shape, with gradients."""

    @abstractmethod
    def hard(self) -> Tensor:
        """The weight that will be emitted."""

    @abstractmethod
    def code_variables(self) -> Sequence[Tensor]:
        """What moves the codes."""

    def regulariser(self, beta: float) -> Tensor | None:
        """A penalty in [0, 1] on codes between two whole ones."""
        return None


class WeightRounding(LearnedWeight):
    """A weight on an even grid."""

    def __init__(
        self, weight: NDArray[np.floating], rounded: NDArray[np.float32], params: QuantParams
    ) -> None:
        """`weight` is the float weight and `rounded` what is left of it, both in one shape."""
        self.params, self.shape, self.count = params, weight.shape, weight.size
        scale, zero = broadcast_params(params, weight.shape)
        codes = quantize(rounded, params).astype(np.float32)
        near = np.divide(weight, scale, dtype=np.float32) + zero.astype(np.float32) - codes
        self.zero = torch.from_numpy(np.array(zero, np.float32))
        self.codes = torch.from_numpy(codes)
        # The float weight in codes, no further from the present code than the next border.
        self.real = torch.from_numpy(codes + np.clip(near, -_BORDER, _BORDER).astype(np.float32))
        self.scale = torch.from_numpy(np.array(params.scale, np.float32))
        self.stretch = torch.zeros(free_scales(params), requires_grad=True)

    @abstractmethod
    def soft_codes(self) -> Tensor:
        """Codes with gradients, in the weight's shape; they need not be whole."""

    def soft(self) -> Tensor:
        """The weight to train with."""
        return (self.soft_codes() - self.zero) * self._spread(self.scale * self.stretch.exp())

    @torch.no_grad()
    def hard_codes(self) -> Tensor:
        """The whole codes that are nearest to the soft ones."""
        codes = torch.round(self.soft_codes())
        return codes.clamp(self.params.spec.qmin, self.params.spec.qmax)

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The weight that will be emitted."""
        return (self.hard_codes() - self.zero) * self._spread(self.scale * self.stretch.exp())

    @torch.no_grad()
    def result(self) -> tuple[NDArray[np.float32], QuantParams]:
        """The rounded weight and its parameters."""
        scale = (self.scale * self.stretch.exp()).numpy()
        params = QuantParams(self.params.spec, scale, self.params.zero_point)
        return self.hard().numpy(), params

    def _spread(self, scale: Tensor) -> Tensor:
        """One scale per axis or block, in a shape that broadcasts against the weight."""
        match self.params.spec.granularity:
            case PerAxis(axis):
                axis %= len(self.shape)
                return scale.reshape([-1 if k == axis else 1 for k in range(len(self.shape))])
            case PerBlock(axis, size):
                spread = scale.repeat_interleave(size, axis)
                return spread.narrow(axis, 0, self.shape[axis])
        return scale

    def _clipped(self, codes: Tensor) -> Tensor:
        return codes.clamp(self.params.spec.qmin, self.params.spec.qmax)


@final
class FixedCodes(WeightRounding):
    """Codes stay; only scales move."""

    def soft_codes(self) -> Tensor:
        return self.codes

    def code_variables(self) -> Sequence[Tensor]:
        return ()


@final
class AdaRound(WeightRounding):
    """c = clip(⌊w/s⌋ + h(V)), h the rectified sigmoid (Nagel et al. 2020, arXiv 2004.10568)."""

    def __init__(
        self, weight: NDArray[np.floating], rounded: NDArray[np.float32], params: QuantParams
    ) -> None:
        super().__init__(weight, rounded, params)
        self.floor = torch.floor(self.real)
        share = (self.real - self.floor - _SHIFT) / _STRETCH
        self.v = torch.logit(share).requires_grad_()

    def _up(self) -> Tensor:
        return (torch.sigmoid(self.v) * _STRETCH + _SHIFT).clamp(0, 1)

    def soft_codes(self) -> Tensor:
        return self._clipped(self.floor + self._up())

    def code_variables(self) -> Sequence[Tensor]:
        return (self.v,)

    def regulariser(self, beta: float) -> Tensor | None:
        return (1 - (2 * self._up() - 1).abs().pow(beta)).mean()


@final
class FlexRound(WeightRounding):
    """c = round(w / (s·S₂·s₃·s₄)), all factors learned as logs (arXiv 2306.00317, equation 2).

    S₂ is one factor per weight; s₃ and s₄ one per output and input channel. The gradient passes
    straight through the rounding.
    """

    def __init__(
        self, weight: NDArray[np.floating], rounded: NDArray[np.float32], params: QuantParams
    ) -> None:
        super().__init__(weight, rounded, params)
        sizes = [[n if k == axis else 1 for k, n in enumerate(weight.shape)] for axis in (0, 1)]
        shapes = [list(weight.shape), *sizes[: weight.ndim]]
        self.factors = [torch.zeros(shape, requires_grad=True) for shape in shapes]

    def soft_codes(self) -> Tensor:
        log = self._spread(self.stretch.expand_as(self.scale))
        for factor in self.factors:
            log = log + factor
        return self._clipped(_straight((self.real - self.zero) * (-log).exp()) + self.zero)

    def code_variables(self) -> Sequence[Tensor]:
        return self.factors


@final
class StraightThrough(WeightRounding):
    """c = round(u) with u a float of its own per weight; the gradient passes straight through."""

    def __init__(
        self, weight: NDArray[np.floating], rounded: NDArray[np.float32], params: QuantParams
    ) -> None:
        super().__init__(weight, rounded, params)
        self.real.requires_grad_()

    def soft_codes(self) -> Tensor:
        return self._clipped(_straight(self.real))

    def code_variables(self) -> Sequence[Tensor]:
        return (self.real,)


def weight_rounding(
    method: RoundingMethod,
    weight: NDArray[np.floating],
    rounded: NDArray[np.float32],
    params: QuantParams,
) -> WeightRounding:
    """The variables of a method, starting at `rounded`."""
    return _METHODS[method](weight, rounded, params)


_METHODS: dict[RoundingMethod, type[WeightRounding]] = {
    "fixed": FixedCodes,
    "adaround": AdaRound,
    "flexround": FlexRound,
    "straight-through": StraightThrough,
}


def _straight(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()
