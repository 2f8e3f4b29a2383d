"""The integer programme of a model: what its menu, damages and graph say, as numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

from octavo.ir.facts import FLOAT
from octavo.ir.menu import Menu, Sensitivity
from octavo.passes.chains import find_chains, static_values
from octavo.passes.programme import Border, Candidate, MemoryRow, Programme

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.chains import Chain

_FLOAT_BYTES, _CODE_BYTES = 4, 1


@final
@dataclass(frozen=True)
class Planning:
    """A model with a menu and damages, and the programme they make."""

    model: Model
    ctx: PassContext

    @cached_property
    def programme(self) -> Programme:
        menu, found = self.model.fact(Menu), self.model.fact(Sensitivity)
        index = {n: {o.name: k for k, o in enumerate(menu.offers[n])} for n in menu.widths}
        groups = {}
        for name, offers in menu.offers.items():
            quantizers = self._quantizer_damage(menu.groups[name].nodes, found)
            groups[name] = tuple(
                Candidate(
                    found.damage(name, offer.name).mean + (quantizers if offer.integer else 0.0),
                    {"bytes": offer.bytes, "seconds": offer.seconds, "bops": offer.bops},
                    offer.integer,
                    {name: index[name][width] for name, width in offer.needs.items()},
                )
                for offer in offers
            )
        fixed = {"bytes": menu.fixed_bytes, "seconds": self._fixed_seconds}
        return Programme(groups, fixed, tuple(self._borders()), tuple(self._memory_rows()))

    @cached_property
    def chains(self) -> Mapping[str, Chain]:
        """Chains whose group has an integer offer; no other can be static."""
        menu = self.model.fact(Menu)
        possible = {
            node
            for name, offers in menu.offers.items()
            if any(offer.integer for offer in offers)
            for node in menu.groups[name].nodes
        }
        found = find_chains(self.model, self.ctx.target)
        return {name: chain for name, chain in found.items() if name in possible}

    @cached_property
    def owner(self) -> Mapping[str, str]:
        """The group that decides a node, absorbed nodes included, by node name."""
        of_node = self.model.fact(Menu).group_of()
        for head, chain in self.chains.items():
            of_node |= {m.name or "": of_node[head] for m in chain.members}
        return of_node

    @property
    def _fixed_seconds(self) -> float:
        """Seconds of the nodes that no group decides."""
        known = self.model.fact(Menu).fixed_seconds
        if known is not None:
            return known
        free = (node for node in self.model.graph if node.name not in self.owner)
        return sum(self.ctx.cost.option_seconds(node, FLOAT) or 0.0 for node in free)

    def _quantizer_damage(self, nodes: tuple[str, ...], found: Sensitivity) -> float:
        """Half the damage of the quantizers of what static kernels read and write.

        The other half belongs to the kernel on the other side; between two of them it is whole.
        """
        values = {
            value.name or "": value
            for name in nodes
            if name in self.chains
            for value in (*self.chains[name].operands, *self._written(self.chains[name]))
        }
        known = (found.by_value.get(name) for name in values)
        return sum(damage.mean for damage in known if damage is not None) / 2

    def _written(self, chain: Chain) -> tuple[onnx_ir.Value, ...]:
        return chain.outputs if chain.row.output == "quantized" else ()

    def _borders(self) -> list[Border]:
        values = set(static_values(self.model, self.ctx.target))
        made = [*self.model.graph.inputs, *(v for n in self.model.graph for v in n.outputs)]
        return [self._border(value) for value in made if value.name in values]

    def _border(self, value: onnx_ir.Value) -> Border:
        producer = value.producer()
        maker = self.owner.get(producer.name or "") if producer is not None else None
        head = self._writers.get(id(value))
        readers: list[str | None] = [self.owner.get(n.name or "") for n in value.consumers()]
        if value.is_graph_output() or not readers:
            readers.append(None)
        seconds = self.ctx.cost.boundary_seconds(value)
        if head is None or head.row.output != "either":
            return Border(maker, tuple(readers), seconds, seconds)
        # Its kernel writes floats where they are read anyway, and codes are then made of them.
        return Border(None if None in readers else maker, tuple(readers), seconds, 0.0)

    def _memory_rows(self) -> list[MemoryRow]:
        """Activation bytes alive while each node runs; integer groups write one byte for four."""
        nodes = list(self.model.graph)
        last: dict[int, int] = {}
        for at, node in enumerate(nodes):
            last |= {id(v): at for v in (*node.inputs, *node.outputs) if v is not None}
        last |= {id(value): len(nodes) for value in self.model.graph.outputs}
        alive = {id(v): v for v in self.model.graph.inputs if id(v) in last}
        rows: dict[tuple[tuple[str, float], ...], float] = {}
        for at, node in enumerate(nodes):
            alive |= {id(value): value for value in node.outputs}
            constant, saved = self._live(list(alive.values()))
            key = tuple(sorted(saved.items()))
            rows[key] = max(rows.get(key, 0.0), constant)
            alive = {key: value for key, value in alive.items() if last[key] > at}
        return [MemoryRow(constant, dict(key)) for key, constant in rows.items()]

    def _live(self, values: list[onnx_ir.Value]) -> tuple[float, dict[str, float]]:
        constant = 0.0
        saved: dict[str, float] = defaultdict(float)
        for value in values:
            elements = self.ctx.cost.elements(value)
            constant += elements * _FLOAT_BYTES
            producer = value.producer()
            group = self.owner.get(producer.name or "") if producer is not None else None
            if group is not None and self._writes_codes(value):
                saved[group] += elements * (_FLOAT_BYTES - _CODE_BYTES)
        return constant, dict(saved)

    def _writes_codes(self, value: onnx_ir.Value) -> bool:
        chain = self._writers.get(id(value))
        return chain is not None and chain.row.output == "quantized"

    @cached_property
    def _writers(self) -> Mapping[int, Chain]:
        """The chain that computes a value, by the value's id."""
        return {
            id(value): chain
            for chain in self.chains.values()
            for member in chain.members
            for value in member.outputs
        }
