"""Scales per channel moved from activations into weights, where the graph computes the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np

from octavo.ir.errors import UsageError
from octavo.ir.facts import Norms, QuantizedInput
from octavo.ir.reference import Original
from octavo.passes.base import Pass
from octavo.passes.layer_columns import estimate_power, sample_columns
from octavo.passes.patterns import select
from octavo.passes.scale_edits import accept, layers_of, overflow, write_scales
from octavo.passes.scale_links import find_links
from octavo.passes.scale_search import ScaleMethod, Trial
from octavo.passes.scaled_layers import Rounding

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from octavo.ir.facts import Fact
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.scale_links import Link
    from octavo.passes.scale_search import Float64, Found
    from octavo.passes.scaled_layers import Layer

_MAX_SWEEPS = 10
_SETTLED = 1e-2


@final
@dataclass(frozen=True)
class FoldScales(Pass):
    """Give channels scales that make rounding hurt less, without changing what is computed.

    **What it does.** Divides an output channel of a normalization or linear operator by s and
    multiplies the weights that read it by s; operators in between only pass positive scales.
    Candidates for s: `smoothquant`, `awq` (powers of mean activation and largest weight, `grid`
    exponents for each) and `cle` (equal weight ranges, no data); `auto` tries awq and cle. The
    one that leaves the least output error after rounding to `bits` stays, if it beats no scale.
    **Why.** Large activations make the errors of their few weights count most.
    **When it does not apply.** A channel has a reader that changes with scale (a sum with
    something else, Clip, Gelu, a shared weight); the remark names it. Without data only ranges
    and normalizations tell how large activations are.
    **Cost and accuracy.** A rounded copy of each weight per candidate. Exact up to float
    rounding.
    """

    name = "fold-scales"
    produces: ClassVar[tuple[type[Fact], ...]] = (Norms,)
    preserves: ClassVar[tuple[type[Fact], ...]] = (QuantizedInput, Original)

    method: ScaleMethod = "auto"
    bits: int = 4
    block: int = 0
    per_tensor: bool = False
    activation_bits: int = 0
    alpha: float = 0.5
    grid: int = 5
    samples: int = 64
    rows: int = 256
    only: tuple[str, ...] = ()

    def run(self, model: Model, ctx: PassContext) -> Model:
        self._check()
        chosen = select(model, self.only)
        links, missed = find_links(model.graph)
        if self.only:
            links = [link for link in links if chosen.keys() & _names(link)]
            missed = {name: text for name, text in missed.items() if name in chosen}
        for name, text in missed.items():
            ctx.remark("missed", name, f"no scale: {text}")
        layers = layers_of(links)
        self._observe(model, ctx, links, layers)
        scales = self._search(ctx, links, layers)
        for at, (_, found) in scales.items():
            _report(ctx, links[at], found)
        totals = {at: scale for at, (scale, _) in scales.items()}
        return write_scales(model, ctx, totals, links, layers)

    def _check(self) -> None:
        for name, value, low, high in (
            ("bits", self.bits, 2, 8),
            ("activation-bits", self.activation_bits, 0, 8),
            ("alpha", self.alpha, 0.0, 1.0),
            ("grid", self.grid, 2, 100),
            ("samples", self.samples, 1, 1 << 30),
            ("rows", self.rows, 1, 1 << 30),
            ("block", self.block, 0, 1 << 30),
        ):
            if not low <= value <= high:
                message = f"{name} is {value}"
                raise UsageError(message, where=self.name, hint=f"from {low} to {high}")

    def _observe(
        self, model: Model, ctx: PassContext, links: Sequence[Link], layers: dict[int, Layer]
    ) -> None:
        """Give every layer samples of what it reads, or a guess where there is no data."""
        if ctx.calibration is None and links:
            ctx.remark("note", "", "no calibration data: the sizes of activations are guessed")
        reading = {id(consumer.linear.node) for link in links for consumer in link.consumers}
        used = [layer for key, layer in layers.items() if key in reading or self.per_tensor]
        sample_columns(model, ctx, used, self.samples, self.rows)
        if any(layer.columns is None for layer in used):
            estimate_power(links, layers)

    def _search(
        self, ctx: PassContext, links: Sequence[Link], layers: dict[int, Layer]
    ) -> dict[int, tuple[Float64, Found]]:
        """The product of the scales of every link that got one, and what was found last."""
        rounding = Rounding(self.bits, self.block, self.per_tensor, self.activation_bits)
        scales: dict[int, tuple[Float64, Found]] = {}
        for sweep in range(_MAX_SWEEPS if self.method in ("auto", "cle") else 1):
            moved = 0.0
            for at, link in enumerate(links):
                trial = Trial.of(link, layers, rounding)
                found = trial.best(self._candidates(trial, sweep))
                ctx.progress("fold-scales", at + 1, len(links))
                if not found.text:
                    if not sweep:
                        ctx.remark("missed", link.producer.name, "no scale lowers the error")
                    continue
                if reason := overflow(link, layers, found.scale):
                    ctx.remark("missed", link.producer.name, f"no scale: {reason}")
                    continue
                accept(link, layers, found.scale)
                moved = max(moved, float(np.abs(np.log(found.scale)).max()))
                total, first = scales.get(at, (np.ones_like(found.scale), found))
                scales[at] = total * found.scale, replace(found, before=first.before)
            if moved < _SETTLED or not self.per_tensor:
                break
        return scales

    def _candidates(self, trial: Trial, sweep: int) -> Iterator[tuple[str, Float64]]:
        """Equalisation is repeated: every link changes the ranges of its neighbours."""
        if self.method == "smoothquant":
            yield from trial.smoothquant(self.alpha)
        if self.method in ("awq", "auto") and not sweep:
            yield from trial.awq(self.grid)
        if self.method in ("cle", "auto"):
            yield from trial.equalised()


def _names(link: Link) -> set[str]:
    """The nodes by which `only` selects a link."""
    return {link.producer.name, *(c.linear.node.name or "" for c in link.consumers)}


def _report(ctx: PassContext, link: Link, found: Found) -> None:
    readers = ", ".join(f"'{consumer.linear.node.name}'" for consumer in link.consumers)
    text = f"{found.text}: {readers} multiply the channels back"
    ctx.count("links")
    ctx.remark("applied", link.producer.name, text, before=found.before, after=found.after)
