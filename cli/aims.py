"""What the next plan aims at, by what the file of the last one took."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from octavo.ir.budgets import parse_seconds

NO_LIMIT = "none"
# Bytes below a size budget that the next plan aims at: names and tables vary by less.
MARGIN_BYTES = 64
# What files may take of a latency budget whose seconds are known to 1 %, and what a plan aims at.
_KEPT, _AIM = 0.99, 0.97
# Files that take less of the latency budget leave some of it unused.
_UNUSED = 0.95
# Scales of the latency budget this close to each other lead to files that time alike.
_CLOSE = 1.02


@final
@dataclass
class Aims:
    """Budgets of the next plan: `size` in bytes, and a latency that is scaled.

    A file that is larger or slower than its budget tightens the next aim by as much; one that is
    faster than asked loosens it, where its plan used all that it was given. Between a scale whose
    file `kept` to the latency and one whose file `broke` it, the next aim lies in the middle.
    """

    size: float | None
    latency: str
    scale: float = 1.0
    kept: float = 0.0
    broke: float = math.inf

    @property
    def scaled(self) -> str:
        """The latency that the next plan is given; "" and "none" are no budgets."""
        if self.latency in ("", NO_LIMIT) or self.scale == 1.0:
            return self.latency
        whole = parse_seconds(self.latency, "--latency", 1.0)
        relative = self.latency.strip().endswith(("x", "%"))
        return f"{whole * self.scale:.9f}{'x' if relative else 's'}"

    @property
    def open(self) -> bool:
        """Whether scales are left between what kept to the latency and what broke it."""
        return self.broke > self.kept * _CLOSE

    def keeps(self, over: float, share: float) -> bool:
        """Whether a file keeps to both budgets, however the noise of its latency falls."""
        return over <= 0 and share <= _KEPT

    def tighten(self, over: float, share: float) -> None:
        """Aim lower after a file with so many bytes too many and so much of the latency."""
        if over > 0 and self.size is not None:
            self.size -= over + MARGIN_BYTES
        if share > _KEPT:
            self.broke = min(self.broke, self.scale)
            self._move(share)

    def loosen(self, share: float, used: float) -> bool:
        """Aim higher after a file that keeps to both budgets; whether that is worth a plan.

        `share` is what the file took of the latency, `used` what its plan took of its own.
        """
        self.kept = max(self.kept, self.scale)
        if not 0 < share < _UNUSED or used < _UNUSED:
            return False
        self._move(share)
        return self.open

    def _move(self, share: float) -> None:
        wanted = self.scale * _AIM / share
        inside = self.kept < wanted < self.broke
        self.scale = wanted if inside else math.sqrt(self.kept * self.broke)
