"""Which scales a link gets: SmoothQuant's and AWQ's from activations, equalisation from weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from octavo.passes.scale_links import Link
    from octavo.passes.scaled_layers import Layer, Rounding

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]

ScaleMethod = Literal["auto", "smoothquant", "awq", "cle"]
# Channels scale by no more than this: beyond, float32 sums lose what the channel added.
_LARGEST = 1e4


@final
@dataclass(frozen=True)
class Found:
    """The best candidate of a link: its scale `[channels]`, a name, and errors before and after."""

    scale: Float64
    text: str
    before: float
    after: float


@final
@dataclass(frozen=True)
class Trial:
    """One link with its layers, and their weights while it is decided."""

    link: Link
    consumers: Sequence[Layer]
    producer: Layer | None
    rounding: Rounding
    rows: Mapping[int, Float32]

    @staticmethod
    def of(link: Link, layers: Mapping[int, Layer], rounding: Rounding) -> Trial:
        consumers = [layers[id(c.linear.node)] for c in link.consumers]
        linear = link.producer.linear
        producer = layers.get(id(linear.node)) if linear is not None else None
        involved = [*consumers, *([producer] if producer is not None else [])]
        rows = {id(layer): layer.rows for layer in involved}
        return Trial(link, consumers, producer, rounding, rows)

    def best(self, candidates: Iterator[tuple[str, Float64]]) -> Found:
        """The candidate with the least error; the scale of ones where none is better."""
        ones = np.ones(self.link.producer.channels)
        before = self.error(ones)
        best = Found(ones, "", before, before)
        for text, scale in candidates:
            after = self.error(scale)
            if after < best.after:
                best = Found(scale, text, before, after)
        return best

    def error(self, scale: Float64) -> float:
        """Sum of the relative output errors of all layers that the scale changes.

        With a scale per row, rounding commutes with the scale of a row: the producer's error
        stays as it is.
        """
        total = 0.0
        for consumer, layer in zip(self.link.consumers, self.consumers, strict=True):
            fed = layer.fed * self.link.spread(scale, consumer.labels)
            total += layer.error(self.rows[id(layer)], self.rounding, fed, layer.made)
        if self.rounding.per_tensor and self.producer is not None:
            layer = self.producer
            made = layer.made * scale
            total += layer.error(self.rows[id(layer)], self.rounding, layer.fed, made)
        return total

    def smoothquant(self, alpha: float) -> Iterator[tuple[str, Float64]]:
        """max|X|^alpha / max|W|^(1-alpha) (SmoothQuant, arXiv 2211.10438, equation 4)."""
        peaks = self._per_channel(lambda layer: layer.peak_magnitude() / layer.fed)
        weights = self._weight_ranges()
        yield f"smoothquant alpha={alpha:g}", self._settled(peaks**alpha, weights ** (1 - alpha))

    def awq(self, points: int) -> Iterator[tuple[str, Float64]]:
        """mean|X|^alpha / max|W|^beta with geometric mean 1, alpha and beta on a grid in [0, 1].

        AWQ (arXiv 2306.00978, equation 5) has beta = 0, its published code 1 - alpha too.
        """
        means = self._per_channel(lambda layer: layer.mean_magnitude() / layer.fed)
        weights = self._weight_ranges()
        exponents = [step / (points - 1) for step in range(points)]
        for alpha, beta in itertools.product(exponents, exponents):
            if alpha or beta:
                scale = self._settled(means**alpha, weights**beta)
                known = self.link.free & (means > 0) & (weights > 0)
                scale[known] /= np.exp(np.log(scale[known]).mean()) if np.any(known) else 1.0
                yield f"awq alpha={alpha:g} beta={beta:g}", scale

    def equalised(self) -> Iterator[tuple[str, Float64]]:
        """sqrt(r1 / r2), after which both ranges are sqrt(r1 r2) (DFQ, arXiv 1906.04721,
        equation 11: there s divides the first weight as well)."""
        if self.producer is not None:
            first = self.producer.largest(self.rows[id(self.producer)], 2)
            yield "equalised", self._settled(np.sqrt(first), np.sqrt(self._weight_ranges()))

    def _settled(self, above: Float64, below: Float64) -> Float64:
        """The ratio on free channels where both are positive, and 1 elsewhere."""
        usable = self.link.free & (above > 0) & (below > 0)
        ratio = np.divide(above, below, out=np.ones_like(above), where=usable)
        return np.clip(ratio, 1 / _LARGEST, _LARGEST)

    def _per_channel(self, measure: Callable[[Layer], Float64]) -> Float64:
        """The largest of what consumers measure, by channel of the producer."""
        found = np.zeros(self.link.producer.channels)
        for consumer, layer in zip(self.link.consumers, self.consumers, strict=True):
            mine = consumer.labels >= 0
            np.maximum.at(found, consumer.labels[mine], measure(layer)[mine])
        return found

    def _weight_ranges(self) -> Float64:
        return self._per_channel(lambda layer: layer.largest(self.rows[id(layer)], 1))
