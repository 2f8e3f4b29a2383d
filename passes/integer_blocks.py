"""Which weights integer kernels multiply in blocks: scales are multiples of their channel's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.mapped import reading
from octavo.ir.quant import PerBlock, QuantSpec, signed_type

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.target import KernelRow, Target

# Two levels have no zero between them, and multiples of six bits are hardly any in a byte. Those of
# five have room for four, with zero points; without, for eight.
_BITS = (2, 3, 4, 5)
_WITHOUT_ZEROS = 5
_BYTE = 8
# A channel's scale is at most this part of its largest magnitude; float16 below is subnormal.
_LEAST_MAGNITUDE = 127 * 2.0**-14


def integer_blocks(
    row: KernelRow, node: onnx_ir.Node, bits: int, size: int, target: Target
) -> QuantSpec | None:
    """The spec of a weight in blocks of `size`, multiplied as bytes with a scale per channel.

    `None` where the kernel takes none, a channel is not several whole blocks, float16 does not hold
    its scale, or others read the weight, whose grid would be another.
    """
    if size not in row.blocks or bits not in _BITS or target.weight_bits < _BYTE:
        return None
    weight = node.inputs[row.weights[0]]
    tensor = weight.const_value if weight is not None and len(weight.uses()) == 1 else None
    if tensor is None or tensor.shape.rank() < 2:
        return None
    length = tensor.shape.numpy()[1 - row.weight_axis]
    if length <= size or length % size:
        return None
    if not _LEAST_MAGNITUDE <= reading(tensor, _largest) <= np.finfo(np.float16).max:
        return None
    blocks = PerBlock(1 - row.weight_axis, size)
    even = bits >= _WITHOUT_ZEROS
    return QuantSpec(signed_type(bits), blocks, even, half_scales=True, multiples=True)


def _largest(array: NDArray[np.floating]) -> float:
    return float(np.abs(array).max(initial=0.0))
