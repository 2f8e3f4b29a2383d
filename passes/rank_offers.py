"""Offers of lower rank: every option of a group with its layers written as two thinner ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import onnx_ir

from octavo.ir.menu import LowRank, Menu, Offer
from octavo.passes.factor_low_rank import low_rank_layer, why_no_factors
from octavo.passes.linear import linear_after
from octavo.passes.low_rank_graph import split_layer
from octavo.passes.offer_bytes import offer_bytes
from octavo.passes.rewrite import Rewrite
from octavo.passes.width_seconds import cost_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from octavo.ir.evaluate import CostModel
    from octavo.ir.facts import Option
    from octavo.ir.model import Model
    from octavo.ir.moments import Moments
    from octavo.passes.base import PassContext
    from octavo.passes.low_rank_layer import LayerFactors

Loss = Callable[["Model"], float]


@final
@dataclass(frozen=True)
class RankOffers:
    """Layers of one model at some shares of their break-even rank.

    `damage` by group and share is that of the outputs with the layers of the group factored.
    """

    shares: Mapping[float, _Split]
    damage: Mapping[str, Mapping[float, float]]

    @staticmethod
    def of(
        model: Model,
        ctx: PassContext,
        moments: Moments,
        loss: Loss,
        shares: Sequence[float],
        multiple: int,
    ) -> RankOffers:
        """Factor, measure latencies of all layers of a share at once, and damage group by group."""
        found: dict[float, _Split] = {}
        damage: dict[str, dict[float, float]] = {}
        for at, share in enumerate(shares):
            split = _Split.of(model, ctx, moments, share, multiple)
            found[share] = split
            for name, group in model.fact(Menu).groups.items():
                made = [split.factors[n] for n in group.nodes if n in split.factors]
                if group.nodes and len(made) == len(group.nodes):
                    damage.setdefault(name, {})[share] = loss(_replaced(model, ctx, made))
            ctx.progress("measure ranks", at + 1, len(shares))
        return RankOffers(found, damage)

    def offers(self, group: str, base: Offer, head_seconds: float) -> Iterator[tuple[Offer, float]]:
        """An offer at every share that has one, with the damage that the rank adds.

        `head_seconds` are those of the layers themselves in `base`.
        """
        for share, lost in self.damage.get(group, {}).items():
            split = self.shares[share]
            seconds = split.seconds(base.options)
            if seconds is None:
                continue
            ranks = {n: split.low_rank(n) for n in base.options}
            text = "/".join(dict.fromkeys(str(low.rank) for low in ranks.values()))
            made = replace(
                base, name=f"{base.name} rank {text}", bytes=split.bytes(base.options),
                seconds=max(base.seconds - head_seconds, 0.0) + seconds,
                bops=base.bops * split.share_of_macs(base.options), ranks=ranks,
            )  # fmt: skip
            yield made, lost


@final
@dataclass(frozen=True)
class _Split:
    """A copy of a model whose layers are two each: nodes, the first of every two, and costs.

    `whole` are the nodes of the model itself.
    """

    whole: Mapping[str, onnx_ir.Node]
    nodes: Mapping[str, onnx_ir.Node]
    first: Mapping[str, str]
    factors: Mapping[str, tuple[str, LayerFactors]]
    cost: CostModel
    ctx: PassContext

    @staticmethod
    def of(model: Model, ctx: PassContext, moments: Moments, share: float, multiple: int) -> _Split:
        own = model.clone()
        rewrite = Rewrite(own, ctx)
        first: dict[str, str] = {}
        factors: dict[str, tuple[str, LayerFactors]] = {}
        grouped = model.fact(Menu).group_of()
        for node in list(own.graph):
            name = node.name or ""
            linear = node.op_type in ("Conv", "MatMul", "Gemm") and not node.domain
            if name not in grouped or not linear or why_no_factors(node):
                continue
            layer = low_rank_layer(node, moments)
            ranks = [(form, form.rank(share, multiple)) for form in layer.forms]
            ranks = [(form, rank) for form, rank in ranks if rank]
            if ranks:
                made = layer.factors(*min(ranks, key=lambda found: layer.error(*found)))
                factors[name] = name, made
                first[name] = split_layer(rewrite, node, made).name or ""
        nodes = {node.name or "": node for node in own.graph}
        whole = {node.name or "": node for node in model.graph}
        return _Split(whole, nodes, first, factors, cost_of(own, ctx), ctx)

    def low_rank(self, node: str) -> LowRank:
        made = self.factors[node][1]
        return LowRank(made.form.kind, made.rank)

    def _both(self, options: Mapping[str, Option]) -> dict[str, Option]:
        return {name: o for node, o in options.items() for name in (self.first[node], node)}

    def seconds(self, options: Mapping[str, Option]) -> float | None:
        """Seconds of all layers, `None` where the target has no kernel for one."""
        taken = [self.cost.option_seconds(self.nodes[n], o) for n, o in self._both(options).items()]
        return None if None in taken else sum(each or 0.0 for each in taken)

    def bytes(self, options: Mapping[str, Option]) -> int:
        """Weights of all layers, and the nodes that come in front."""
        both = (name for node in options for name in (self.first[node], node))
        added = sum(_node_bytes(self.nodes[name]) for name in both)
        added -= sum(_node_bytes(self.whole[name]) for name in options)
        return added + offer_bytes(self.nodes, self._both(options), self.ctx.target)

    def share_of_macs(self, options: Mapping[str, Option]) -> float:
        """What is left of the multiplications, mean over the layers."""
        made = [self.factors[name][1] for name in options]
        left = [each.rank * each.form.per_rank / each.form.whole for each in made]
        return sum(left) / len(left)


def factored(
    nodes: Sequence[onnx_ir.Node], ranks: Mapping[str, LowRank], moments: Moments
) -> dict[str, NDArray[np.generic]]:
    """The weights that layers of lower rank are together, by the constant they stand for."""
    found: dict[str, NDArray[np.generic]] = {}
    for node in nodes:
        low, layer = ranks[node.name or ""], low_rank_layer(node, moments)
        form = next(form for form in layer.forms if form.kind == low.form)
        weight = node.inputs[1]
        assert weight is not None
        found[weight.name or ""] = layer.factors(form, low.rank).product
    return found


def _node_bytes(node: onnx_ir.Node) -> int:
    """A node in the emitted file, which has no metadata."""
    proto = onnx_ir.to_proto(node)
    del proto.metadata_props[:]
    return int(proto.ByteSize())


def _replaced(model: Model, ctx: PassContext, made: Sequence[tuple[str, LayerFactors]]) -> Model:
    """A copy in which layers have the weight that their factors are together."""
    own = model.clone()
    rewrite, nodes = Rewrite(own, ctx), {node.name or "": node for node in own.graph}
    for name, each in made:
        node = nodes[name]
        weight = node.inputs[1]
        assert weight is not None
        assert weight.dtype is not None
        rewrite.set_constant(node, 1, each.product.astype(weight.dtype.numpy()), "weight")
        linear = linear_after(node)
        bias = linear.bias() if linear is not None else None
        if each.shift is not None and linear is not None and bias is not None:
            alpha = node.attributes.get_float("alpha", 1.0)
            moved = (bias + alpha * each.shift).astype(weight.dtype.numpy())
            rewrite.set_constant(linear.last, linear.bias_index, moved, "bias")
    return own
