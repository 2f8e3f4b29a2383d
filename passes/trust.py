"""How far calibration data that nobody collected can be trusted: a number with its parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.errors import CalibrationError
from octavo.ir.facts import Norms, Range
from octavo.ir.synthetic import Synthetic, Trust
from octavo.passes.bound_ranges import interval
from octavo.passes.choose_kernels import ChooseKernels
from octavo.passes.clipping import choose_interval
from octavo.passes.evidence import Evidence
from octavo.passes.law_rules import Propagation
from octavo.passes.read_values import value_reader
from octavo.passes.sweep import sweep_ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.model import Model
    from octavo.ir.torch_synthesis import Moments
    from octavo.passes.base import PassContext
    from octavo.passes.histogram import Histogram
    from octavo.passes.input_laws import InputLaw

    Intervals = Mapping[str, Range]
    Seen = Mapping[str, Histogram]

_PERCENTILE = 99.99
_REACH = 4.0
# A distance of this much halves the part.
_HALF_DISTANCE = 0.1
_FEWEST_REAL = 4
_TINY = 1e-6
# Of a bound; a value that shows none of it counts as this much.
_LEAST_SHARE = 0.01
# A dead channel is this far from any other.
_FAR = 9.0


@final
@dataclass(frozen=True)
class Truster:
    """Trust in feeds of one canonicalized model.

    Parts, each from 0 to 1 and left out where the model or the data tells nothing:

    - `seeds`: overlap of the ranges of two groups that were made independently.
    - `statistics`: 1 / (1 + d / 0.1), d how far means and deviations are from the stored ones.
    - `bounds`: the share of the ranges that normalizations alone suggest which the data covers.
    - `classes`: the share of classes that the model sees, of as many as there are samples for.
    - `certainty`: 1 - entropy of the classes / log(classes), mean over samples.
    - `real`: overlap of the ranges with those of at least four real samples.
    - `moments`: 1 / (1 + d / 0.1), d how far means and deviations are from those of these samples.

    The value is the geometric mean of all but `certainty`, which says nothing of ranges: noise
    that is loud enough makes a model as certain as images do.
    """

    model: Model
    ctx: PassContext
    laws: Mapping[str, InputLaw]

    def of(self, data: Synthetic, real: Batches | None = None) -> Trust:
        """Trust in the feeds; CalibrationError for less than four real samples."""
        parts = dict(self._parts(data, real))
        return Trust(combined(parts), parts)

    def _parts(self, data: Synthetic, real: Batches | None) -> Iterator[tuple[str, float]]:
        names = self._names()
        seen = self._seen(data, names)
        whole = _intervals(seen)
        groups = sorted(set(data.groups))
        if len(groups) > 1:
            halves = (self._seen(_of_groups(data, groups[k::2]), names) for k in (0, 1))
            yield "seeds", overlap(*map(_intervals, halves))
        evidence = Evidence.of(self.model)
        if evidence.moments:
            distance = self._distance(data, evidence)
            yield "statistics", 1 / (1 + distance / _HALF_DISTANCE)
        if (self.model.find(Norms) or Norms({})).by_value:
            yield "bounds", covered(whole, self._bounds(names))
        if evidence.logits:
            yield from self._classes(data, evidence.logits)
        if real is not None:
            if real.samples < _FEWEST_REAL:
                message = f"{real.samples} real samples are too few to compare with"
                raise CalibrationError(message, hint=f"give at least {_FEWEST_REAL}")
            theirs = self._seen(real, names)
            yield "real", overlap(whole, _intervals(theirs))
            yield "moments", 1 / (1 + distance_of_moments(seen, theirs) / _HALF_DISTANCE)

    def _names(self) -> list[str]:
        """What a static kernel reads or writes and every float constant leaves open."""
        wanted = dict.fromkeys(s.value for s in ChooseKernels().statistics(self.model, self.ctx))
        made = {v.name: v for node in self.model.graph for v in node.outputs}
        floats = (n for n in wanted if n in made and (t := made[n].dtype) and t.is_floating_point())
        return [n for n in floats if made[n].shape is None or len(made[n].shape or ()) > 0]

    def _seen(self, data: Batches, names: Sequence[str]) -> Seen:
        found = sweep_ranges(self.model, self.ctx.evaluator, data, names, lambda *_: None)
        return {name: histogram for name, histogram in found.items() if histogram.total}

    def _bounds(self, names: Sequence[str]) -> Intervals:
        known = Propagation(self.model, _REACH)
        known.run(self.laws)
        return {name: interval(known.laws[name]) for name in names if name in known.laws}

    def _distance(self, data: Batches, evidence: Evidence) -> float:
        """Mean over norms of what channels are off by, weighted by variance.

        (μ - m)² / (σ² + s²) + ln²(s / σ), m and s over all feeds: a quarter of the deviation is as
        far from it as four times as much.
        """
        names = [moments.value for moments in evidence.moments]
        read = value_reader(self.model, self.ctx.evaluator, names)
        sums: dict[str, NDArray[np.float64]] = {}
        for feed in data:
            for name, array in read(feed).items():
                rows = np.moveaxis(array, 1, 0).reshape(array.shape[1], -1).astype(np.float64)
                added = [np.full(len(rows), rows.shape[1]), rows.sum(1), np.square(rows).sum(1)]
                sums[name] = sums.get(name, np.zeros(())) + np.stack(added)
        distances = []
        for moments in evidence.moments:
            count, total, squares = sums[moments.value]
            mean = total / count
            spread = np.sqrt(np.maximum(squares / count - mean * mean, 0.0))
            distances.append(_apart(mean, spread, moments))
        return float(np.mean(distances))

    def _classes(self, data: Batches, logits: str) -> Iterator[tuple[str, float]]:
        read = value_reader(self.model, self.ctx.evaluator, [logits])
        rows = np.concatenate([read(feed)[logits] for feed in data]).astype(np.float64)
        count = rows.shape[1]
        shifted = rows - rows.max(1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        entropy = -(np.exp(logs) * logs).sum(1).mean()
        yield "classes", len(set(rows.argmax(1).tolist())) / min(count, len(rows))
        yield "certainty", 1 - float(entropy) / math.log(count)


def _apart(mean: NDArray[np.float64], spread: NDArray[np.float64], wanted: Moments) -> float:
    deviation = np.maximum(wanted.deviation.astype(np.float64), _TINY)
    variance = np.square(deviation)
    moved = np.square(mean - wanted.mean) / (variance + np.square(spread))
    scaled = np.square(np.log(np.maximum(spread, _TINY) / deviation))
    off = moved + np.minimum(scaled, _FAR)
    return float((variance * off).sum() / variance.sum())


def _intervals(seen: Seen) -> Intervals:
    chosen = {n: choose_interval(h, "percentile", _PERCENTILE) for n, h in seen.items()}
    return {name: Range(*pair, *pair) for name, pair in chosen.items()}


def distance_of_moments(first: Seen, second: Seen) -> float:
    """Mean over values of (m - m')² / (s² + s'²) + ln²(s / s'), 9 at most for the deviations."""
    found = []
    for name in sorted(first.keys() & second.keys()):
        (mean, spread), (other, wide) = first[name].moments, second[name].moments
        spread, wide = max(spread, _TINY), max(wide, _TINY)
        off = (mean - other) ** 2 / (spread**2 + wide**2)
        found.append(off + min(math.log(spread / wide) ** 2, _FAR))
    return float(np.mean(found)) if found else 0.0


def combined(parts: Mapping[str, float]) -> float:
    """The geometric mean of the parts that count; 0 where there are none."""
    counted = [max(part, _TINY) for name, part in parts.items() if name != "certainty"]
    return math.exp(sum(map(math.log, counted)) / len(counted)) if counted else 0.0


def covered(ranges: Intervals, bounds: Intervals) -> float:
    """Geometric mean over values of the share of a bound that lies in the value's range.

    What a range leaves out is clipped, and one value that is mostly clipped ruins a model.
    """
    logs = []
    for name in sorted(ranges.keys() & bounds.keys()):
        a, b = ranges[name], bounds[name]
        both = max(min(a.high, b.high) - max(a.low, b.low), 0.0)
        share = both / (b.high - b.low) if b.high > b.low else 1.0
        logs.append(math.log(max(share, _LEAST_SHARE)))
    return math.exp(sum(logs) / len(logs)) if logs else 0.0


def overlap(first: Intervals, second: Intervals) -> float:
    """Mean share of the union of both intervals that lies in both, over values of both."""
    shares = []
    for name in sorted(first.keys() & second.keys()):
        a, b = first[name], second[name]
        union = max(a.high, b.high) - min(a.low, b.low)
        both = min(a.high, b.high) - max(a.low, b.low)
        shares.append(max(both, 0.0) / union if union > 0 else 1.0)
    return float(np.mean(shares)) if shares else 0.0


def _of_groups(data: Synthetic, groups: Sequence[int]) -> Synthetic:
    chosen: list[Feed] = [f for f, g in zip(data.feeds, data.groups, strict=True) if g in groups]
    return replace(data, feeds=tuple(chosen), groups=tuple(g for g in data.groups if g in groups))
