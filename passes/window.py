"""The inputs that a convolution multiplies at every position, as rows of numbers (im2col)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]


@final
@dataclass(frozen=True)
class Window:
    """Kernel, strides, dilations and padding of a convolution, one entry per spatial axis.

    `pads` holds begins, then ends; they are found from the input where `auto_pad` says so.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"

    @staticmethod
    def of(node: onnx_ir.Node, kernel: tuple[int, ...]) -> Window:
        rank = len(kernel)
        read = node.attributes.get_ints
        return Window(
            kernel,
            tuple(read("strides", [1] * rank)),
            tuple(read("dilations", [1] * rank)),
            tuple(read("pads", [0] * 2 * rank)),
            node.attributes.get_string("auto_pad", "NOTSET"),
        )

    def columns(self, x: Float32, groups: int, limit: int, seed: int) -> Float32:
        """Of input `[B, C, ...]`: `[groups, samples, C/groups * kernel]`, samples as `drawn`."""
        seen = self._seen(x)
        rank = len(self.kernel)
        places = seen.shape[: rank + 1]
        picked = drawn(int(np.prod(places)), limit, seed)
        patches = seen[np.unravel_index(picked, places)]
        split = patches.reshape(len(picked), groups, -1)
        return np.ascontiguousarray(split.transpose(1, 0, 2))

    def _seen(self, x: Float32) -> Float32:
        """A view `[B, positions..., C, kernel...]` of the padded input."""
        rank = len(self.kernel)
        begins, ends = self._padding(x.shape[2:])
        padded = np.pad(x, [(0, 0), (0, 0), *zip(begins, ends, strict=True)])
        spatial = tuple(range(2, 2 + rank))
        view = np.lib.stride_tricks.sliding_window_view(padded, self._extents, spatial)
        steps = (slice(None, None, stride) for stride in self.strides)
        taps = (slice(None, None, dilation) for dilation in self.dilations)
        view = view[(slice(None), slice(None), *steps, *taps)]
        return np.moveaxis(view, 1, 1 + rank)

    @property
    def _extents(self) -> tuple[int, ...]:
        """What a dilated kernel covers."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    def _padding(self, sizes: tuple[int, ...]) -> tuple[list[int], list[int]]:
        rank = len(self.kernel)
        if self.auto_pad == "VALID":
            return [0] * rank, [0] * rank
        if self.auto_pad == "NOTSET":
            return list(self.pads[:rank]), list(self.pads[rank:])
        totals = [
            max(0, (-(-size // stride) - 1) * stride + extent - size)
            for size, stride, extent in zip(sizes, self.strides, self._extents, strict=True)
        ]
        halves = [total // 2 for total in totals]
        rests = [total - half for total, half in zip(totals, halves, strict=True)]
        return (halves, rests) if self.auto_pad == "SAME_UPPER" else (rests, halves)


def drawn(total: int, limit: int, seed: int) -> NDArray[np.int64]:
    """Positions of at most `limit` of `total` samples, in order; all where `limit` is 0."""
    if not limit or total <= limit:
        return np.arange(total)
    rng = np.random.default_rng([seed, total])
    return np.sort(rng.choice(total, limit, replace=False, shuffle=False))
