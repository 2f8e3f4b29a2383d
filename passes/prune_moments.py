"""Second moments for pruning: measured, or in closed form from the weights alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from octavo.passes.affine_layers import AffineLayer
from octavo.passes.prune_readers import wanted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.moments import Moments
    from octavo.passes.prune_readers import Reader

    Float64 = NDArray[np.float64]

_TINY = 1e-30
# What hands on channels as they are.
_VIEWS = ("Identity", "Dropout", "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten")


def measured(moments: Moments, readers: Sequence[Reader]) -> dict[tuple[str, int], Float64]:
    """E[x̃·x̃ᵀ] `[groups, K + 1, K + 1]` of what readers multiply, with a 1 behind it."""
    found = {}
    for key in wanted(readers):
        moment = moments.of(*key)
        if moment is not None:
            found[key] = augmented(moment.matrix().astype(np.float64), moment.mean)
    return found


def augmented(second: Float64, mean: NDArray[np.floating]) -> Float64:
    """The second moment of columns with a 1 behind them."""
    groups, width, _ = second.shape
    wide = np.ones((groups, width + 1, width + 1))
    wide[:, :-1, :-1] = second
    wide[:, :-1, -1] = wide[:, -1, :-1] = mean
    return wide


def centred(wide: Float64) -> Float64:
    """The covariance, from the second moment of columns with a 1 behind them."""
    mean = wide[:, :-1, -1]
    return np.asarray(wide[:, :-1, :-1] - mean[:, :, None] * mean[:, None, :])


def closed_form(reader: Reader) -> Float64 | None:
    """Moments of what a reader multiplies if the layer before it reads white noise.

    Channel i of that layer is then normal with mean b_i and covariance w_i·w_j; through a Relu
    the second moments are those of the arc-cosine kernel (Cho and Saul 2009, equation 6), here
    about the means. Channels that filters alike give can then stand in for each other, the idea
    of UDFC (ICCV 2023, arXiv 2308.07209). Places of a window count as independent. `None` where
    no layer with constant weights lies before, or something else than a Relu in between.
    """
    before = _layer_before(reader.node.inputs[0])
    if before is None or reader.matrix.groups > 1:
        return None
    layer, rectified = before
    assert layer.weight.const_value is not None
    weight = np.asarray(layer.weight.const_value.numpy(), np.float64)
    if layer.node.op_type == "ConvTranspose":
        return None
    turned = layer.node.op_type == "MatMul" or (
        layer.node.op_type == "Gemm" and not layer.node.attributes.get_int("transB", 0)
    )
    filters = (weight.T if turned else weight).reshape(layer.channels, -1)
    bias = layer.bias()
    shift = np.zeros(layer.channels) if bias is None else bias
    covariance, mean = filters @ filters.T, shift
    if rectified:
        covariance, mean = _rectified(covariance, shift)
    copies = reader.matrix.width // max(layer.channels, 1)
    if copies * layer.channels != reader.matrix.width:
        return None
    # Columns of a window run over channels first, then over its places.
    wide = np.kron(covariance, np.eye(copies))
    means = np.repeat(mean, copies)
    return augmented((wide + np.outer(means, means))[None], means[None])


def _rectified(covariance: Float64, mean: Float64) -> tuple[Float64, Float64]:
    """Covariance and mean of max(z, 0) for z normal; correlation as for centred z."""
    deviation = np.sqrt(np.maximum(np.diag(covariance), _TINY))
    at = mean / deviation
    density = np.exp(-0.5 * at**2) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + np.vectorize(math.erf)(at / math.sqrt(2)))
    first = deviation * density + mean * below
    second = (mean**2 + deviation**2) * below + mean * deviation * density
    spread = np.sqrt(np.maximum(second - first**2, _TINY))
    cosine = np.clip(covariance / np.outer(deviation, deviation), -1, 1)
    angle = np.arccos(cosine)
    kernel = (np.sin(angle) + (math.pi - angle) * cosine) / math.pi
    # The kernel of two equal filters is 1, that of orthogonal ones 1/π.
    correlation = (kernel - 1 / math.pi) / (1 - 1 / math.pi)
    return correlation * np.outer(spread, spread), first


def _layer_before(value: onnx_ir.Value | None) -> tuple[AffineLayer, bool] | None:
    """The layer that gives a value, and whether a Relu lies in between."""
    rectified = False
    while value is not None and value.producer() is not None:
        node = value.producer()
        assert node is not None
        if node.op_type == "Add" and not node.domain:
            computed = [v for v in node.inputs if v is not None and v.producer() is not None]
            node = computed[0].producer() if len(computed) == 1 else None
        if node is None:
            return None
        layer = AffineLayer.of(node)
        if layer is not None:
            return layer, rectified
        if node.op_type not in ("Relu", "Clip", *_VIEWS) or node.domain:
            return None
        rectified = rectified or node.op_type in ("Relu", "Clip")
        value = node.inputs[0]
    return None


def all_of(readers: Sequence[Reader], moments: Mapping[tuple[str, int], Float64]) -> bool:
    """Whether the moments of all readers are known."""
    return bool(readers) and all(reader.key in moments for reader in readers)
