"""A menu with widths: every offer at every width of what its nodes read and give."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, final

from octavo.ir.facts import FLOAT, HalfConstants
from octavo.ir.menu import Damage, Group, Menu, Offer, Sensitivity
from octavo.passes.groups import weight_row, weight_source
from octavo.passes.offer_bytes import offer_bytes
from octavo.passes.planning import Planning
from octavo.passes.prune_allocation import Work

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.facts import Option
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.rank_offers import RankOffers
    from octavo.passes.width_seconds import WidthSeconds
    from octavo.passes.width_shapes import Kept

    Terms = Sequence[tuple[str, Option]]

# A node that more widths touch is counted as if the others stayed whole.
_MOST_WIDTHS = 2
_SUFFIX = "#width"
_NONE = "0 of "


def width_name(axis_group: str) -> str:
    """The decision on the units of an axis group."""
    return axis_group + _SUFFIX


def _is_gone(offer: Offer) -> bool:
    """Whether an offer is for nodes that go with a width of nothing."""
    return any(width.startswith(_NONE) for width in offer.needs.values())


def width_text(kept: int, units: int) -> str:
    """The offer of a width."""
    return f"{kept} of {units}"


@final
@dataclass(frozen=True)
class WidthOffers:
    """Makes a menu with widths of one without.

    `branches` are the nodes that go with a group where none of its units stays.
    """

    model: Model
    ctx: PassContext
    seconds: WidthSeconds
    levels: Mapping[str, Sequence[int]]
    damages: Mapping[str, Mapping[int, float]]
    branches: Mapping[str, Collection[str]]
    ranks: RankOffers | None = None

    def with_widths(self) -> Model:
        """The model whose menu offers all options at all widths, and the widths themselves."""
        menu, found = self.model.fact(Menu), self.model.fact(Sensitivity)
        groups = {
            width_name(name): Group(width_name(name), (), "these axes shrink together", "width")
            for name in self.levels
        }
        offers = {width_name(name): tuple(self._widths(name)) for name in self.levels}
        by_group = {
            width_name(name): {width_text(k, some[0]): Damage(self.damages[name][k]) for k in some}
            for name, some in self.levels.items()
        }
        for name, group in menu.groups.items():
            made = [pair for base in self._useful(name) for pair in self._at_widths(base)]
            damages = {
                offer.name: Damage(0.0) if _is_gone(offer) else found.damage(name, base.name)
                for offer, base in made
            }
            groups[name], offers[name] = group, tuple(offer for offer, _ in made)
            for base in self._useful(name):
                for offer, lost in self._at_ranks(name, base):
                    offers[name] = (*offers[name], offer)
                    own = found.damage(name, base.name)
                    damages[offer.name] = replace(own, mean=own.mean + lost)
            by_group[name] = damages
        whole = sum(self._own_bytes(name, self.levels[name][0]) for name in self.levels)
        size, seconds = menu.fixed_bytes - whole, self._fixed_seconds
        wide = Menu(groups, offers, size, menu.cost_source, seconds)
        return self.model.with_fact(wide).with_fact(replace(found, by_group=by_group))

    def _widths(self, name: str) -> Iterator[Offer]:
        """The offers of a width: what it costs in nodes and constants that no other group has."""
        units, *_ = some = self.levels[name]
        for kept in some:
            seconds = sum(
                self.seconds.seconds(node, FLOAT, {name: kept}) or 0.0
                for node in self._free.get(name, ())
                if kept or node not in self.branches.get(name, ())
            )
            size = self._own_bytes(name, kept)
            yield Offer(width_text(kept, units), {}, size, seconds)

    def _at_ranks(self, group: str, base: Offer) -> Iterator[tuple[Offer, float]]:
        """An offer with lower ranks, all widths whole, and the damage that adds."""
        if self.ranks is None:
            return
        whole = {name: self.levels[name][0] for name in self._touching(base)}
        needs = {width_name(n): width_text(k, k) for n, k in whole.items()}
        heads = self._total(list(base.options.items()), {})
        for offer, lost in self.ranks.offers(group, base, heads):
            yield replace(offer, needs=needs), lost

    def _touching(self, base: Offer) -> list[str]:
        """The widths that an offer is made for."""
        found = dict.fromkeys(
            name
            for node, _ in self._terms(base)
            for name in self.seconds.shapes.touching.get(node, ())
        )
        return list(found)[:_MOST_WIDTHS]

    def _at_widths(self, base: Offer) -> Iterator[tuple[Offer, Offer]]:
        """An offer at all widths of what its nodes touch, and the offer itself."""
        terms, names = self._terms(base), self._touching(base)
        for counts in itertools.product(*(self.levels[name] for name in names)):
            at = dict(zip(names, counts, strict=True))
            kept = {name: k for name, k in at.items() if k < self.levels[name][0]}
            needs = {width_name(n): width_text(k, self.levels[n][0]) for n, k in at.items()}
            text = f"{base.name} @{'x'.join(map(str, counts))}" if kept else base.name
            own = self._shrunk(base, terms, kept) if kept else base
            yield replace(own, name=text, needs=needs), base

    def _shrunk(self, base: Offer, terms: Terms, kept: Kept) -> Offer:
        """An offer with the costs it has at some widths."""
        if not all(kept.values()):
            return replace(base, bytes=0, seconds=0.0, bops=0.0, integer=False)
        shapes = self.seconds.shapes
        size = offer_bytes(self._nodes, base.options, self.ctx.target, shapes.shapes(kept))
        share = self._total(terms, kept) / max(self._total(terms, {}), 1e-12)
        macs = self._macs(base, kept) / max(self._macs(base, {}), 1)
        return replace(base, bytes=size, seconds=base.seconds * share, bops=base.bops * macs)

    def _total(self, terms: Terms, kept: Kept) -> float:
        return sum(self.seconds.seconds(node, option, kept) or 0.0 for node, option in terms)

    def _macs(self, base: Offer, kept: Kept) -> float:
        return sum(self._work.left_of(node, kept) for node in base.options)

    def _terms(self, offer: Offer) -> Terms:
        """The nodes whose seconds an offer holds, with their options."""
        found = []
        for name, option in offer.options.items():
            found.append((name, option))
            if option.method != "static" and name in self._planning.chains:
                members = self._planning.chains[name].members[1:]
                found += [(member.name or "", FLOAT) for member in members]
        return found

    @cached_property
    def _planning(self) -> Planning:
        return Planning(self.model, self.ctx)

    @cached_property
    def _nodes(self) -> Mapping[str, onnx_ir.Node]:
        return {node.name or "": node for node in self.model.graph}

    @cached_property
    def _work(self) -> Work:
        return Work.of(self.model, self.ctx, self.seconds.shapes.groups)

    @cached_property
    def _free(self) -> Mapping[str, Sequence[str]]:
        """Nodes that no group decides, by the first width that touches them or takes them along."""
        found: dict[str, list[str]] = {}
        for name in self._nodes.keys() - self._planning.owner.keys():
            touching = self.seconds.shapes.touching.get(name, ())
            touching = touching or tuple(n for n, of in self.branches.items() if name in of)
            if touching:
                found.setdefault(touching[0], []).append(name)
        return {name: sorted(some) for name, some in found.items()}

    @property
    def _fixed_seconds(self) -> float:
        """Seconds of nodes that neither a group nor a width decides."""
        counted = {node for some in self._free.values() for node in some} | set(
            self._planning.owner
        )
        rest = (node for name, node in self._nodes.items() if name not in counted)
        return sum(self.ctx.cost.option_seconds(node, FLOAT) or 0.0 for node in rest)

    def _own_bytes(self, name: str, kept: int) -> int:
        """Bytes of constants outside of groups that this width is the first to divide."""
        shapes = self.seconds.shapes
        return sum(
            math.prod(shapes.shape(tensor, shape, {name: kept})) * self._item_bytes(tensor)
            for tensor, shape in shapes.constants.items()
            if tensor not in self._weights and shapes.dividing(tensor)[0] == name
        )

    @cached_property
    def _weights(self) -> set[str]:
        """Constants whose bytes offers count."""
        rows = ((n, weight_row(n, self.ctx.target)) for n in self._nodes.values())
        grouped = self.model.fact(Menu).group_of()
        sources = (
            weight_source(node.inputs[index])
            for node, row in rows
            if row is not None and node.name in grouped
            for index in row.weights
        )
        return {source.name or "" for source in sources if source is not None}

    def _item_bytes(self, tensor: str) -> int:
        halved = self.model.find(HalfConstants)
        if halved is not None and tensor in halved.names:
            return 2
        value = self.model.graph.initializers[tensor]
        return int(value.const_value.dtype.itemsize) if value.const_value is not None else 0

    def _useful(self, name: str) -> list[Offer]:
        """Offers of a group that no other beats at full widths in all that counts."""
        offers, found = self.model.fact(Menu).offers[name], self.model.fact(Sensitivity)

        def numbers(offer: Offer) -> tuple[float, ...]:
            damage = found.damage(name, offer.name).mean
            return (damage, offer.bytes, offer.seconds, offer.bops)

        def beats(other: Offer, offer: Offer, earlier: bool) -> bool:
            mine, theirs = numbers(offer), numbers(other)
            no_worse = all(a <= b for a, b in zip(theirs, mine, strict=True))
            return no_worse and other.integer == offer.integer and (theirs != mine or earlier)

        return [
            offer
            for at, offer in enumerate(offers)
            if not at or not any(beats(o, offer, k < at) for k, o in enumerate(offers) if k != at)
        ]
