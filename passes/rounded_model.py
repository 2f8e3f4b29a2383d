"""A planned model whose weights are fed, so that one session evaluates many plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.ir.extract import extract
from octavo.ir.facts import Plan
from octavo.ir.fake_quant import DOMAIN, constant, params_of
from octavo.ir.menu import Menu
from octavo.ir.moments import Moments
from octavo.ir.quant import PerTensor
from octavo.passes.activation_rounding import ActivationRounding
from octavo.passes.base import Recorder
from octavo.passes.insert_fake_quant import InsertFakeQuant
from octavo.passes.narrow_models import NarrowModels
from octavo.passes.offered_rounding import OfferedRounding
from octavo.passes.output_damage import output_names
from octavo.passes.place_quantizers import PlaceQuantizers
from octavo.passes.rank_offers import factored
from octavo.passes.rounding import rounder_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

    Values = dict[str, NDArray[np.generic]]

# Rounded weights are kept for the next evaluation up to this size.
_KEPT_BYTES = 512 << 20


@final
@dataclass(frozen=True)
class RoundedModel:
    """Runs any choice of offers that round activations as the plan of the model does."""

    run: Callable[[Feed], Values]
    roundings: Mapping[str, OfferedRounding]
    narrow: NarrowModels | None = None
    moments: Moments | None = None
    rounded: dict[tuple[object, ...], Values] = field(default_factory=dict)

    @staticmethod
    def of(model: Model, ctx: PassContext, groups: Sequence[str]) -> RoundedModel:
        """The model with the plan's activation quantizers; weights of `groups` are fed.

        Where the menu has widths, so is all that they change.
        """
        menu, narrow = model.fact(Menu), None
        if menu.widths:
            narrow = NarrowModels.of(model, ctx)
            model = narrow.model
        nodes = {node.name or "": node for node in model.graph}
        activations = ActivationRounding(ctx.evaluator)
        roundings = {
            name: OfferedRounding(
                [nodes[n] for n in menu.groups[name].nodes],
                menu.offers[name], ctx.target, activations, name, rounder_of(model),
            )
            for name in groups
        }  # fmt: skip
        weights = [value for r in roundings.values() for value in r.constants]
        if narrow is not None:
            weights = list(dict.fromkeys((*weights, *narrow.constants(model))))
        graph = extract(_with_activations(model, ctx), weights, output_names(model))
        _with_pairs(graph)
        return RoundedModel(ctx.evaluator.load(graph), roundings, narrow, model.find(Moments))

    def weights(self, choice: Mapping[str, int]) -> Values:
        """The weights of a choice of offers, by the value that is read."""
        fed: Values = {}
        model = self.narrow.at(choice) if self.narrow is not None else None
        if self.narrow is not None and model is not None:
            fed |= self.narrow.constants(model)
        widths = self.narrow.widths(choice) if self.narrow is not None else ()
        for group, index in choice.items():
            if group in self.roundings:
                fed |= self._rounded(group, index, widths, model)
        return fed

    def _rounded(
        self, group: str, index: int, widths: tuple[str, ...], model: Model | None
    ) -> Values:
        key = (group, index, *widths)
        if key not in self.rounded:
            rounding = self.roundings[group]
            if model is not None:
                own = {node.name: node for node in model.graph}
                rounding = replace(rounding, nodes=[own[node.name] for node in rounding.nodes])
            offer = rounding.offers[index]
            if offer.ranks:
                made = factored(rounding.nodes, offer.ranks, self.moments or Moments({}))
            else:
                made = {**rounding.constants, **rounding.rounded(offer)}
            size = sum(a.nbytes for kept in (*self.rounded.values(), made) for a in kept.values())
            if size > _KEPT_BYTES:
                self.rounded.clear()
            self.rounded[key] = made
        return self.rounded[key]


def _with_activations(model: Model, ctx: PassContext) -> Model:
    """The planned model with its activation quantizers and float weights."""
    plan = model.fact(Plan)
    bare = {n: replace(c, option=replace(c.option, weight=None)) for n, c in plan.by_node.items()}
    own = model.clone().with_fact(Plan(bare, plan.source))
    ctx = replace(ctx, recorder=Recorder())
    return InsertFakeQuant().run(PlaceQuantizers().run(own, ctx), ctx)


def _with_pairs(model: Model) -> None:
    """QuantizeLinear and DequantizeLinear for FakeQuant: the runtime has fast kernels for them."""
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type != "FakeQuant":
            continue
        params = params_of(node)
        if not isinstance(params.spec.granularity, PerTensor):
            continue
        name = node.name or ""
        scale = constant(model.graph, f"{name}_pair_scale", params.scale.reshape(()))
        codes = params.zero_point.reshape(()).astype(params.spec.onnx_type.numpy())
        zero = constant(model.graph, f"{name}_pair_zero", codes)
        quantize = onnx_ir.node("QuantizeLinear", [node.inputs[0], scale, zero], name=f"{name}_q")
        back = onnx_ir.node(
            "DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{name}_dq"
        )
        quantize.outputs[0].name = f"{name}_codes"
        onnx_ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [quantize, back], node.outputs, back.outputs
        )
