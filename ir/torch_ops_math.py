"""Element-wise ONNX operators in torch.

Every function takes a node's inputs by position (None where left out) and its attributes by
ONNX's names, with ONNX's defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_UNSIGNED = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def identity(x: Tensor) -> Tensor:
    """Identity."""
    return x


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Div; integers round towards zero."""
    if a.is_floating_point():
        return a / b
    return torch.div(a, b, rounding_mode="trunc").to(a.dtype)


def power(x: Tensor, exponent: Tensor) -> Tensor:
    """Pow, in the type of the base; a single whole exponent counts as a constant.

    Its gradient has the logarithm of the base, which is NaN for the squares that models compute.
    """
    single = exponent.numel() == 1 and exponent.dim() <= x.dim()
    if single and float(exponent.detach()) % 1 == 0:
        return torch.pow(x, exponent.item()).to(x.dtype)
    return torch.pow(x, exponent).to(x.dtype)


def modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Mod: the sign of the divisor, or with `fmod` that of the dividend."""
    held = _UNSIGNED.get(a.dtype, a.dtype)
    function = torch.fmod if fmod else torch.remainder
    found: Tensor = function(a.to(held), b.to(held))
    return found.to(a.dtype)


def shift(x: Tensor, bits: Tensor, *, direction: str) -> Tensor:
    """BitShift to the LEFT or RIGHT."""
    wide = x.to(torch.int64), bits.to(torch.int64)
    moved = torch.bitwise_left_shift if direction == "LEFT" else torch.bitwise_right_shift
    found: Tensor = moved(*wide)
    return found.to(x.dtype)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """PRelu, the slope broadcast from the right."""
    return torch.where(x < 0, slope * x, x)


def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Clip; a bound above the other one wins if it is the upper."""
    return x if low is None and high is None else torch.clamp(x, low, high)


def maximum(*xs: Tensor) -> Tensor:
    """Max of all inputs."""
    return _over(torch.maximum, xs)


def minimum(*xs: Tensor) -> Tensor:
    """Min of all inputs."""
    return _over(torch.minimum, xs)


def total(*xs: Tensor) -> Tensor:
    """Sum of all inputs."""
    return _over(torch.add, xs)


def mean(*xs: Tensor) -> Tensor:
    """Mean of all inputs."""
    return _over(torch.add, xs) / len(xs)


def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """IsInf of the wanted signs."""
    wanted = torch.zeros_like(x, dtype=torch.bool)
    if detect_positive:
        wanted = wanted | (x == torch.inf)
    return wanted | (x == -torch.inf) if detect_negative else wanted


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Gelu, exact or by tanh."""
    return functional.gelu(x, approximate=approximate)


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Elu."""
    return functional.elu(x, alpha)


def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Celu."""
    return functional.celu(x, alpha)


def selu(x: Tensor, *, alpha: float = 1.67326319217681, gamma: float = 1.05070102214813) -> Tensor:
    """Selu."""
    return gamma * functional.elu(x, alpha)


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """LeakyRelu."""
    return functional.leaky_relu(x, alpha)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """HardSigmoid."""
    return torch.clamp(alpha * x + beta, 0, 1)


def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """ThresholdedRelu."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """Shrink."""
    inside = torch.where(x > lambd, x - bias, torch.zeros_like(x))
    return torch.where(x < -lambd, x + bias, inside)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Swish."""
    return x * torch.sigmoid(alpha * x)


def swiglu(gate: Tensor, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """SwiGLU: Swish of the gate times the value."""
    return swish(gate, alpha=alpha) * x


def softplus(x: Tensor) -> Tensor:
    """Softplus, without torch's straight line above 20."""
    return torch.logaddexp(x, torch.zeros_like(x))


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Where."""
    return torch.where(condition, a, b)


def _over(function: Callable[[Tensor, Tensor], Tensor], xs: tuple[Tensor, ...]) -> Tensor:
    # torch has no arithmetic for the larger unsigned types.
    held = [x.to(_UNSIGNED.get(x.dtype, x.dtype)) for x in xs]
    return reduce(function, held).to(xs[0].dtype)


OPS: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Add": total,
    "And": torch.logical_and,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitShift": shift,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseNot": torch.bitwise_not,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Ceil": torch.ceil,
    "Celu": celu,
    "Clip": clip,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Det": torch.linalg.det,
    "Div": divide,
    "Elu": elu,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Gelu": gelu,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": functional.hardswish,
    "Identity": identity,
    "IsInf": is_inf,
    "IsNaN": torch.isnan,
    "LeakyRelu": leaky_relu,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "Max": maximum,
    "Mean": mean,
    "Min": minimum,
    "Mish": functional.mish,
    "Mod": modulo,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "PRelu": prelu,
    "Pow": power,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Selu": selu,
    "Shrink": shrink,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Sum": total,
    "SwiGLU": swiglu,
    "Swish": swish,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "ThresholdedRelu": thresholded_relu,
    "Where": where,
    "Xor": torch.logical_xor,
}
