"""What estimators with gradients share: the likelihood, the weights, and how rounding moves them.

torch is loaded when a curvature is asked for, and runs on one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.ir.arrays_io import read_arrays, write_arrays
from octavo.ir.cache import cache_key
from octavo.ir.calibration import first_samples, samples_of
from octavo.ir.errors import NotDifferentiable
from octavo.passes.activation_rounding import ActivationRounding
from octavo.passes.groups import weight_source
from octavo.passes.offered_rounding import offered_roundings
from octavo.passes.output_damage import OutputDamage
from octavo.passes.weight_scores import change

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.menu import Offer
    from octavo.ir.model import Model
    from octavo.ir.torch_traces import Fisher, HessianTrace
    from octavo.passes.base import PassContext
    from octavo.passes.offered_rounding import OfferedRounding
    from octavo.passes.output_damage import Metric

_TEXTS = {
    "labels": "labels",
    "own": "classes the model is sure of, others drawn",
    "gauss-newton": "Gauss-Newton of the outputs",
}
_LABELS = "octavo.labels"


@final
@dataclass(frozen=True)
class Curvatures:
    """How to find second derivatives of a model's loss in the weights of its menu.

    `outputs` are the values that the loss is taken of. Of the data's labels those are used that
    name a class for every row of the first output; `data` is the digest of the data.
    """

    model: Model
    ctx: PassContext
    feeds: Sequence[Feed]
    damage: OutputDamage
    outputs: tuple[str, ...]
    likelihood: Literal["labels", "own", "gauss-newton"]
    labels: NDArray[np.generic] | None
    weights: frozenset[str]
    data: str

    @staticmethod
    def of(
        model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric
    ) -> Curvatures:
        """Labels where the data has them and the first output is classes, else the model's own.

        Where the first output is no distribution over classes: Gauss-Newton of all outputs.
        Raises NotDifferentiable where no output is of floats.
        """
        feeds = tuple(first_samples(batches, limit))
        damage = OutputDamage.of(model, metric)
        if not damage.kinds:
            node = model.graph.outputs[0].producer()
            what, name = (node.op_type, node.name or "") if node is not None else ("input", "")
            raise NotDifferentiable(what, name, model.source.name)
        logits = _logits(model, damage)
        labels = _fitting(batches.labels, logits, sum(map(samples_of, feeds)))
        outputs = tuple(damage.kinds) if logits is None else (logits.name or "",)
        likelihood: Literal["labels", "own", "gauss-newton"] = "labels"
        if logits is None or labels is None:
            likelihood = "gauss-newton" if logits is None else "own"
        groups = offered_roundings(model, ctx.target, ActivationRounding(ctx.evaluator)).values()
        weights = frozenset(name for group in groups for name, _ in initializers(group).values())
        return Curvatures(
            model, ctx, feeds, damage, outputs, likelihood, labels, weights - {""}, batches.sha256
        )

    @property
    def samples(self) -> int:
        return sum(map(samples_of, self.feeds))

    @property
    def text(self) -> str:
        """The likelihood, for people."""
        return _TEXTS[self.likelihood]

    def fisher(self) -> dict[str, Fisher]:
        """The Fisher diagonal of every weight that the outputs depend on, by initializer.

        Kept in the working folder: several estimators of one plan ask. Raises NotDifferentiable.
        """
        from octavo.ir.torch_traces import Fisher

        path = self.ctx.workdir / f"{self._key()}.npz"
        if not path.exists():
            made = self._fisher()
            numbers = {name: np.array([f.trace, f.error, f.samples]) for name, f in made.items()}
            diagonals = {f"{name} diagonal": f.diagonal for name, f in made.items()}
            write_arrays(path, {**numbers, **diagonals})
        stored = read_arrays(path)
        return {
            name: Fisher(stored[f"{name} diagonal"], float(row[0]), float(row[1]), int(row[2]))
            for name, row in stored.items()
            if f"{name} diagonal" in stored
        }

    def _key(self) -> str:
        read = (*self.outputs, *sorted(self.weights))
        options = f"{self.samples} {self.likelihood} {self.ctx.seed}"
        return cache_key("fisher", self.model.fingerprint, self.data, options, *read)

    def _fisher(self) -> dict[str, Fisher]:
        from octavo.ir.torch_losses import one_thread
        from octavo.ir.torch_module import differentiable
        from octavo.ir.torch_traces import fisher_diagonal

        graph = differentiable(self.model, self.outputs)
        weights = sorted(self.weights & graph.parameters.keys())
        if not weights:
            return {}
        with one_thread():
            return fisher_diagonal(
                graph,
                _Watched(self.ctx, "gradients", self.feeds),
                weights,
                likelihood=self.likelihood,
                labels=self.labels,
                seed=self.ctx.seed,
            )

    def traces(self, draws: int) -> dict[str, HessianTrace]:
        """The Hessian trace of every weight: of the labels' cross entropy, else of the damage.

        The damage is that of the outputs against the source's. Raises NotDifferentiable.
        """
        from octavo.ir.torch_losses import cross_entropy, divergence, one_thread
        from octavo.ir.torch_module import differentiable
        from octavo.ir.torch_traces import hutchinson_trace

        if self.labels is None:
            outputs, loss = tuple(self.damage.kinds), divergence(self.damage.kinds)
        else:
            outputs, loss = self.outputs, cross_entropy(self.outputs[0], _LABELS)
        graph = differentiable(self.model, outputs)
        weights = sorted(self.weights & graph.parameters.keys())
        if not weights:
            return {}
        with one_thread():
            return hutchinson_trace(
                graph,
                _Watched(self.ctx, "second derivatives", tuple(self._labelled())),
                weights,
                loss,
                draws=draws,
                seed=self.ctx.seed,
            )

    def _labelled(self) -> Iterator[Feed]:
        """Feeds with their labels beside the inputs, where there are labels."""
        start = 0
        for feed in self.feeds:
            stop = start + samples_of(feed)
            yield feed if self.labels is None else {**feed, _LABELS: self.labels[start:stop]}
            start = stop


def initializers(group: OfferedRounding) -> dict[str, tuple[str, bool]]:
    """The initializer behind every weight that a group reads, and whether it is read turned."""
    found = {}
    for node in group.nodes:
        for value in group.weights(node):
            source = weight_source(value)
            name = (source.name or "") if source is not None else ""
            found[value.name or ""] = (name, value.const_value is None)
    return found


def changes(group: OfferedRounding, offer: Offer) -> dict[str, NDArray[np.float32]]:
    """What an offer adds to every initializer of a group, in its own shape.

    One that nodes read in several ways counts once.
    """
    before, behind = group.constants, initializers(group)
    found = {}
    for read, after in group.rounded(offer).items():
        name, turned = behind[read]
        added = change(before[read], after)
        found[name] = added.T if turned else added
    return found


@dataclass(frozen=True)
class _Watched:
    """Feeds that report how many of them are done."""

    ctx: PassContext
    label: str
    feeds: Sequence[Feed]

    def __iter__(self) -> Iterator[Feed]:
        for done, feed in enumerate(self.feeds):
            yield feed
            self.ctx.progress(self.label, done + 1, len(self.feeds))


def _logits(model: Model, damage: OutputDamage) -> onnx_ir.Value | None:
    """The first output if it is logits, or what the Softmax that it comes from reads."""
    value = model.graph.outputs[0]
    kind = damage.kinds.get(value.name or "")
    if kind == "logits":
        return value
    while kind == "probabilities" and (node := value.producer()) is not None:
        read = node.inputs[0]
        if read is None:
            return None
        if node.op_type == "Softmax":
            rank = read.shape.rank() if read.shape is not None else None
            return read if node.attributes.get_int("axis", -1) in (-1, (rank or 0) - 1) else None
        value = read
    return None


def _fitting(
    labels: NDArray[np.generic] | None, logits: onnx_ir.Value | None, samples: int
) -> NDArray[np.generic] | None:
    """The labels of the first samples, if they are whole numbers, one a row of the logits."""
    if labels is None or logits is None or logits.shape is None:
        return None
    fits = labels.dtype.kind in "iu" and labels.ndim == logits.shape.rank() - 1
    return labels[:samples] if fits else None
