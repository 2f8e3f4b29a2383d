"""Moves of a search among plans with widths: a width takes along all offers that need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from octavo.ir.menu import Menu, Offer
    from octavo.passes.evolve import Choice


@final
@dataclass(frozen=True)
class JointMoves:
    """What a group may become, given what the others are."""

    menu: Menu

    def rungs(self, choice: Choice, group: str) -> Sequence[int]:
        """Indices of offers from small to large: all widths, or offers that compute alike.

        Offers alike have the same methods and widths, whatever their ranks.
        """
        offers = self.menu.offers[group]
        if group in self._widths:
            return range(len(offers) - 1, -1, -1)
        own = methods_at(offers[choice[group]])
        alike = [k for k, offer in enumerate(offers) if methods_at(offer) == own]
        return sorted(alike, key=lambda k: (offers[k].bytes, k))

    def moved(self, choice: Choice, group: str, index: int) -> dict[str, int]:
        """The choice with another offer of a group, and with the others at its width."""
        made = {**choice, group: index}
        if group not in self._widths:
            return made
        width = self.menu.offers[group][index].name
        for reader in self._readers[group]:
            offer = self.menu.offers[reader][choice[reader]]
            made[reader] = self._known[reader, _key(offer, {group: width})]
        return made

    @cached_property
    def _widths(self) -> frozenset[str]:
        return frozenset(self.menu.widths)

    @cached_property
    def _readers(self) -> Mapping[str, Sequence[str]]:
        """The groups whose offers need a width."""
        return {
            width: [n for n, of in self.menu.offers.items() if any(width in o.needs for o in of)]
            for width in self.menu.widths
        }

    @cached_property
    def _known(self) -> Mapping[tuple[str, object], int]:
        return {
            (name, _key(offer, {})): index
            for name, offers in self.menu.offers.items()
            for index, offer in enumerate(offers)
            if not offer.ranks
        }


def methods_at(offer: Offer) -> tuple[object, ...]:
    """What is the same of offers that round activations alike at the same widths."""
    methods = (option.method for option in offer.options.values())
    return (*methods, *sorted(offer.needs.items()))


def _key(offer: Offer, needs: Mapping[str, str]) -> object:
    """Options and widths; a layer that was of lower rank is whole where a width moves."""
    options = tuple(sorted((n, str(o)) for n, o in offer.options.items()))
    return options, tuple(sorted({**offer.needs, **needs}.items()))
