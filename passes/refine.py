"""Search around the plan with its measured damage, because damages do not simply add."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.ir.cache import cache_key
from octavo.ir.calibration import Part, first_samples, samples_of
from octavo.ir.facts import Fact, Plan
from octavo.ir.menu import Menu, Sensitivity, Solution
from octavo.ir.versions import versions
from octavo.passes.allocate import choice_of, names_of, plan_of
from octavo.passes.base import Pass
from octavo.passes.evolve import Search, Space
from octavo.passes.joint_moves import JointMoves, methods_at
from octavo.passes.output_damage import Metric, OutputDamage, summary
from octavo.passes.planning import Planning
from octavo.passes.programme import keeps
from octavo.passes.rounded_model import RoundedModel
from octavo.passes.rounding import rounding_of, unseen
from octavo.passes.sample_macs import affordable_samples, sample_macs
from octavo.passes.starts import starts
from octavo.passes.swaps import swapped

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.evolve import Choice

    Array = NDArray[np.generic]

# Stages look at a quarter, a half and all of the data that is fitted to.
_SHARES = (0.25, 0.5, 1.0)
# Of one evaluation of a plan: about a second on two cores.
_MACS = 5e10


@final
@dataclass(frozen=True)
class Refine(Pass):
    """Move bytes between groups while the whole plan's measured output damage falls.

    **What it does.** `evolve` begins with the best of several plans: the given one, those of the
    damages' roots and those of the estimators in `starts`. It draws plans that keep to the budgets
    and evaluates each on half of the calibration data (EvoPress, arXiv 2410.14649). `swap` gives
    one group a level more and another one less, by their estimated damages (LampQ, arXiv
    2511.10004). Widths move as bits do; what goes is zero then, and its readers repaired by
    moments. The other half of the data decides: the plan found replaces the one the search
    began with where it saves more than one standard error.
    **Why.** Errors of several layers cancel or compound, which no sum of damages knows.
    **When it does not apply.** No group has two levels that round activations alike, or there
    is no data: a note.
    **Cost and accuracy.** Bounded by `seconds`, in which the estimators are not counted; the best
    plan so far is always kept. Where the search ended is remembered, so that the same cache gives
    the same plan.
    """

    name = "refine"
    requires = (Menu, Sensitivity, Plan, Solution)
    produces = (Plan, Solution)
    preserves = (Fact,)

    method: Literal["evolve", "swap"] = "evolve"
    seconds: float = 20.0
    offspring: int = 16
    generations: int = 60
    samples: int = 256
    metric: Metric = "auto"
    starts: tuple[str, ...] = ("fisher", "lampq")

    def run(self, model: Model, ctx: PassContext) -> Model:
        batches = _batches(model, ctx)
        menu, solution = model.fact(Menu), model.fact(Solution)
        start = choice_of(menu, solution.options)
        levels = levels_of(menu, start)
        movable = {**levels, **{name: range(len(menu.offers[name])) for name in menu.widths}}
        if batches is None or len(movable) < 2 or self.seconds <= 0:
            ctx.remark("note", "", "nothing to refine: no data, or fewer than two groups to move")
            return model
        limits = hard_limits(solution)
        moves = JointMoves(menu) if menu.widths else None
        space = Space(movable, partial(_feasible, Planning(model, ctx), limits), moves)
        # A width changes the weights of groups that have no other offer.
        fed = [n for n, group in menu.groups.items() if group.nodes] if menu.widths else levels
        trial = Trials.of(model, ctx, batches, self._fewer(model, ctx, batches), list(fed))
        key = self._key(model, batches, start, levels)
        ends = _known(ctx, key, menu) or self._search(space, trial, ctx, start, model)
        if ctx.cache is not None:
            ctx.cache.put(key, json.dumps([names_of(menu, end) for end in ends]).encode())
        first, last = ends
        saved = summary(trial.final(first) - trial.final(last))
        best = last if saved.mean > saved.standard_error else first
        before, after = (float(trial.final(choice).mean()) for choice in (start, best))
        ctx.count("plans evaluated", trial.evaluated)
        ctx.remark(
            "missed" if best == start else "applied", "",
            f"measured damage on held-out samples: {before:.3e} before, {after:.3e} after",
            before=before, after=after,
        )  # fmt: skip
        if best == start:
            return model
        totals = Planning(model, ctx).programme.totals(best)
        found = replace(solution, options=names_of(menu, best), totals=totals)
        plan = plan_of(menu, model.fact(Sensitivity), best, model.fact(Plan).source)
        return model.with_fact(plan).with_fact(found)

    def _fewer(self, model: Model, ctx: PassContext, batches: Batches) -> Refine:
        """On a large model with fewer samples: a search needs some hundred evaluations."""
        macs = sample_macs(model, ctx, batches)
        return replace(self, samples=affordable_samples(macs, _MACS, self.samples, least=8))

    def _key(
        self, model: Model, batches: Batches, start: Choice, levels: Mapping[str, list[int]]
    ) -> str:
        """What the search depends on; its end depends on the clock, so it is remembered."""
        menu, solution = model.fact(Menu), model.fact(Solution)
        parts = (
            model.fingerprint, batches.sha256, repr(self), repr(sorted(levels.items())),
            repr(sorted(names_of(menu, start).items())), repr(sorted(solution.limits.items())),
            repr(sorted(versions().items())), rounding_of(model),
        )  # fmt: skip
        return cache_key("refine", *parts)

    def _search(
        self, space: Space, trial: Trials, ctx: PassContext, start: Choice, model: Model
    ) -> tuple[Choice, Choice]:
        """The plan that a search begins with, and where it ends."""
        if self.method == "swap":
            damages = _estimates(model)
            fitness = partial(trial.fitness, stage=2)
            return start, swapped(space, damages, fitness, start, self.seconds)
        first = self._best_start(trial, ctx, start, model, levels_of(model.fact(Menu), start))
        search = Search(
            space, trial.fitness, ctx.rng("refine"),
            offspring=self.offspring, generations=self.generations, seconds=self.seconds,
        )  # fmt: skip
        return first, search.run(first, partial(ctx.progress, "refine"))

    def _best_start(
        self,
        trial: Trials,
        ctx: PassContext,
        start: Choice,
        model: Model,
        levels: Mapping[str, Sequence[int]],
    ) -> Choice:
        """The plan that measures best, on all data: so few cannot be fitted to it."""
        batches = _batches(model, ctx)
        assert batches is not None
        limits = hard_limits(model.fact(Solution))
        # A model too large to be measured is too large for gradients of 64 samples.
        small = model.fact(Sensitivity).estimator != "scaled-error" and not model.fact(Menu).widths
        names = self.starts if small else ()
        others = starts(model, ctx, batches, names, self.metric, levels, limits, start)
        known = {"the plan": start, **dict(others)}
        measured = ctx.executor.map(trial.damage_of, known.values())
        values = dict(zip(known, measured, strict=True))
        best = min(values, key=values.__getitem__)
        text = ", ".join(f"{name} {value:.3e}" for name, value in values.items())
        ctx.remark("note", "", f"begins with {best}; measured damages: {text}")
        return known[best]


def hard_limits(solution: Solution) -> dict[str, float]:
    """What every other plan must keep: the budgets, and what was minimised if not damage."""
    limits = {name: limit for name, limit in solution.limits.items() if name != "damage"}
    least = {"size": "bytes", "latency": "seconds"}.get(solution.objective)
    return limits if least is None else {**limits, least: solution.totals[least]}


def _batches(model: Model, ctx: PassContext) -> Batches | None:
    batches = ctx.calibration or ctx.stand_in
    return None if batches is None else unseen(model, batches)


def _known(ctx: PassContext, key: str, menu: Menu) -> tuple[Choice, Choice] | None:
    """Where the same search began and ended before."""
    stored = ctx.cache.get(key) if ctx.cache is not None else None
    if stored is None:
        return None
    first, last = json.loads(stored)
    return choice_of(menu, first), choice_of(menu, last)


def levels_of(menu: Menu, choice: Choice) -> dict[str, list[int]]:
    """Offers a group may move between: those that compute as the chosen one, by rising bytes.

    Widths stay.
    """
    levels, widths = {}, menu.widths
    for name, index in choice.items():
        if name in widths:
            continue
        offers = menu.offers[name]
        alike = [
            k for k, offer in enumerate(offers) if methods_at(offer) == methods_at(offers[index])
        ]
        if len(alike) > 1:
            levels[name] = sorted(alike, key=lambda k: (offers[k].bytes, k))
    return levels


@final
@dataclass
class Trials:
    """Measures the damage of choices on two halves of the data: one to fit, one to decide."""

    model: RoundedModel
    damage: OutputDamage
    ctx: PassContext
    fit: Sequence[tuple[Feed, Mapping[str, Array]]]
    choose: Sequence[tuple[Feed, Mapping[str, Array]]]
    evaluated: int = 0
    known: dict[tuple[tuple[tuple[str, int], ...], int], float] = field(default_factory=dict)

    @staticmethod
    def of(
        model: Model, ctx: PassContext, batches: Batches, options: Refine, groups: list[str]
    ) -> Trials:
        damage = OutputDamage.of(model, options.metric)
        run = ctx.evaluator.load(model)

        def referenced(index: int) -> list[tuple[Feed, Mapping[str, Array]]]:
            feeds = first_samples(Part(batches, index), max(1, options.samples // 2))
            return [(f, {n: a for n, a in run(f).items() if n in damage.kinds}) for f in feeds]

        rounded = RoundedModel.of(model, ctx, groups)
        return Trials(rounded, damage, ctx, referenced(0), referenced(1))

    def fitness(self, choices: Sequence[Choice], stage: int) -> Sequence[float]:
        """Damage of each choice on the stage's share of the fitted half."""
        count = max(1, round(_SHARES[min(stage, 2)] * len(self.fit)))
        keys = [(tuple(sorted(choice.items())), count) for choice in choices]
        new = {key: c for key, c in zip(keys, choices, strict=True) if key not in self.known}
        measure = partial(self._measured, self.fit[:count])
        self.known |= dict(zip(new, self.ctx.executor.map(measure, new.values()), strict=True))
        self.evaluated += len(new)
        return [self.known[key] for key in keys]

    def damage_of(self, choice: Choice) -> float:
        """Mean damage of a choice on both halves."""
        return float(self._per_sample([*self.fit, *self.choose], choice).mean())

    def final(self, choice: Choice) -> NDArray[np.float64]:
        """Damage of a choice per sample of the half that decides."""
        return self._per_sample(self.choose, choice)

    def _measured(self, data: Sequence[tuple[Feed, Mapping[str, Array]]], choice: Choice) -> float:
        return float(self._per_sample(data, choice).mean())

    def _per_sample(
        self, data: Sequence[tuple[Feed, Mapping[str, Array]]], choice: Choice
    ) -> NDArray[np.float64]:
        weights = self.model.weights(choice)
        rows = [
            self.damage.per_sample(reference, self.model.run({**feed, **weights}), samples_of(feed))
            for feed, reference in data
        ]
        return np.concatenate(rows)


def _feasible(planning: Planning, limits: Mapping[str, float], choice: Choice) -> bool:
    return keeps(planning.programme.totals(choice), limits)


def _estimates(model: Model) -> dict[str, list[float]]:
    menu, found = model.fact(Menu), model.fact(Sensitivity)
    return {
        name: [found.damage(name, offer.name).mean for offer in offers]
        for name, offers in menu.offers.items()
    }
