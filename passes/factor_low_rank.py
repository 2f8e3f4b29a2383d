"""Write layers as two thinner ones where that is cheaper and the data says it costs little."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.ir.errors import UsageError
from octavo.ir.facts import Norms, Portable
from octavo.ir.mapped import reading
from octavo.ir.moments import Moments
from octavo.ir.reference import Original, with_original
from octavo.passes.base import Pass
from octavo.passes.collect_moments import collected
from octavo.passes.linear import linear_after
from octavo.passes.low_rank_graph import split_layer
from octavo.passes.low_rank_layer import Form, LowRankLayer, why_not_factored
from octavo.passes.patterns import chosen
from octavo.passes.rewrite import Rewrite, owned

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.low_rank_layer import LayerFactors

_FLOATS = ("FLOAT", "FLOAT16", "DOUBLE")


@final
@dataclass(frozen=True)
class FactorLowRank(Pass):
    """Replace linear layers by two of lower rank.

    **What it does.** MatMul and Gemm of K inputs and N outputs become K → r → N. A convolution
    becomes the same one with r outputs before one of 1x1 (`conv=channel`), or one of kh x 1
    before one of 1 x kw (`spatial`), or whichever loses less (`auto`). `method=whitened` keeps
    the directions in which the layer's outputs on the calibration data are strongest, which is
    the optimum of ‖(W - AB)·X‖; `svd` looks at the weights alone. The mean of what is lost goes
    into the bias. A `rank` below 1 is a share of the rank at which nothing is saved, that is of
    the layer's multiplications; it is rounded to `multiple`, as are ranks that keep the share
    `energy` of the output. A whole `rank` is taken as it is.
    **Why.** Integer kernels run the two thin layers in less time than the one.
    **When it does not apply.** Weights that others read too; depthwise and grouped convolutions;
    layers that would not get cheaper. Without calibration data `whitened` is `svd`.
    **Cost and accuracy.** One inference for moments that are not known, and one eigenvalue problem
    per layer. The remarks give ‖(W - AB)·X‖² / ‖W·X‖² of every layer.
    """

    name = "factor-low-rank"
    produces = (Original,)
    preserves = (Norms, Portable)

    rank: float = 0.5
    energy: float = 0.0
    method: Literal["whitened", "svd"] = "whitened"
    conv: Literal["auto", "channel", "spatial"] = "auto"
    multiple: int = 8
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    samples: int = 512

    def run(self, model: Model, ctx: PassContext) -> Model:
        self._check()
        before, rewrite = model.clone(), Rewrite(model, ctx)
        nodes = list(self._nodes(model, ctx))
        moments = self._moments(model, ctx, nodes)
        for done, node in enumerate(nodes, start=1):
            layer = low_rank_layer(node, moments)
            form, rank = self._choice(layer)
            if not rank:
                text = f"a rank would have to be below {form.break_even:.4g} to be cheaper"
                ctx.remark("missed", node.name or "", text)
                continue
            made = layer.factors(form, rank)
            split_layer(rewrite, node, made)
            _report(ctx, node, made)
            ctx.progress("factor", done, len(nodes))
        if not ctx.recorder.counters["layers factored"]:
            ctx.remark("note", "", "no layer was factored")
            return model
        return with_original(model, before)

    def _check(self) -> None:
        where = f"{self.name}{{rank={self.rank:g},energy={self.energy:g},multiple={self.multiple}}}"
        if not 0 < self.rank < math.inf or (self.rank >= 1 and self.rank % 1):
            message = f"a rank of {self.rank:g} is neither a share below 1 nor a whole number"
            raise UsageError(message, where=where, hint="rank=0.5 halves the multiplications")
        if not 0 <= self.energy < 1 or self.multiple < 1 or self.samples < 1:
            message = "energy must lie in [0, 1), and multiple and samples be at least 1"
            raise UsageError(message, where=where)

    def _nodes(self, model: Model, ctx: PassContext) -> Iterator[onnx_ir.Node]:
        for node in chosen(model, self.only, self.keep):
            if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm") and not node.domain:
                why = why_no_factors(node)
                if not why:
                    yield node
                elif node.inputs[1] is not None and node.inputs[1].const_value is not None:
                    ctx.remark("missed", node.name or "", why)

    def _moments(self, model: Model, ctx: PassContext, nodes: list[onnx_ir.Node]) -> Moments:
        if self.method == "svd":
            return Moments({})
        known = model.find(Moments)
        if known is not None and known.by_weight:
            return known
        if ctx.calibration is None:
            ctx.remark("note", "", "no calibration data: all inputs count alike")
            return Moments({})
        wanted = [(node.name or "", 1) for node in nodes]
        return collected(model, ctx, wanted, ctx.calibration, samples=self.samples)

    def _choice(self, layer: LowRankLayer) -> tuple[Form, int]:
        """The form that loses least, or costs least where an energy is to be kept, and its rank.

        Rank 0 where none is cheaper. Raises UsageError for a rank above that of the layer.
        """
        forms = [form for form in layer.forms if self._allows(form)] or list(layer.forms[:1])
        if self.rank >= 1 and not self.energy:
            forms = _with_rank(layer, forms, int(self.rank))
        ranks = [(form, self._rank(layer, form)) for form in forms]
        cheaper = [(form, rank) for form, rank in ranks if rank]
        if not cheaper:
            return ranks[0]
        if self.energy:
            return min(cheaper, key=lambda found: found[0].per_rank * found[1] / found[0].whole)
        return min(cheaper, key=lambda found: layer.error(*found))

    def _allows(self, form: Form) -> bool:
        return form.kind == "matrix" or self.conv in ("auto", form.kind)

    def _rank(self, layer: LowRankLayer, form: Form) -> int:
        if self.energy:
            least = layer.rank_for(form, self.energy)
            rank = -(-least // self.multiple) * self.multiple
        elif self.rank < 1:
            return form.rank(self.rank, self.multiple)
        else:
            rank = int(self.rank)
        return rank if rank < form.break_even else 0


def why_no_factors(node: onnx_ir.Node) -> str:
    """Why the weight of a linear node stays one, "" where it can become two."""
    if reason := why_not_factored(node):
        return reason
    weight = node.inputs[1]
    if weight is None or not owned(weight):
        return "its weight is not a constant of its own"
    if weight.dtype is None or weight.dtype.name not in _FLOATS:
        return f"its weight is {weight.dtype}"
    return ""


def low_rank_layer(node: onnx_ir.Node, moments: Moments) -> LowRankLayer:
    """A node that `why_no_factors` lets pass, with its weight and what is known of its inputs."""
    weight, linear = node.inputs[1], linear_after(node)
    assert weight is not None
    assert weight.const_value is not None
    array = reading(weight.const_value, lambda a: np.array(a, np.float32))
    biased = linear is not None and linear.has_bias_input and linear.bias() is not None
    return LowRankLayer.of(node, array, moments.of(node.name or "", 1), biased)


def _with_rank(layer: LowRankLayer, forms: list[Form], rank: int) -> list[Form]:
    found = [form for form in forms if rank <= form.full]
    if not found:
        name, full = layer.node.name, max(form.full for form in forms)
        raise UsageError(
            f"a rank of {rank} is above the full rank of '{name}'",
            where=f"node '{name}'",
            why=f"its weight has the shape {list(layer.weight.shape)} and rank {full} at most",
            hint="name the layers with only=…, or give a share such as rank=0.5",
        )
    return found


def _report(ctx: PassContext, node: onnx_ir.Node, made: LayerFactors) -> None:
    left = made.form.per_rank * made.rank / made.form.whole
    text = f"rank {made.rank} of {made.form.full}: {left:.0%} of the multiplications"
    text += f", output error {made.error:.3e}"
    ctx.remark(
        "applied", node.name or "", text, rank=made.rank, error=made.error, multiplications=left,
        form=made.form.kind,
    )  # fmt: skip
    ctx.count("layers factored")
