"""Scales per channel moved from activations into weights, where the graph computes the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np

from octavo.ir.errors import UsageError
from octavo.ir.facts import Norms, QuantizedInput
from octavo.passes.base import Pass
from octavo.passes.layer_columns import estimate_power, sample_columns
from octavo.passes.patterns import select
from octavo.passes.rewrite import Rewrite
from octavo.passes.scale_links import find_links
from octavo.passes.scale_search import ScaleMethod, Trial
from octavo.passes.scaled_layers import Layer, Rounding

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from octavo.ir.facts import Fact
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.scale_links import Link
    from octavo.passes.scale_search import Float64, Found

_MAX_SWEEPS = 10
_SETTLED = 1e-2


@final
@dataclass(frozen=True)
class FoldScales(Pass):
    """Give channels scales that make rounding hurt less, without changing what is computed.

    **What it does.** Divides an output channel of a normalization or linear operator by s and
    multiplies the weights that read it by s; operators in between only pass positive scales.
    Candidates for s: `smoothquant`, `awq` (a grid of powers of the mean activation) and `cle`
    (equal weight ranges, no data); `auto` tries awq and cle. The one that leaves the least
    output error after rounding to `bits` stays, if it beats no scale.
    **Why.** Large activations make the errors of their few weights count most.
    **When it does not apply.** A channel has a reader that changes with scale (a sum with
    something else, Clip, Gelu, a shared weight); the remark names it. Without data only ranges
    and normalizations tell how large activations are.
    **Cost and accuracy.** A rounded copy of each weight per candidate. Exact up to float
    rounding.
    """

    name = "fold-scales"
    produces: ClassVar[tuple[type[Fact], ...]] = (Norms,)
    preserves: ClassVar[tuple[type[Fact], ...]] = (QuantizedInput,)

    method: ScaleMethod = "auto"
    bits: int = 4
    block: int = 0
    per_tensor: bool = False
    activation_bits: int = 0
    alpha: float = 0.5
    grid: int = 20
    samples: int = 64
    rows: int = 512
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
        layers = _layers(links)
        self._observe(model, ctx, links, layers)
        scales = self._search(ctx, links, layers)
        if not scales:
            return model
        return _rewritten(model, ctx, links, layers, scales)

    def _check(self) -> None:
        for name, value, low, high in (
            ("bits", self.bits, 2, 8),
            ("activation-bits", self.activation_bits, 0, 8),
            ("alpha", self.alpha, 0.0, 1.0),
            ("grid", self.grid, 1, 1000),
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
        """Give every layer samples of what it reads, or an estimate where there is no data."""
        if ctx.calibration is None:
            if layers:
                ctx.remark("note", "", "no calibration data: the sizes of activations are guessed")
            estimate_power(links, layers)
        else:
            sample_columns(model, ctx, layers.values(), self.samples, self.rows)

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
                    continue
                _accept(link, layers, found.scale)
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
    return {link.producer.name, *(c.linear.node.name or "" for c in link.consumers)}


def _layers(links: Sequence[Link]) -> dict[int, Layer]:
    """The linear operators of all links, by the id of their node."""
    linears = [c.linear for link in links for c in link.consumers]
    linears += [link.producer.linear for link in links if link.producer.linear is not None]
    return {id(linear.node): Layer.of(linear) for linear in linears}


def _accept(link: Link, layers: dict[int, Layer], scale: Float64) -> None:
    for consumer in link.consumers:
        layer = layers[id(consumer.linear.node)]
        layer.fed = layer.fed * link.spread(scale, consumer.labels)
    if link.producer.linear is not None:
        layer = layers[id(link.producer.linear.node)]
        layer.made = layer.made * scale


def _rewritten(
    model: Model,
    ctx: PassContext,
    links: Sequence[Link],
    layers: dict[int, Layer],
    scales: dict[int, tuple[Float64, Found]],
) -> Model:
    """The model with all scales in its constants, and the normalizations that changed."""
    rewrite = Rewrite(model, ctx)
    known = model.find(Norms)
    norms = dict(known.by_value) if known is not None else {}
    for at, (scale, found) in scales.items():
        link = links[at]
        _scale_vectors(rewrite, link, scale)
        for name, labels in link.values.items():
            norm = norms.get(name)
            if norm is not None and norm.gamma.size == labels.size:
                divisor = link.spread(scale, labels.reshape(-1)).astype(np.float32)
                gamma, beta = norm.gamma / divisor, norm.beta / divisor
                norms[name] = replace(norm, gamma=gamma, beta=beta)
        readers = ", ".join(f"'{c.linear.node.name}'" for c in link.consumers)
        ctx.count("links")
        ctx.remark(
            "applied", link.producer.name, f"{found.text}: channels scaled back in {readers}",
            before=found.before, after=found.after,
        )  # fmt: skip
    for layer in layers.values():
        _scale_layer(rewrite, layer)
    return model.with_fact(Norms(norms))


def _scale_vectors(rewrite: Rewrite, link: Link, scale: Float64) -> None:
    producer = link.producer
    for at, (node, index) in enumerate(producer.vectors):
        value = node.inputs[index]
        assert value is not None
        assert value.const_value is not None
        shape, dtype = value.const_value.shape.numpy(), value.const_value.dtype.numpy()
        scaled = (producer.vector(at) / scale).reshape(shape).astype(dtype)
        rewrite.set_constant(node, index, scaled, "scaled")


def _scale_layer(rewrite: Rewrite, layer: Layer) -> None:
    if np.all(layer.fed == 1) and np.all(layer.made == 1):
        return
    linear = layer.linear
    bias = linear.bias() if np.any(layer.made != 1) else None
    weight = layer.matrix.restore(layer.scaled(layer.rows, layer.fed, layer.made))
    rewrite.set_constant(linear.node, 1, weight.astype(linear.dtype), "weight")
    if bias is not None and np.any(bias):
        rewrite.set_constant(
            linear.last, linear.bias_index, (bias / layer.made).astype(linear.dtype), "bias"
        )
        linear.node.attributes.pop("beta", None)
