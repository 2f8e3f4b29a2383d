"""Run a model from operand to operand: every node once a feed, little alive at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from octavo.passes.layer_walk import Walk, segments

if TYPE_CHECKING:
    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.layer_walk import Segment


@final
@dataclass(frozen=True)
class OperandWalk:
    """A model on its way from one value to the next; graph inputs are known from the start.

    Values are reached in the order they were given in, and read from `walk` until they are left.
    """

    walk: Walk
    by_value: Mapping[str, Segment]
    last: frozenset[str]

    @staticmethod
    def of(
        model: Model, ctx: PassContext, feeds: Sequence[Feed], values: Iterable[str]
    ) -> OperandWalk:
        """A walk along values, none of which depends on a later one."""
        makers = {v.name or "": node for node in model.graph for v in node.outputs}
        by_maker: dict[str, list[str]] = {}
        for name in dict.fromkeys(values):
            if name in makers:
                by_maker.setdefault(makers[name].name or "", []).append(name)
        stops = [makers[names[0]] for names in by_maker.values()]
        by_value: dict[str, Segment] = {}
        for names, found in zip(by_maker.values(), segments(model, stops), strict=True):
            by_value |= dict.fromkeys(names, _with_values(found, names))
        last = frozenset(names[-1] for names in by_maker.values())
        walk = Walk(model, ctx.evaluator, feeds, ctx.executor, ctx.workdir)
        return OperandWalk(walk, by_value, last)

    def reach(self, value: str) -> None:
        """Compute a value for every feed, unless it is an input."""
        if value in self.by_value:
            self.walk.step(self.by_value[value])

    def leave(self, value: str) -> None:
        """Forget what nobody reads any more, once the last value of its node is left."""
        if value in self.last:
            self.walk.leave(self.by_value[value])


def _with_values(segment: Segment, names: Sequence[str]) -> Segment:
    """A segment that also gives outputs of its node that no later segment reads."""
    more = tuple(name for name in names if name not in segment.gives)
    return replace(segment, gives=(*segment.gives, *more), drops=(*segment.drops, *more))
