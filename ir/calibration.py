"""Calibration data: a finite stream of named samples, read again as often as a pass needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

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
