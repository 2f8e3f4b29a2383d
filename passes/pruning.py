"""What both pruning passes do: choose groups, allocate, repair, remove and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, final

from octavo.ir.axis_groups import alternatives
from octavo.ir.errors import GoalNotMet, UsageError
from octavo.ir.reference import with_original
from octavo.passes.patterns import chosen, select
from octavo.passes.prune_allocation import Work, allocate, offers
from octavo.passes.prune_units import Pruner, Repair

if TYPE_CHECKING:
    from octavo.ir.axis_groups import AxisGroup, Kind, Refusal
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.prune_allocation import Width
    from octavo.passes.prune_ranking import Score

Of = Literal["units", "macs", "parameters"]

# Samples that damage of a single group is measured on.
_MEASURED_SAMPLES = 128


@final
@dataclass(frozen=True)
class Pruning:
    """One run of a pruning pass, by its options."""

    name: str
    kinds: tuple[Kind, ...]
    ratio: float
    of: Of
    score: Score
    repair: Repair
    round_to: int
    offers: int
    samples: int
    only: tuple[str, ...]
    keep: tuple[str, ...]

    def run(self, model: Model, ctx: PassContext) -> Model:
        """The smaller model, in which every layer behind what is gone is repaired.

        Raises UsageError for options that cannot work, and GoalNotMet where nothing or not
        enough can go.
        """
        self._check()
        score, repair = self._with_data(ctx)
        pruner = Pruner.of(model, ctx, score, repair, self.samples)
        for refusal in pruner.refused:
            ctx.remark("missed", refusal.layer, _why(refusal))
        names = _first_of_alternatives(ctx, pruner, self._names(model, pruner))
        kept = self._kept(model, ctx, pruner, names)
        removed = {name: pruner.removed(name, count) for name, count in kept.items()}
        smaller = pruner.pruned(removed)
        pruner.cut(smaller, removed)
        work = self._work(model, ctx, pruner)
        for name, count in kept.items():
            group = pruner.groups[name]
            ctx.count("units removed", group.units - count)
            text = f"{count} of {group.units} {_UNITS[group.kind]} stay"
            ctx.remark("applied", name.partition("#")[0], text, kept=count, units=group.units)
        share = work.left(kept) / max(work.total, 1)
        what = "parameters" if self.of == "parameters" else "multiply-accumulates"
        ctx.remark("note", "", f"{share:.1%} of the {what} are left", left=share)
        return with_original(smaller, model)

    def _work(self, model: Model, ctx: PassContext, pruner: Pruner) -> Work:
        if self.of == "parameters":
            return Work.parameters(model, pruner.groups)
        return Work.of(model, ctx, pruner.groups)

    def _check(self) -> None:
        where = f"{self.name}{{ratio={self.ratio:g}}}"
        if not 0 < self.ratio < 1:
            message = f"a ratio of {self.ratio:g} does not lie between 0 and 1"
            hint = "ratio=0.5 removes half; leave the pass out to remove nothing"
            raise UsageError(message, where=where, hint=hint)
        if self.round_to < 1 or self.offers < 1 or self.samples < 1:
            message = "round-to, offers and samples must be at least 1"
            raise UsageError(message, where=where)

    def _with_data(self, ctx: PassContext) -> tuple[Score, Repair]:
        """Score and repair as asked, or what is possible without calibration data."""
        if ctx.calibration is not None:
            return self.score, self.repair
        score: Score = "magnitude" if self.score in ("taylor", "kprune") else self.score
        repair: Repair = "closed-form" if self.repair == "least-squares" else self.repair
        if (score, repair) != (self.score, self.repair):
            ctx.remark("note", "", f"no calibration data: score is {score}, repair {repair}")
        return score, repair

    def _names(self, model: Model, pruner: Pruner) -> list[str]:
        """The groups that may shrink, by the patterns; an error for one that cannot."""
        nodes = {node.name for node in chosen(model, self.only, self.keep)}
        kept, wanted = select(model, self.keep), select(model, self.only)
        layers = {name: set(group.layers) for name, group in pruner.groups.items()}
        found = []
        for name, group in pruner.groups.items():
            if group.kind not in self.kinds or not layers[name] & nodes:
                continue
            protected = sorted(layers[name] & set(kept))
            asked = sorted(layers[name] & set(wanted))
            if protected and asked:
                raise _contradiction(group, asked[0], protected[0], wanted, kept)
            if not protected:
                found.append(name)
        if not found:
            raise self._nothing(model, pruner, wanted)
        return found

    def _nothing(self, model: Model, pruner: Pruner, wanted: Mapping[str, str]) -> GoalNotMet:
        relevant = [r for r in pruner.refused if not wanted or r.layer in wanted]
        reasons = Counter(_why(refusal) for refusal in relevant or pruner.refused)
        why = "; ".join(reason for reason, _ in reasons.most_common(3))
        if not wanted and any(group.kind in self.kinds for group in pruner.groups.values()):
            why = "keep names a layer of everything that could go"
        elif not why or "channels" not in self.kinds:
            why = f"no layer has {' or '.join(map(_UNITS.__getitem__, self.kinds))} of its own"
        return GoalNotMet(
            f"{self.name} finds nothing that could be removed",
            where=model.source.name,
            why=why,
            hint="octavo inspect lists the layers" if not self.keep else "keep fewer layers",
        )

    def _kept(
        self, model: Model, ctx: PassContext, pruner: Pruner, names: Sequence[str]
    ) -> dict[str, int]:
        found = offers(pruner, names, self.round_to, self.offers, _MEASURED_SAMPLES, 1 - self.ratio)
        for name in [name for name in names if not found[name]]:
            text = f"{pruner.groups[name].units} units are no more than round-to={self.round_to}"
            ctx.remark("missed", name.partition("#")[0], text)
            del found[name]
        if not found:
            raise GoalNotMet(
                f"{self.name} finds no layer wider than {self.round_to}",
                where=model.source.name,
                hint="round-to=1 removes single units",
            )
        if self.of != "units":
            work = self._work(model, ctx, pruner)
            kept = allocate(
                found,
                {name: pruner.groups[name].units for name in found},
                lambda some: 1 - work.left(some) / max(work.total, 1),
                self.ratio,
            )
            return self._enough(kept, model)
        result: dict[str, int] = {}
        for alike in _classes(pruner, found):
            units = {name: pruner.groups[name].units for name in alike}
            some = {name: found[name] for name in alike}
            share = partial(_unit_share, units)
            most = share({name: min(w.kept for w in offered) for name, offered in some.items()})
            if most < self.ratio:
                text = f"no more than {most:.0%} can go of the {sum(units.values())} units alike"
                ctx.remark("missed", alike[0].partition("#")[0], text)
            part = allocate(some, units, share, min(self.ratio, most))
            result |= self._enough(part, model)
        return result

    def _enough(self, kept: dict[str, int] | None, model: Model) -> dict[str, int]:
        if kept is None:
            raise GoalNotMet(
                f"{self.name} cannot remove {self.ratio:.0%} of the {self.of}",
                where=model.source.name,
                why="what may go leaves more",
                hint="give a smaller ratio or round-to",
            )
        return kept


_UNITS: Mapping[Kind, str] = {
    "channels": "channels",
    "heads": "heads",
    "dimensions": "dimensions of heads",
}


def _first_of_alternatives(ctx: PassContext, pruner: Pruner, names: Sequence[str]) -> list[str]:
    """Groups that divide no axis in two ways."""
    found: list[str] = []
    for name in names:
        group = pruner.groups[name]
        other = next((n for n in found if alternatives(group, pruner.groups[n])), "")
        if other:
            text = f"its {group.units} {_UNITS[group.kind]} are an alternative to '{other}'"
            ctx.remark("missed", name.partition("#")[0], text)
        else:
            found.append(name)
    return found


def _classes(pruner: Pruner, found: Mapping[str, Sequence[Width]]) -> list[list[str]]:
    """Groups of the same structure, whose units compare."""
    classes: dict[tuple[object, ...], list[str]] = {}
    for name in found:
        classes.setdefault(pruner.groups[name].signature, []).append(name)
    return list(classes.values())


def _unit_share(units: Mapping[str, int], kept: Mapping[str, int]) -> float:
    """The share of all units that goes when some groups keep fewer."""
    return sum(units[name] - count for name, count in kept.items()) / sum(units.values())


def _why(refusal: Refusal) -> str:
    at = f" at '{refusal.node}'" if refusal.node and refusal.node != refusal.layer else ""
    return f"its outputs stay: {refusal.reason}{at}"


def _contradiction(
    group: AxisGroup,
    asked: str,
    protected: str,
    wanted: Mapping[str, str],
    kept: Mapping[str, str],
) -> UsageError:
    return UsageError(
        f"'{wanted[asked]}' is to be pruned and '{kept[protected]}' to be kept",
        where=f"nodes '{asked}' and '{protected}'",
        why=f"their channels can only go together ({group.units} units)",
        hint="leave one of them out of the patterns",
    )
