"""Place activation quantizers where the planned integer kernels need them, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

import networkx as nx

from octavo.ir.facts import Fact, Placement, Plan, Range, Ranges, Site
from octavo.ir.quant import QuantSpec
from octavo.passes.base import Pass, Statistic
from octavo.passes.chains import find_chains

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.chains import Chain


_ALIKE = 0.5


@final
@dataclass(frozen=True)
class PlaceQuantizers(Pass):
    """Decide at which values the integer kernels of the plan quantize, and who shares scales.

    **What it does.** Marks the operands of every static kernel, and its output where the kernel
    exists only with one or another static kernel reads it. An absorbed Relu or Clip moves the
    quantizer behind it and pins zero to the lowest code; data movement shares its input's scale.
    **Why.** A missing output quantizer, a quantizer between Conv and Relu, or two scales around a
    Reshape each turn an integer kernel into a float one with run-time dequantization.
    **When it does not apply.** Nodes that the plan does not make static.
    **Cost and accuracy.** Changes nothing by itself.
    """

    name = "place-quantizers"
    requires = (Plan,)
    produces = (Placement,)
    preserves = (Fact,)

    def statistics(self, model: Model, ctx: PassContext) -> tuple[Statistic, ...]:
        """Ranges of what the planned kernels read and write, where the plan is made already."""
        plan = model.find(Plan)
        chains = _static(model, plan, ctx).values() if plan is not None else ()
        values = (v for chain in chains for v in (*chain.operands, *chain.outputs))
        names = dict.fromkeys(v.name or "" for v in values if v.const_value is None)
        return tuple(Statistic("range", name) for name in names)

    def run(self, model: Model, ctx: PassContext) -> Model:
        static = _static(model, model.fact(Plan), ctx)
        draft = _Draft(ctx.target.activation_dtype, ctx.target.half_scales)
        for chain in static.values():
            draft.place(chain)
        for chain in static.values():
            draft.constrain(chain)
        draft.share(static.values(), model.find(Ranges))
        if ctx.target.unsigned_where_positive:
            draft.unsign(model.find(Ranges))
        consumers = _consumers(model, draft.sites, static)
        fused = {m.name or "": c.head.name or "" for c in static.values() for m in c.members[1:]}
        ctx.count("quantizers", len(draft.sites))
        ctx.count("absorbed activations and biases", len(fused))
        return model.with_fact(Placement(draft.sites, consumers, fused))


def _static(model: Model, plan: Plan, ctx: PassContext) -> dict[str, Chain]:
    chains = find_chains(model, ctx.target)
    return {name: chain for name, chain in chains.items() if plan.method(name) == "static"}


@dataclass
class _Draft:
    dtype: str
    half_scales: bool
    sites: dict[str, Site] = field(default_factory=dict)

    def place(self, chain: Chain) -> None:
        """Quantizers a chain cannot do without."""
        for value in chain.operands:
            self._add(value)
        if chain.row.output == "quantized":
            for value in chain.outputs:
                self._add(value)

    def constrain(self, chain: Chain) -> None:
        """What the chain's absorbed activation or operator says about its output's range."""
        name = chain.output.name or ""
        site = self.sites.get(name)
        if site is None:
            return
        if chain.nonnegative:
            site = replace(site, nonnegative=True, clip_high=chain.clip_high)
        if chain.row.fixed_range is not None:
            site = replace(site, fixed=chain.row.fixed_range)
        self.sites[name] = site

    def share(self, chains: Iterable[Chain], ranges: Ranges | None) -> None:
        """Give every value that data movement connects the parameters of one group."""
        graph = nx.Graph()
        for chain in chains:
            names = [v.name or "" for v in (*chain.outputs, *chain.operands)]
            placed = [name for name in names if name in self.sites]
            if chain.row.same_params:
                nx.add_path(graph, placed)
            elif chain.row.variadic and ranges is not None:
                nx.add_path(graph, self._alike(placed, ranges))
        for group in nx.connected_components(graph):
            root = min(group, key=list(self.sites).index)
            sites = [self.sites[name] for name in group]
            highs = [s.clip_high for s in sites if s.clip_high is not None]
            for site in sites:
                self.sites[site.value] = replace(
                    site,
                    group=root,
                    nonnegative=any(s.nonnegative for s in sites),
                    clip_high=min(highs, default=None),
                    fixed=next((s.fixed for s in sites if s.fixed), None),
                )

    def unsign(self, ranges: Ranges | None) -> None:
        """Give groups that hold no negative value all codes above zero."""
        known = ranges.by_value if ranges is not None else {}
        below = {s.group for s in self.sites.values() if _negative(s, known.get(s.value))}
        for name, site in self.sites.items():
            if site.group not in below:
                spec = replace(site.spec, dtype="u8", symmetric=False)
                self.sites[name] = replace(site, spec=spec)

    def _alike(self, names: list[str], ranges: Ranges) -> list[str]:
        """Operands of a Concat whose grid may be its output's: then their codes are copied.

        The output is named first. An operand that fills less than half of the output's range
        would lose more than a bit, and one that a Clip bounds would bound the others.
        """
        known = [(name, ranges.by_value[name]) for name in names if name in ranges.by_value]
        if not known or known[0][0] != names[0]:
            return []
        width = known[0][1].high - known[0][1].low
        alike = [name for name, r in known if r.high - r.low >= _ALIKE * width]
        sites = [self.sites[name] for name in alike]
        bounded = any((s.clip_high or math.inf) < math.inf or s.fixed for s in sites)
        pinned = any(s.nonnegative for s in sites)
        mixed = pinned and any(ranges.by_value[name].low < 0 for name in alike)
        return [] if bounded or mixed else alike

    def _add(self, value: onnx_ir.Value) -> None:
        name = value.name or ""
        if name not in self.sites:
            signed = self.dtype == "s8"
            spec = QuantSpec("s8" if signed else "u8", symmetric=signed)
            spec = replace(spec, half_scales=self.half_scales)
            self.sites[name] = Site(name, spec, name)


def _negative(site: Site, known: Range | None) -> bool:
    """Whether a value that is quantized may be below zero."""
    if site.fixed is not None:
        return site.fixed[0] < 0
    return not site.nonnegative and (known is None or known.low < 0)


def _consumers(
    model: Model, sites: Mapping[str, Site], static: Mapping[str, Chain]
) -> dict[str, tuple[str, ...]]:
    """Static readers read the quantized value; all readers do where only codes are computed.

    Nodes in the bodies of If, Loop and Scan count as readers of the values they capture.
    """
    made_static = {v.name for chain in static.values() for v in chain.outputs}
    consumers: dict[str, list[str]] = {name: [] for name in sites}
    for node in model.graph.all_nodes():
        name = node.name or ""
        operands = {v.name for v in static[name].operands} if name in static else set()
        for value in dict.fromkeys(v for v in node.inputs if v is not None):
            if value.name in sites and (value.name in made_static or value.name in operands):
                consumers[value.name or ""].append(name)
    return {name: tuple(readers) for name, readers in consumers.items()}
