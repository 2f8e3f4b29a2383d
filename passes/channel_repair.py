"""Bring back the moments of every layer's channels, one layer after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.calibration import Part, first_samples, samples_of
from octavo.ir.errors import CalibrationError
from octavo.ir.reference import Reference
from octavo.ir.synthetic import origin_of
from octavo.passes.affine_layers import affine_layers
from octavo.passes.evidence import batch_norms
from octavo.passes.joint_moments import JointMoments
from octavo.passes.layer_walk import Segment, Walk, segments
from octavo.passes.output_damage import OutputDamage
from octavo.passes.rewrite import Rewrite
from octavo.passes.sample_macs import affordable_samples, sample_macs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.facts import Norm
    from octavo.ir.model import Model
    from octavo.passes.affine_layers import AffineLayer
    from octavo.passes.base import PassContext

    Float64 = NDArray[np.float64]
    Correction = tuple[Float64, Float64]

# A channel that hardly varies has no scale to restore, and none is changed beyond this factor.
_CONSTANT = 1e-6
_LARGEST_RATIO = 4.0
# Samples of a large model hold many rows each: a few are enough for means and deviations.
_MACS = 6e10
_LEAST_SAMPLES = 8


def moment_match(moments: JointMoments) -> Correction:
    """Ratio and shift that give the rounded layer mean and variance of the float one.

    `r = sqrt(v/v')` and `m - m'·r`, which is batch-norm tuning (Hubara et al. 2020, arXiv
    2006.10518) without a batch norm. A channel that hardly varies is only shifted.
    """
    least = _CONSTANT**2 * np.maximum(moments.variance, moments.mean**2)
    least = np.maximum(least, np.finfo(np.float32).tiny)
    varies = (moments.variance > least) & (moments.variance_q > least)
    quotient = moments.variance / np.where(varies, moments.variance_q, 1)
    ratio = np.clip(np.sqrt(quotient), 1 / _LARGEST_RATIO, _LARGEST_RATIO)
    ratio = np.where(varies, ratio, 1.0)
    return ratio, moments.mean - moments.mean_q * ratio


def bias_match(moments: JointMoments) -> Correction:
    """Ratio 1, and the shift that gives the rounded layer the mean of the float one."""
    return np.ones(moments.mean.shape), moments.mean - moments.mean_q


def stored_match(halves: Sequence[JointMoments], stored: Norm) -> Correction:
    """Ratio and shift that give a float layer the moments that its normalization has stored."""
    found = reduce(JointMoments.merged, halves)
    mean, variance = (a.astype(np.float64) for a in (stored.beta, stored.gamma**2))
    return moment_match(
        replace(found, mean=mean, variance=variance, mean_q=found.mean, variance_q=found.variance)
    )


@final
@dataclass(frozen=True)
class ChannelRepair:
    """Corrects layers in topological order, so that each is measured behind corrected ones.

    Half of the feeds decide about the other half's corrections. Behind a layer whose moments a
    BatchNormalization has stored, both models go on with these moments where the feeds were made
    to have them: what they lack would add up from layer to layer, and errors of means with it.
    """

    ctx: PassContext
    scales: bool
    samples: int

    def run(self, model: Model) -> Model:
        """The corrected model, or the given one where its outputs would not be closer."""
        if self.ctx.calibration is None:
            self.ctx.remark("note", "", "no calibration data to take moments from")
            return model
        reference = model.fact(Reference).model
        macs = sample_macs(reference, self.ctx, self.ctx.calibration)
        samples = affordable_samples(macs, _MACS, self.samples, _LEAST_SAMPLES)
        feeds = list(first_samples(self.ctx.calibration, samples))
        before = model.clone()
        if not self._repair(model, reference, feeds):
            return before
        return self._better(before, model, reference, samples)

    def _repair(self, model: Model, reference: Model, feeds: Sequence[Feed]) -> int:
        """Correct the model in place; returns how many layers changed."""
        known = {node.name: node for node in reference.graph}
        layers = [a for a in affine_layers(model) if a.last.name in known and self._fits(a)]
        paths = [
            segments(of, stops)
            for of, stops in (
                (reference, [known[a.last.name] for a in layers]),
                (model, [a.last for a in layers]),
            )
        ]
        ctx = self.ctx
        walks = [
            Walk(of, ctx.evaluator, feeds, ctx.executor, ctx.workdir) for of in (reference, model)
        ]
        rewrite, corrected, stored = Rewrite(model, self.ctx), 0, self._stored(reference)
        for done, (layer, *pair) in enumerate(zip(layers, *paths, strict=True), start=1):
            for walk, segment in zip(walks, pair, strict=True):
                walk.step(segment)
            halves = self._halves(layer, walks, pair)
            correction = self._correction(layer, halves)
            if correction is not None:
                layer.transform(rewrite, *correction)
                corrected += 1
                walks[1].change(pair[1], partial(_affine, layer.axis, *correction))
            if halves and pair[0].value in stored:
                standard = stored_match(halves, stored[pair[0].value])
                for walk, segment in zip(walks, pair, strict=True):
                    walk.change(segment, partial(_affine, layer.axis, *standard))
            for walk, segment in zip(walks, pair, strict=True):
                walk.leave(segment)
            self.ctx.progress("match moments", done, len(layers))
        return corrected

    def _fits(self, layer: AffineLayer) -> bool:
        if layer.bias() is None:
            self.ctx.remark("missed", layer.node.name or "", "nothing adds a bias per channel")
            return False
        return True

    def _stored(self, reference: Model) -> Mapping[str, Norm]:
        """What made data come close to and never reach, by value; nothing for other data."""
        made = origin_of(self.ctx.calibration, None) == "synthetic-bn"
        return batch_norms(reference) if made else {}

    def _halves(
        self, layer: AffineLayer, walks: Sequence[Walk], pair: Sequence[Segment]
    ) -> list[JointMoments]:
        """The layer's moments on every other feed and on those between; one for a single feed."""
        halves: list[JointMoments | None] = [None, None]
        for index in range(len(walks[0].feeds)):
            real, rounded = (w.read(index, s.value) for w, s in zip(walks, pair, strict=True))
            if real.size:
                found = _finite(JointMoments.of(real, rounded, layer.axis), layer, index)
                half = halves[index % 2]
                halves[index % 2] = found if half is None else half.merged(found)
        return [half for half in halves if half is not None]

    def _correction(self, layer: AffineLayer, halves: Sequence[JointMoments]) -> Correction | None:
        """From all feeds, if that of one half brings the other half's moments closer."""
        if not halves:
            return None
        fit, check = halves[0], halves[-1]
        nothing = np.ones(layer.channels), np.zeros(layer.channels)
        scalable = self.scales and layer.scalable
        matches = (moment_match, bias_match) if scalable else (bias_match,)
        match = min(matches, key=lambda of: float(check.mismatch(*of(fit)).sum()))
        power = max(float((check.variance + check.mean**2).sum()), np.finfo(np.float64).tiny)
        ours = match(fit)
        before, after = (float(check.error(*c).sum()) / power for c in (nothing, ours))
        name, numbers = layer.node.name or "", {"before": before, "after": after}
        if check.mismatch(*ours).sum() >= check.mismatch(*nothing).sum():
            self.ctx.remark("missed", name, "its moments are right already", **numbers)
            return None
        self.ctx.count("layers corrected")
        what = "mean and deviation" if match is moment_match else "mean"
        self.ctx.remark("applied", name, f"every channel has its {what} back", **numbers)
        return match(fit if fit is check else fit.merged(check))

    def _better(self, before: Model, after: Model, reference: Model, samples: int) -> Model:
        """Whichever is closer to the float model on the held-out half."""
        assert self.ctx.calibration is not None
        held_out = Part(self.ctx.calibration, 1)
        damage = OutputDamage.of(reference)
        runs = [self.ctx.evaluator.load(each) for each in (reference, before, after)]
        names = [value.name or "" for value in reference.graph.inputs]
        found: list[tuple[Float64, Float64]] = []
        for feed in first_samples(held_out, samples):
            fed, count = {name: feed[name] for name in names}, samples_of(feed)
            expected, *made = self.ctx.executor.map(lambda run, fed=fed: run(fed), runs)
            first, second = (damage.per_sample(expected, each, count) for each in made)
            found.append((first, second))
        lost, left = (float(np.concatenate(some).mean()) for some in zip(*found, strict=True))
        text = f"{damage.text}: {lost:.4g} before, {left:.4g} after"
        if left < lost:
            self.ctx.remark("note", "", text, before=lost, after=left)
            return after
        self.ctx.remark("missed", "", f"{text}; nothing is kept", before=lost, after=left)
        return before


def _affine(
    axis: int, ratio: Float64, shift: Float64, array: NDArray[np.generic]
) -> NDArray[np.generic]:
    along = [-1 if k == axis % array.ndim else 1 for k in range(array.ndim)]
    scaled = array * ratio.reshape(along).astype(np.float32)
    return np.asarray(scaled + shift.reshape(along).astype(np.float32), array.dtype)


def _finite(moments: JointMoments, layer: AffineLayer, index: int) -> JointMoments:
    total = float((moments.variance + moments.variance_q + moments.mean + moments.mean_q).sum())
    if not np.isfinite(total):
        message = f"'{layer.node.name}' gives values that are not finite on the calibration data"
        hint = "check --preprocess and the data, or leave the sample out"
        raise CalibrationError(message, where=f"feed {index + 1}", hint=hint)
    return moments
