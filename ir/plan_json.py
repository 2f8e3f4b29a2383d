"""What was decided between, as the part of plan.json that a plan for the whole graph adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.ir.menu import Menu, Sensitivity, Solution

Json = dict[str, object]


def solution_json(solution: Solution) -> Json:
    """Status, gap, budgets, totals, the curve and further plans."""
    return {
        "status": solution.status,
        "objective": solution.objective,
        "solver": solution.solver,
        "gap": solution.gap,
        "seconds": solution.seconds,
        "float_seconds": solution.float_seconds,
        "dominated_offers": solution.dominated,
        "limits": dict(solution.limits),
        "totals": dict(solution.totals),
        "curve": [dict(point) for point in solution.curve],
        "alternatives": [
            {"totals": dict(totals), "options": dict(options)}
            for totals, options in solution.alternatives
        ],
    }


def groups_json(menu: Menu, sensitivity: Sensitivity, solution: Solution) -> list[Json]:
    """Every group with its offers: bytes, seconds, bit operations, damage, and the chosen one."""
    return [
        {
            "name": name,
            "nodes": list(group.nodes),
            "reason": group.reason,
            "role": group.role,
            "chosen": solution.options[name],
            "offers": [
                {
                    "option": offer.name,
                    "bytes": offer.bytes,
                    "seconds": offer.seconds,
                    "bops": offer.bops,
                    "damage": (found := sensitivity.damage(name, offer.name)).mean,
                    "standard_error": found.standard_error,
                }
                for offer in menu.offers[name]
            ],
        }
        for name, group in menu.groups.items()
    ]


def planning_json(menu: Menu, sensitivity: Sensitivity, solution: Solution) -> Json:
    """All of it, with how damage and seconds were found."""
    return {
        "solution": solution_json(solution),
        "estimator": sensitivity.estimator,
        "metric": sensitivity.metric,
        "samples": sensitivity.samples,
        "cost_source": menu.cost_source,
        "groups": groups_json(menu, sensitivity, solution),
    }
