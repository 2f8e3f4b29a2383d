"""Inputs that no one collected: feeds made from a model alone, and how far to trust them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.ir.calibration import samples_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.facts import Ranges

# Where calibration data comes from. `real` is what a user hands over without another name.
Origin = Literal[
    "real",
    "synthetic-bn",
    "synthetic-attention",
    "generated-text",
    "sampled-text",
    "sampled",
    "analytic",
]

# The method of ranges that rest on no data.
ANALYTIC = "analytic"


@final
@dataclass(frozen=True)
class Trust:
    """How far feeds may be trusted, from 0 to 1, and the parts it is made of, each from 0 to 1."""

    value: float
    parts: Mapping[str, float]

    @property
    def text(self) -> str:
        """The number and its parts, for people."""
        parts = ", ".join(f"{name} {part:.2f}" for name, part in self.parts.items())
        return f"{self.value:.2f} ({parts})"


@final
@dataclass(frozen=True)
class Synthetic:
    """Feeds with their origin: `Batches` without labels.

    Feeds of one `groups` entry were made together, independently of the others. `distance` is
    that of their statistics from the stored ones, NaN where there are none.
    """

    feeds: tuple[Feed, ...]
    origin: Origin
    groups: tuple[int, ...] = ()
    distance: float = float("nan")
    notes: tuple[str, ...] = ()
    trust: Trust | None = None
    labels: NDArray[np.generic] | None = field(default=None)

    @property
    def samples(self) -> int:
        return sum(map(samples_of, self.feeds))

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for feed in self.feeds:
            for name, array in sorted(feed.items()):
                digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know, as other calibration data has it."""
        return self.notes

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.feeds)


def origin_of(batches: Batches | None, ranges: Ranges | None) -> str:
    """Where data or ranges come from, for the manifest; nothing where there are none."""
    if batches is None:
        return ANALYTIC if ranges is not None and ranges.method == ANALYTIC else ""
    return str(getattr(batches, "origin", "real"))
