"""Choose one offer per group: the least damage under budgets, or the least size or latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, final

from octavo.ir.budgets import parse_bytes, parse_count, parse_seconds
from octavo.ir.errors import UsageError
from octavo.ir.facts import Choice, Fact, Plan
from octavo.ir.menu import Menu, Sensitivity, Solution
from octavo.passes.base import Pass
from octavo.passes.planning import Planning

if TYPE_CHECKING:
    from octavo.ir.menu import Offer
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.programme import Programme
    from octavo.passes.solve import Answer

_RESOURCE = {"damage": "damage", "size": "bytes", "latency": "seconds"}
# Without a latency budget, a plan may be this much slower than the fastest that keeps the others.
_SLACK = 1.1


@final
@dataclass(frozen=True)
class Allocate(Pass):
    """Solve one 0/1 integer programme over all groups.

    **What it does.** Picks one offer per group so that the sum of damages is least while bytes,
    seconds, peak activation memory and bit operations keep to their budgets; or, with
    `objective`, so that size or latency is least while damage keeps to `max-damage`. Crossings
    between integer and float kernels cost what quantizing there costs.
    **Why.** Uniform bits spend bytes where they buy nothing (HAWQ-V3, arXiv 2011.10680).
    **When it does not apply.** Budgets that no plan keeps are refused with the nearest ones.
    **Cost and accuracy.** The gap to the optimum is proven and reported. With no `latency`, plans
    up to 1.1x slower than the fastest are allowed; `latency=none` lifts that.
    """

    name = "allocate"
    requires = (Menu, Sensitivity)
    produces = (Plan, Solution)
    preserves = (Fact,)

    objective: Literal["damage", "size", "latency"] = "damage"
    size: str = ""
    latency: str = ""
    memory: str = ""
    bops: str = ""
    max_damage: float | None = None
    gap: float = 1e-4
    seconds: float = 30.0
    top_k: int = 1
    pareto: int = 0

    def run(self, model: Model, ctx: PassContext) -> Model:
        from octavo.passes.solve import solve

        if not model.fact(Menu).offers:
            ctx.remark("note", "", "nothing to decide: the target offers no option for any node")
            return _undecided(model, self.objective, ctx)
        planning = Planning(model, ctx)
        full = planning.programme
        programme = full if self.memory else replace(full, memory_rows=())
        limits = self._limits(model, full)
        objective = _RESOURCE[self.objective]
        if "seconds" not in limits and self.latency != "none" and objective != "seconds":
            fastest = solve(
                _whole(programme), "seconds", limits, gap=1e-3, time_limit_seconds=self.seconds / 3
            )
            limits["seconds"] = _SLACK * fastest.totals["seconds"]
            ctx.remark("note", "", f"no --latency: at most {_SLACK}x the fastest plan's seconds")
        answers = self._answers(programme, objective, limits)
        curve = self._curve(programme, limits)
        ctx.count("groups", len(full.groups))
        ctx.count("dominated offers", answers[0].dominated)
        return self._decided(model, ctx, full, limits, answers, curve)

    def _decided(
        self,
        model: Model,
        ctx: PassContext,
        full: Programme,
        limits: Mapping[str, float],
        answers: tuple[Answer, ...],
        curve: tuple[Answer, ...],
    ) -> Model:
        """The model with the plan of the first answer, and how it was found."""
        best, menu = answers[0], model.fact(Menu)
        solution = Solution(
            status=best.status,
            objective=self.objective,
            gap=best.gap,
            seconds=sum(answer.seconds for answer in answers),
            solver=best.solver,
            limits=limits,
            totals=full.totals(best.choice),
            options=names_of(menu, best.choice),
            dominated=best.dominated,
            float_seconds=full.totals(dict.fromkeys(full.groups, 0))["seconds"],
            alternatives=tuple((a.totals, names_of(menu, a.choice)) for a in answers[1:]),
            curve=tuple(point.totals for point in curve),
        )
        plan = plan_of(menu, model.fact(Sensitivity), best.choice, ctx.cost.source)
        return model.with_fact(plan).with_fact(solution)

    def _limits(self, model: Model, programme: Programme) -> dict[str, float]:
        """The budgets as numbers; shares are of the source file and of the float plan."""
        whole = programme.totals(dict.fromkeys(programme.groups, 0))
        limits: dict[str, float] = {}
        if self.size:
            source = model.source.bytes or whole["bytes"]
            limits["bytes"] = float(int(parse_bytes(self.size, "size", source)))
        if self.latency and self.latency != "none":
            limits["seconds"] = parse_seconds(self.latency, "latency", whole["seconds"])
        if self.memory:
            limits["memory"] = parse_bytes(self.memory, "memory", whole["memory"])
        if self.bops:
            limits["bops"] = parse_count(self.bops, "bops", whole["bops"])
        if self.max_damage is not None:
            limits["damage"] = self.max_damage
        resource = _RESOURCE[self.objective]
        if resource in limits:
            message = f"{self.objective} cannot be both the objective and a budget"
            hint = "leave the budget out, or minimise something else"
            raise UsageError(message, hint=hint)
        if resource != "damage" and "damage" not in limits:
            message = f"the least {self.objective} needs a bound on the damage it may do"
            raise UsageError(message, hint="give --max-damage")
        return limits

    def _answers(
        self, programme: Programme, objective: str, limits: Mapping[str, float]
    ) -> tuple[Answer, ...]:
        from octavo.passes.pareto import top_k

        return top_k(
            programme, self.top_k, objective, limits,
            gap=self.gap, time_limit_seconds=self.seconds,
        )  # fmt: skip

    def _curve(self, programme: Programme, limits: Mapping[str, float]) -> tuple[Answer, ...]:
        from octavo.passes.pareto import pareto

        if not self.pareto:
            return ()
        others = {name: limit for name, limit in limits.items() if name != "damage"}
        each = self.seconds / self.pareto
        return pareto(
            programme, "bytes", self.pareto, others, gap=1e-3, time_limit_seconds=max(each, 1.0)
        )


def _whole(programme: Programme) -> Programme:
    """The programme with all widths whole: nobody asked to be faster than that."""
    groups = {
        name: tuple(c for c in of if not any(c.needs.values()))
        if name not in programme.needed
        else of[:1]
        for name, of in programme.groups.items()
    }
    return replace(programme, groups=groups)


def _undecided(model: Model, objective: str, ctx: PassContext) -> Model:
    """The plan of a model without groups."""
    totals = {"bytes": float(model.fact(Menu).fixed_bytes), "damage": 0.0, "seconds": 0.0}
    nothing = Solution("optimal", objective, 0.0, 0.0, "none", {}, totals, {})
    return model.with_fact(Plan({}, ctx.cost.source)).with_fact(nothing)


def names_of(menu: Menu, choice: Mapping[str, int]) -> dict[str, str]:
    """The name of the chosen offer, by group."""
    return {name: menu.offers[name][index].name for name, index in choice.items()}


def choice_of(menu: Menu, names: Mapping[str, str]) -> dict[str, int]:
    """The index of the named offer, by group."""
    known = {name: [offer.name for offer in offers] for name, offers in menu.offers.items()}
    return {name: known[name].index(offer) for name, offer in names.items()}


def plan_of(menu: Menu, found: Sensitivity, choice: Mapping[str, int], cost_source: str) -> Plan:
    """The option of every node that a choice decides, with what it costs as the reason."""
    choices: dict[str, Choice] = {}
    for name, index in choice.items():
        group, offers = menu.groups[name], menu.offers[name]
        if not group.nodes:
            continue
        offer = offers[index]
        seconds = {_method(o): o.seconds for o in (offers[0], offer)}
        damage = found.damage(name, offer.name).mean
        for node in group.nodes:
            reason = _reason(offer, damage, group.reason, len(offers))
            choices[node] = Choice(offer.options[node], reason, seconds)
    return Plan(choices, cost_source)


def _method(offer: Offer) -> str:
    return next(iter(offer.options.values())).method


def _reason(offer: Offer, damage: float, why: str, offers: int) -> str:
    if offers == 1:
        return why or "the target offers nothing else"
    together = f"; {why}" if why else ""
    return f"chosen of {offers} offers: {offer.bytes} bytes, damage {damage:.2e}{together}"
