"""How many weights each layer keeps, so that the sum of distortions is least."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

_BINS = 2000


def least_distortion(
    kept: Sequence[Sequence[int]], distortion: Sequence[Sequence[float]], budget: int
) -> list[int] | None:
    """The level of every layer that minimises the sum of distortions within a budget.

    `kept[layer][level]` weights remain at a level, all layers together at most `budget`. Dynamic
    programming over the budget (Xu et al., ICCV 2023, "Efficient layer-adaptive pruning"), in
    2000 steps, to which every `kept` is rounded up; exact where the budget has no more steps.
    `None` where nothing fits.
    """
    unit = max(1, -(-budget // _BINS))
    room = budget // unit
    best = np.zeros(room + 1)
    taken = []
    for counts, lost in zip(kept, distortion, strict=True):
        tried = np.full((len(counts), room + 1), np.inf)
        for level, (count, loss) in enumerate(zip(counts, lost, strict=True)):
            size = -(-count // unit)
            if size <= room:
                tried[level, size:] = best[: room + 1 - size] + loss
        taken.append(tried.argmin(axis=0))
        best = tried.min(axis=0)
    if not np.isfinite(best[room]):
        return None
    levels, left = [], room
    for counts, choice in zip(reversed(kept), reversed(taken), strict=True):
        levels.append(int(choice[left]))
        left -= -(-counts[levels[-1]] // unit)
    return levels[::-1]
