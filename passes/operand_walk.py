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

    @staticmethod
    def of(
        model: Model, ctx: PassContext, feeds: Sequence[Feed], values: Iterable[str]
    ) -> OperandWalk:
        """A walk along values, none of which depends on a later one."""
        made = {v.name or "": node for node in model.graph for v in node.outputs}
        names = [name for name in dict.fromkeys(values) if name in made]
        by_value: dict[str, Segment] = {}
        given: set[str] = set()
        for name, found in zip(names, segments(model, [made[n] for n in names]), strict=True):
            given.update(found.gives)
            by_value[name] = found if name in given else _with_value(found, name)
        return OperandWalk(Walk(model, ctx.evaluator, feeds, ctx.workdir), by_value)

    def reach(self, value: str) -> None:
        """Compute a value for every feed, unless it is an input."""
        if value in self.by_value:
            self.walk.step(self.by_value[value])

    def leave(self, value: str) -> None:
        """Forget what nobody reads any more."""
        if value in self.by_value:
            self.walk.leave(self.by_value[value])


def _with_value(segment: Segment, name: str) -> Segment:
    """A segment that also gives a later output of its node, which no later segment reads."""
    return replace(segment, gives=(*segment.gives, name), drops=(*segment.drops, name))
