"""Set single weights to zero where the outputs show it least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.ir.calibration import first_samples, samples_of
from octavo.ir.errors import UsageError
from octavo.ir.facts import Norms, Portable
from octavo.ir.mapped import reading
from octavo.ir.moments import Moments
from octavo.passes.base import Pass
from octavo.passes.collect_moments import collected
from octavo.passes.low_rank import relative_error
from octavo.passes.output_damage import OutputDamage
from octavo.passes.patterns import chosen
from octavo.passes.rewrite import Rewrite, owned
from octavo.passes.sparse_weight import Sparsity, magnitude_pruned, obs_pruned
from octavo.passes.sparsity_allocation import least_distortion
from octavo.passes.suffix import Flow
from octavo.passes.weight_matrix import WeightMatrix, why_no_matrix

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.moments import Moment
    from octavo.passes.base import PassContext

    Float32 = NDArray[np.float32]

_LINEAR = ("Conv", "MatMul", "Gemm")
# Shares of zeros whose distortion is measured, between which nothing is interpolated.
_LEVELS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_SPARSE = "2:4 sparsity"


@final
@dataclass(frozen=True)
class PruneWeights(Pass):
    """Set the share `sparsity` of the weights to zero, or two of every four neighbours.

    **What it does.** `method=obs` chooses zeros by what they cost the layer's output and lets the
    other weights of the row make up for them (SparseGPT, on the second moments of what the weight
    multiplies); `magnitude` takes the smallest. With `allocation=distortion` every layer is pruned
    alone at ten shares, the error of the network's outputs is measured, and dynamic programming
    finds the shares whose sum of errors is least (ICCV 2023); `uniform` gives all layers the same.
    `pattern=2:4` counts along the input channels, as sparse tensor cores do.
    **Why.** Zeros compress, and kernels for them skip half of the multiplications.
    **When it does not apply.** Weights that others read too, and embeddings; 2:4 where four do
    not divide the inputs. Targets without sparse kernels gain nothing but what a compressed file
    saves, which a note says. Without calibration data: `magnitude` and `uniform`.
    **Cost and accuracy.** `K³/3 + N·K²` products per layer and share. No layer's output error
    exceeds that of magnitude pruning.
    """

    name = "prune-weights"
    preserves = (Norms, Portable)

    sparsity: float = 0.5
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    method: Literal["obs", "magnitude"] = "obs"
    allocation: Literal["distortion", "uniform"] = "distortion"
    damping: float = 0.01
    samples: int = 128
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def run(self, model: Model, ctx: PassContext) -> Model:
        if not 0 < self.sparsity < 1:
            message = f"a sparsity of {self.sparsity:g} does not lie between 0 and 1"
            raise UsageError(message, where=f"{self.name}{{sparsity={self.sparsity:g}}}")
        if self.samples < 1:
            raise UsageError("samples must be at least 1", where=self.name)
        if _SPARSE not in ctx.target.features:
            text = f"{ctx.target.name} has no sparse kernel: zeros save bytes of a compressed file"
            ctx.remark("note", "", f"{text}, and no time")
        nodes = [n for n in chosen(model, self.only, self.keep) if self._applies(n, ctx)]
        moments = self._moments(model, ctx, nodes)
        layers = [_Layer.of(node, moments.of(node.name or "", 1)) for node in nodes]
        shares = self._shares(model, ctx, layers)
        rewrite = Rewrite(model, ctx)
        for done, (layer, share) in enumerate(zip(layers, shares, strict=True), start=1):
            self._prune(rewrite, layer, share)
            ctx.progress("prune weights", done, len(layers))
        return model

    def _applies(self, node: onnx_ir.Node, ctx: PassContext) -> bool:
        if node.op_type not in _LINEAR or node.domain or len(node.inputs) < 2:
            return False
        weight, why = node.inputs[1], why_no_matrix(node, 1)
        if not why and (weight is None or weight.const_value is None or not owned(weight)):
            why = "its weight is not a constant of its own"
        if not why and self.pattern == "2:4" and _channels(node) % 4:
            why = f"four do not divide its {_channels(node)} inputs"
        if why and weight is not None and weight.const_value is not None:
            ctx.remark("missed", node.name or "", why)
        return not why

    def _moments(self, model: Model, ctx: PassContext, nodes: Sequence[onnx_ir.Node]) -> Moments:
        known = model.find(Moments)
        if known is not None or ctx.calibration is None:
            if known is None and self.method == "obs":
                ctx.remark("note", "", "no calibration data: the smallest weights go")
            return known or Moments({})
        wanted = [(node.name or "", 1) for node in nodes]
        return collected(model, ctx, wanted, ctx.calibration)

    def _shares(self, model: Model, ctx: PassContext, layers: Sequence[_Layer]) -> list[float]:
        """The share of zeros of every layer."""
        fixed = self.pattern != "unstructured" or self.allocation == "uniform"
        if fixed or ctx.calibration is None or len(layers) < 2:
            return [self.sparsity] * len(layers)
        study = _distortions(model, ctx, layers, self)
        sizes = [layer.weight.size for layer in layers]
        kept = [[size - round(level * size) for level in _LEVELS] for size in sizes]
        budget = sum(sizes) - round(self.sparsity * sum(sizes))
        levels = least_distortion(kept, study, budget)
        if levels is None:
            ctx.remark("note", "", f"a sparsity of {self.sparsity:g} is above the highest share")
            return [self.sparsity] * len(layers)
        return [_LEVELS[level] for level in levels]

    def _prune(self, rewrite: Rewrite, layer: _Layer, share: float) -> None:
        ctx, name = rewrite.ctx, layer.node.name or ""
        if not share:
            ctx.remark("note", name, "every weight is kept: others cost less")
            return
        made, error = self.pruned(layer, share)
        zeros = float(np.mean(made == 0))
        weight = layer.node.inputs[1]
        assert weight is not None
        assert weight.dtype is not None
        rewrite.set_constant(layer.node, 1, made.astype(weight.dtype.numpy()), "weight")
        text = f"{zeros:.1%} of the weights are zero, output error {error:.3e}"
        ctx.remark("applied", name, text, zeros=zeros, error=error)
        ctx.count("weights pruned", int(np.sum(made == 0)))

    def pruned(self, layer: _Layer, share: float) -> tuple[Float32, float]:
        """The weight in the shape of its constant with a share of zeros, and ‖ΔW·X‖² / ‖W·X‖²."""
        sparsity = Sparsity(0.5, 2, 4) if self.pattern == "2:4" else Sparsity(share)
        rows, made, lost = layer.rows, [], 0.0
        for group, weight in enumerate(rows):
            second = None if layer.second is None else layer.second[group]
            best = magnitude_pruned(weight, sparsity)
            error = relative_error(weight, best, second)
            if second is not None and self.method == "obs":
                other = obs_pruned(weight, second, sparsity, self.damping)
                tried = relative_error(weight, other, second)
                best, error = (other, tried) if tried < error else (best, error)
            made.append(best)
            lost += error
        return layer.restored(np.stack(made)), lost / max(len(rows), 1)


@final
@dataclass(frozen=True)
class _Layer:
    """A weight as matrices whose neighbours are input channels, and the moments of its inputs.

    `rows` has shape `[groups, N, K]`, `second` `[groups, K, K]`; `order` is where their columns
    lie among those of `WeightMatrix`.
    """

    node: onnx_ir.Node
    weight: Float32
    matrix: WeightMatrix
    order: NDArray[np.int64]
    rows: NDArray[np.float64]
    second: NDArray[np.float64] | None

    @staticmethod
    def of(node: onnx_ir.Node, moment: Moment | None) -> _Layer:
        value, matrix = node.inputs[1], WeightMatrix.of(node, 1)
        assert value is not None
        assert value.const_value is not None
        weight = reading(value.const_value, lambda a: np.array(a, np.float32))
        channels = _channels(node)
        order = np.arange(matrix.width).reshape(channels, -1).T.reshape(-1)
        rows = matrix.rows(weight)[..., order].astype(np.float64)
        second = None
        if moment is not None:
            second = moment.matrix()[:, order][:, :, order].astype(np.float64)
        return _Layer(node, weight, matrix, order, rows, second)

    def restored(self, rows: NDArray[np.float64]) -> Float32:
        """`[groups, N, K]` in the shape of the constant."""
        back = np.empty_like(rows)
        back[..., self.order] = rows
        return self.matrix.restore(back)


def _channels(node: onnx_ir.Node) -> int:
    """The inputs of one position that a row of the weight multiplies."""
    matrix = WeightMatrix.of(node, 1)
    return matrix.shape[matrix.column_axes[0]]


def _distortions(
    model: Model, ctx: PassContext, layers: Sequence[_Layer], pruning: PruneWeights
) -> list[list[float]]:
    """Damage of the outputs with one layer pruned, by layer and level."""
    assert ctx.calibration is not None
    feeds = tuple(first_samples(ctx.calibration, pruning.samples))
    flow, damage, run = Flow(model), OutputDamage.of(model), ctx.evaluator.load(model)
    expected = [run(feed) for feed in feeds]
    inputs = [value.name or "" for value in model.graph.inputs]
    found = []
    for done, layer in enumerate(layers, start=1):
        suffix, name = flow.suffix([layer.node]), _weight_name(layer.node)
        part, before = ctx.evaluator.load(suffix.runnable([name])), suffix.before(inputs)
        compute = ctx.evaluator.load(before) if before is not None else None
        needed = [v.name or "" for v in before.graph.inputs] if before is not None else []
        rows = [0.0]
        read: list[Mapping[str, NDArray[np.generic]]] = []
        for feed in feeds:
            known = {n: feed[n] for n in suffix.boundary if n in feed}
            made = compute({n: feed[n] for n in needed}) if compute is not None else {}
            read.append({**known, **made})
        for level in _LEVELS[1:]:
            weight, _ = pruning.pruned(layer, level)
            stored = {name: weight.astype(_dtype(layer.node))}
            lost = [
                damage.per_sample(truth, part({**fed, **stored}), samples_of(feed))
                for truth, fed, feed in zip(expected, read, feeds, strict=True)
            ]
            rows.append(float(np.concatenate(lost).mean()))
        found.append(rows)
        ctx.progress("distortion", done, len(layers))
    return found


def _weight_name(node: onnx_ir.Node) -> str:
    value = node.inputs[1]
    return (value.name or "") if value is not None else ""


def _dtype(node: onnx_ir.Node) -> np.dtype[np.generic]:
    value = node.inputs[1]
    assert value is not None
    assert value.dtype is not None
    return value.dtype.numpy()
