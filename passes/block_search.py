"""Which blocks to remove: the set that saves enough and does least damage, by beam search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Path = tuple[str, ...]
_SLACK = 1e-9


@final
@dataclass(frozen=True)
class BlockSearch:
    """Sets of blocks grow one by one; those that did least for what they save grow on.

    `saves` by block, all above 0; `damage` measures a model without some blocks. Of every set,
    the `tries` of the other blocks that did least for what they save when removed alone are
    tried; `beam` sets grow on.
    """

    saves: Mapping[str, float]
    damage: Callable[[Path], float]
    tries: int
    beam: int
    progress: Callable[[int, int], None] = lambda done, total: None
    known: dict[frozenset[str], float] = field(default_factory=dict)

    def least(self, goal: float) -> Path:
        """Blocks that together save `goal`, in the order in which they were chosen."""
        grown: Sequence[Path] = [()]
        ended: list[Path] = []
        while grown:
            found = {frozenset(path): path for path in self._longer(grown)}
            new = [path for key, path in found.items() if key not in self.known]
            total = len(self.known) + len(new)
            for path in new:
                self.known[frozenset(path)] = self.damage(path)
                self.progress(len(self.known), total)
            ended += [path for path in found.values() if self._enough(path, goal)]
            open_ = [path for path in found.values() if not self._enough(path, goal)]
            grown = sorted(open_, key=self._price)[: self.beam]
        return min(ended, key=self.total)

    def total(self, path: Path) -> float:
        """The damage of a set that was measured."""
        return self.known[frozenset(path)]

    def _longer(self, paths: Sequence[Path]) -> list[Path]:
        found = []
        for path in paths:
            others = [name for name in self.saves if name not in path]
            if path:
                others = sorted(others, key=lambda name: self._price((name,)))[: self.tries]
            found += [(*path, name) for name in others]
        return found

    def _price(self, path: Path) -> float:
        return self.total(path) / sum(self.saves[name] for name in path)

    def _enough(self, path: Path, goal: float) -> bool:
        return sum(self.saves[name] for name in path) >= goal * (1 - _SLACK)
