"""The codes that integer kernels multiply: those of a weight, or their multiples in blocks.

Kernels that take one scale per channel get int8 codes `(q - z) · m` of a weight whose scales are
multiples (`ir/multiples.py`). A file holds q in its few bits with z and m in 4 bits each, and
standard operators multiply when a runtime loads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.ir.multiples import block_axes, channel_axis, most_multiple
from octavo.ir.packing import Step, steps
from octavo.ir.quant import PerAxis, PerBlock, QuantParams, QuantSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

# Numbers of four bits: where blocks have zero points, and by what their codes are multiplied.
ZEROS, MULTIPLES = onnx_ir.DataType.INT4, onnx_ir.DataType.UINT4
_INT8, _INT32 = onnx_ir.DataType.INT8, onnx_ir.DataType.INT32


def kernel_spec(spec: QuantSpec) -> QuantSpec:
    """The spec of the codes that a kernel multiplies for a weight of `spec`, itself for most."""
    if not spec.multiples:
        return spec
    channels = PerAxis(channel_axis(_blocks(spec).axis))
    return QuantSpec("s8", channels, symmetric=True, half_scales=True)


def kernel_params(params: QuantParams) -> QuantParams:
    """The parameters of the codes that a kernel multiplies: one scale per channel."""
    if not params.spec.multiples:
        return params
    unit = channel_unit(params).reshape(-1)
    return QuantParams(kernel_spec(params.spec), unit, np.zeros(unit.shape, np.int32))


def free_scales(params: QuantParams) -> tuple[int, ...]:
    """The shape of the factors that scales may change by: one a channel for multiples."""
    return channel_unit(params).shape if params.spec.multiples else params.scale.shape


def block_arrays(params: QuantParams) -> Mapping[str, NDArray[np.generic]]:
    """Multiples, and zero points of a grid that has them, as codes split into blocks read them."""
    if not params.spec.multiples:
        return {}
    axis = _blocks(params.spec).axis + 1
    multiples = np.rint(params.scale / channel_unit(params))
    found = {"multiples": np.expand_dims(multiples, axis).astype(MULTIPLES.numpy())}
    if not params.spec.symmetric:
        found["zeros"] = np.expand_dims(params.zero_point, axis).astype(ZEROS.numpy())
    return found


def block_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
    """The shape of `block_arrays` of a weight of `shape`."""
    axis, size = _blocks(spec).axis, _blocks(spec).size
    return (*shape[:axis], shape[axis] // size, 1, *shape[axis + 1 :])


def kernel_steps(shape: tuple[int, ...], spec: QuantSpec) -> tuple[Step, ...]:
    """The operators from the packed codes of a weight of `shape` to those its kernel multiplies.

    The last one makes them. Beyond the parts they read `block_arrays`, by name.
    """
    made = steps(shape, spec)
    if not spec.multiples:
        return made
    axis, size = _blocks(spec).axis, _blocks(spec).size
    split = (*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
    centring = (
        Step("Cast", ("zeros",), "wide_zeros", _INT32),
        Step("Sub", ("split", "wide_zeros"), "centred"),
    )
    return (
        *made,
        Step("Cast", (made[-1].output,), "wide", _INT32),
        Step("Reshape", ("wide", split), "split"),
        *(() if spec.symmetric else centring),
        Step("Cast", ("multiples",), "wide_multiples", _INT32),
        Step("Mul", ("split" if spec.symmetric else "centred", "wide_multiples"), "multiplied"),
        Step("Cast", ("multiplied",), "narrow", _INT8),
        Step("Reshape", ("narrow", shape), "joined"),
    )


def channel_unit(params: QuantParams) -> NDArray[np.float32]:
    """The scale of every channel, whose multiples are those of blocks: axes of length 1."""
    axes = block_axes(_blocks(params.spec).axis, params.scale.ndim)
    largest = params.scale.max(axis=axes, keepdims=True)
    return np.asarray(
        largest / np.float32(most_multiple(params.spec.bits, params.spec.symmetric)), np.float32
    )


def _blocks(spec: QuantSpec) -> PerBlock:
    assert isinstance(spec.granularity, PerBlock)
    return spec.granularity
