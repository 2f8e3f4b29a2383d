"""Seconds that a plan is predicted to take: its nodes, and the quantizers at its borders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.ir.facts import FLOAT
from octavo.passes.chains import find_chains

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir

    from octavo.ir.evaluate import CostModel
    from octavo.ir.facts import Plan
    from octavo.ir.model import Model
    from octavo.ir.target import Target
    from octavo.passes.chains import Chain


def predicted_seconds(model: Model, plan: Plan, cost: CostModel, target: Target) -> float:
    """Seconds of one run of a plan, `Plan({}, "")` for the float model.

    `model` is the graph the plan was made for, before fake quantizers. Nodes that a static
    kernel absorbs take no time; an option that the target has no kernel for counts as float.
    """
    chains = find_chains(model, target)
    static = [chain for name, chain in chains.items() if plan.method(name) == "static"]
    absorbed = {member.name for chain in static for member in chain.members[1:]}
    total = 0.0
    for node in model.graph:
        if node.name in absorbed:
            continue
        choice = plan.by_node.get(node.name or "")
        seconds = cost.option_seconds(node, choice.option) if choice is not None else None
        total += cost.option_seconds(node, FLOAT) or 0.0 if seconds is None else seconds
    return total + sum(cost.boundary_seconds(value) for value in _borders(static))


def _borders(static: list[Chain]) -> Iterator[onnx_ir.Value]:
    """Values that are quantized or dequantized on their way, once for each way."""
    made = {value for chain in static for value in chain.outputs}
    read = dict.fromkeys(v for c in static for v in c.operands if v.const_value is None)
    readers = {member.name for chain in static for member in chain.members}
    yield from (value for value in read if value not in made)
    for chain in static:
        for value in chain.outputs:
            leaves = value.is_graph_output() or any(
                use.node.name not in readers for use in value.uses()
            )
            # A kernel that can write float does, where no other reads its codes.
            if leaves and not (chain.row.output == "either" and value not in read):
                yield value
