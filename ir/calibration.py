"""Calibration data: a finite stream of named samples, read again as often as a pass needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Feed = Mapping[str, "NDArray[np.generic]"]


class Batches(Protocol):
    """Calibration feeds, one or more samples each; iterating twice gives the same feeds."""

    @property
    def samples(self) -> int:
        """How many samples all feeds hold together."""

    @property
    def sha256(self) -> str:
        """Digest of every sample, names, shapes and dtypes included."""

    @property
    def labels(self) -> NDArray[np.generic] | None:
        """One label per sample where the data has them."""

    def __iter__(self) -> Iterator[Feed]: ...


@final
@dataclass(frozen=True)
class Part:
    """Every `of`-th feed of other data, from the `index`-th on; its samples keep their labels.

    With `rest` all feeds but those. Parts of one source share no sample. Data of a single feed
    cannot be divided: all parts are the whole of it.
    """

    source: Batches
    index: int
    of: int = 2
    rest: bool = False

    @property
    def divided(self) -> bool:
        """Whether the parts differ."""
        return sum(1 for _ in zip(self.source, range(self.of), strict=False)) == self.of

    @property
    def samples(self) -> int:
        return sum(map(samples_of, self))

    @property
    def sha256(self) -> str:
        name = "all but part" if self.rest else "part"
        return f"{self.source.sha256} {name} {self.index} of {self.of}"

    @property
    def labels(self) -> NDArray[np.generic] | None:
        labels = self.source.labels
        if labels is None or not self.divided:
            return labels
        kept: list[int] = []
        start = 0
        for at, feed in enumerate(self.source):
            stop = start + samples_of(feed)
            if self._has(at):
                kept.extend(range(start, stop))
            start = stop
        return labels[kept]

    def __iter__(self) -> Iterator[Feed]:
        if not self.divided:
            yield from self.source
            return
        for at, feed in enumerate(self.source):
            if self._has(at):
                yield feed

    def _has(self, at: int) -> bool:
        return (at % self.of == self.index) != self.rest


def samples_of(feed: Feed) -> int:
    """How many samples a feed holds: the size of its first axis."""
    shape = next((array.shape for array in feed.values() if array.ndim), (1,))
    return int(shape[0])


def first_samples(batches: Batches, limit: int) -> Iterator[Feed]:
    """Feeds until they hold `limit` samples; the first one always."""
    seen = 0
    for feed in batches:
        if seen and seen + samples_of(feed) > limit:
            return
        seen += samples_of(feed)
        yield feed
