"""One spelling for what many exporters write in many: the form all later passes expect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from octavo.ir.facts import Norms, QuantizedInput
from octavo.passes.base import Pass
from octavo.passes.find_layer_norms import layer_norms
from octavo.passes.fold_constants import tidy
from octavo.passes.fold_norms import fold_affine, fold_batchnorm
from octavo.passes.fold_pads import fold_pad
from octavo.passes.fold_shapes import fold_dimension, infer_reshape
from octavo.passes.fuse_gelu import fuse_gelu
from octavo.passes.integer_forms import (
    activate_before_space,
    pool_mean,
    split_transposed_convolution,
)
from octavo.passes.merge_activations import merge_activation
from octavo.passes.recognize_quantized import is_quantized, quantized_values
from octavo.passes.remove_noops import (
    merge_reshape,
    merge_transpose,
    remove_arithmetic,
    remove_cast,
    remove_identity,
)
from octavo.passes.rewrite import Rewrite, is_op
from octavo.passes.sink_transposes import ELEMENTWISE, sink_transpose

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo.ir.facts import Fact
    from octavo.ir.model import Model
    from octavo.ir.quant import QuantParams
    from octavo.passes.base import PassContext
    from octavo.passes.rewrite import Rule

RULES: Mapping[str, tuple[Rule, ...]] = {
    "BatchNormalization": (fold_batchnorm,),
    **dict.fromkeys(("Mul", "Div", "Add", "Sub"), (remove_arithmetic, fold_affine)),
    **dict.fromkeys(("Relu", "Clip", "Max", "Min"), (merge_activation,)),
    "Pad": (fold_pad,),
    **dict.fromkeys(("Identity", "Dropout"), (remove_identity,)),
    "Cast": (remove_cast,),
    "Transpose": (merge_transpose,),
    "Reshape": (merge_reshape, infer_reshape),
    "Gather": (fold_dimension,),
}

# Tried where no rule applies: folding is worth more than moving.
MOVES: Mapping[str, tuple[Rule, ...]] = dict.fromkeys(ELEMENTWISE, (sink_transpose,))

# Tried last: they hide from the rules what could have been folded.
FORMS: Mapping[str, tuple[Rule, ...]] = {
    "Erf": (fuse_gelu,),
    "ReduceMean": (pool_mean,),
    "ConvTranspose": (split_transposed_convolution,),
    "Relu": (activate_before_space,),
    "Clip": (activate_before_space,),
}


@final
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Bring a graph into the form that quantization expects.

    **What it does.** Folds constants, BatchNormalization and constant scales and shifts per
    channel into the linear operators next to them, zero Pads into convolutions and poolings;
    writes saturating activations as Relu or Clip; removes what does nothing or is not read.
    **Why.** An integer kernel absorbs a bias, a Relu or padding, but never the nodes in between.
    **When it does not apply.** A value has another reader, a weight is shared or computed, a
    zero border would change; the remark names it. Quantized models keep their Q/DQ nodes.
    **Cost and accuracy.** Exact in real arithmetic; folding rounds each weight once more.
    """

    name = "canonicalize"
    produces: ClassVar[tuple[type[Fact], ...]] = (Norms, QuantizedInput)

    def run(self, model: Model, ctx: PassContext) -> Model:
        known, quantized = model.find(Norms), _quantized(model, ctx)
        rewrite = Rewrite(model, ctx, norms=dict(known.by_value) if known is not None else {})
        before, changed = _size(model), True
        while changed:
            size = _size(model)
            rewrite.missed.clear()
            tidy(rewrite, merge_duplicates=quantized is None)
            changed = size != _size(model)
            while _sweep(rewrite, RULES) or _sweep(rewrite, MOVES):
                changed = True
            changed = changed or _sweep(rewrite, FORMS)
        rewrite.report()
        ctx.count("nodes-removed", before[0] - size[0])
        result = model.with_fact(Norms({**rewrite.norms, **layer_norms(model)}))
        return result if quantized is None else result.with_fact(quantized)


def _size(model: Model) -> tuple[int, int]:
    """Nodes and constants."""
    return sum(1 for _ in model.graph.all_nodes()), len(model.graph.initializers)


def _sweep(rewrite: Rewrite, rules: Mapping[str, tuple[Rule, ...]]) -> bool:
    """Try every rule on every node once."""
    changed = False
    for node in list(rewrite.model.graph.all_nodes()):
        for rule in rules.get(node.op_type, ()):
            # An earlier rule may have removed the node or made it another operator.
            if node.graph is not None and is_op(node, *rules):
                changed |= rule(node, rewrite)
    return changed


def _quantized(model: Model, ctx: PassContext) -> QuantizedInput | None:
    found = [node for node in model.graph.all_nodes() if is_quantized(node)]
    by_value: dict[str, QuantParams] = {}
    for node in found:
        by_value |= quantized_values(node)
        ctx.remark("note", node.name or "", "already quantized: kept")
    return QuantizedInput(by_value) if found else None
