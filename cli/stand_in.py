"""Random feeds in place of calibration data, for what needs inputs and got none."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.backends.bench import random_feed
from octavo.ir.calibration import samples_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.model import Model


@final
@dataclass(frozen=True)
class StandIn:
    """Feeds of random numbers that fit a model: `Batches` without labels."""

    feeds: tuple[Feed, ...]
    labels: NDArray[np.generic] | None = None

    @property
    def samples(self) -> int:
        return sum(map(samples_of, self.feeds))

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for feed in self.feeds:
            for name, array in sorted(feed.items()):
                digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.feeds)


def stand_in(
    model: Model, shapes: Mapping[str, Sequence[int]] | None = None, seed: int = 0, count: int = 8
) -> Batches:
    """`count` different random feeds, the same for the same model, shapes and seed.

    Raises UsageError where an input has no default feed (`random_feed`).
    """
    seeds = range(seed * count, (seed + 1) * count)
    return StandIn(tuple(random_feed(model, shapes, each) for each in seeds))
