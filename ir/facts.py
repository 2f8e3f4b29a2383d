"""Facts: what passes learn about a model, kept on it by type until a pass invalidates them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.quant import QuantParams, QuantSpec


class Fact:
    """Base of all facts: frozen dataclasses keyed by value or node name."""


@final
@dataclass(frozen=True)
class Norm:
    """The parameters of a normalization, kept although the node may have been folded.

    `kind` is "batch" or "layer"; arrays have shape `[C]`; a LayerNorm has no mean and variance.
    """

    kind: Literal["batch", "layer"]
    gamma: NDArray[np.float32]
    beta: NDArray[np.float32]
    mean: NDArray[np.float32] | None = None
    variance: NDArray[np.float32] | None = None
    epsilon: float = 0.0


@final
@dataclass(frozen=True)
class Norms(Fact):
    """Normalizations by the name of the value they produce (or produced, where folded)."""

    by_value: Mapping[str, Norm]


@final
@dataclass(frozen=True)
class Range:
    """The interval `[low, high]` that calibration chose for a value, and the observed one."""

    low: float
    high: float
    observed_low: float
    observed_high: float


@final
@dataclass(frozen=True)
class Ranges(Fact):
    """Activation ranges by value name, and the calibration they come from."""

    by_value: Mapping[str, Range]
    method: str
    samples: int
    calibration_sha256: str


Method = Literal["float", "static", "dynamic", "float8", "float4", "weight-only", "storage"]


@final
@dataclass(frozen=True)
class Option:
    """One way to compress a node: how it computes, and how its weight is stored.

    - `float`: nothing changes.
    - `static`: integer kernel, activations with calibrated parameters.
    - `dynamic`: integer kernel, activation parameters found at run time.
    - `float8`: float8 kernel, operands on the float8 grid of their calibrated largest magnitude.
    - `float4`: float activations, the kernel reads float4 numbers in blocks (`ir/float4.py`).
    - `weight-only`: float activations, the kernel reads the low-bit weight.
    - `storage`: the weight is stored low-bit and unpacked when the model loads; float compute.
    """

    method: Method
    weight: QuantSpec | None = None

    def __str__(self) -> str:
        return self.method if self.weight is None else f"{self.method}:{self.weight}"


FLOAT = Option("float")


@final
@dataclass(frozen=True)
class Choice:
    """The option a node got, why, and the seconds that decided (none: not measured)."""

    option: Option
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Plan(Fact):
    """The option of every node that has more than one, by node name."""

    by_node: Mapping[str, Choice]
    source: str

    def method(self, node_name: str) -> Method:
        """The method of a node; nodes without a decision compute in float."""
        choice = self.by_node.get(node_name)
        return choice.option.method if choice else "float"


@final
@dataclass(frozen=True)
class Site:
    """One activation quantizer: the value it follows and how it quantizes.

    `group` names the sites that must share parameters; `clip_high` bounds the range from above
    where a fused Clip saturates; `nonnegative` says that zero must be the lowest code (fused
    Relu); `fixed` overrides calibration where the operator defines its output range (Softmax).
    """

    value: str
    spec: QuantSpec
    group: str
    nonnegative: bool = False
    clip_high: float | None = None
    fixed: tuple[float, float] | None = None


@final
@dataclass(frozen=True)
class Placement(Fact):
    """Where activation quantizers go, and which consumers read the quantized value.

    `sites` by value name; `consumers` by value name: the nodes that read the quantized value
    (all others keep the float one); `fused` by activation node: the node whose kernel absorbs it.
    """

    sites: Mapping[str, Site]
    consumers: Mapping[str, tuple[str, ...]]
    fused: Mapping[str, str]


@final
@dataclass(frozen=True)
class Latencies(Fact):
    """Measured seconds by node name and method, at the batch shape they were measured with."""

    by_node: Mapping[str, Mapping[str, float]]
    quantize_seconds_per_byte: float
    dequantize_seconds_per_byte: float
    environment: str


@final
@dataclass(frozen=True)
class HalfConstants(Fact):
    """Names of the float constants that are stored as float16 where it holds their numbers."""

    names: tuple[str, ...]


@final
@dataclass(frozen=True)
class Portable(Fact):
    """Weights are written as standard operators that other runtimes execute too."""


@final
@dataclass(frozen=True)
class QuantizedInput(Fact):
    """Parameters found in a model that already carried Q/DQ, by the name of the float value."""

    by_value: Mapping[str, QuantParams]
