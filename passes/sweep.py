"""One sweep over the calibration data that fills a histogram per value."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.errors import CalibrationError
from octavo.passes.histogram import Histogram, merge
from octavo.passes.range_probe import Observation, build_probe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from octavo.ir.calibration import Batches
    from octavo.ir.evaluate import Evaluator
    from octavo.ir.model import Model

# Elements per value that all feeds show together; a percentile of 99.99 rests on 13 of them.
_ELEMENTS = 1 << 17
_LEAST_PER_FEED = 2048
# Samples of all values wait together until they are worth a histogram each: 16 MB.
_WAITING_ELEMENTS = 1 << 22


def sweep_ranges(
    model: Model,
    evaluator: Evaluator,
    batches: Batches,
    names: Sequence[str],
    progress: Callable[[str, int, int], None],
) -> dict[str, Histogram]:
    """A histogram of each named float value over all feeds, with exact extremes.

    Raises CalibrationError that names the first value which is not finite.
    """
    if not names:
        return {}
    # All feeds are about as large as the first.
    first = next(iter(batches), {})
    per_feed = next((a.shape[0] for a in first.values() if a.shape), 1)
    limit = max(_LEAST_PER_FEED, _ELEMENTS * per_feed // max(batches.samples, 1))
    probe = build_probe(model, names, limit, first)
    collected = _Collected({name: Histogram.empty() for name in names})
    stream = evaluator.stream(probe.model, batches, probe.outputs)
    for feed, arrays in enumerate(stream, start=1):
        for index, name in enumerate(names):
            collected.add(name, probe.read(arrays, index), feed)
        progress("calibrate", min(feed * per_feed, batches.samples), batches.samples)
    return collected.settle()


@final
@dataclass
class _Collected:
    """Histograms, and the samples that are not in them yet."""

    histograms: dict[str, Histogram]
    waiting: dict[str, list[Observation]] = field(default_factory=dict)
    elements: int = 0

    def add(self, name: str, observation: Observation, feed: int) -> None:
        if observation.sample.size == 0:
            return
        if not math.isfinite(observation.low + observation.high):
            raise _not_finite(name, feed)
        self.waiting.setdefault(name, []).append(observation)
        self.elements += observation.sample.size
        if self.elements > _WAITING_ELEMENTS:
            self.settle()

    def settle(self) -> dict[str, Histogram]:
        """Move what waits into the histograms."""
        for name, seen in self.waiting.items():
            sample = np.concatenate([observation.sample for observation in seen])
            low, high = min(o.low for o in seen), max(o.high for o in seen)
            found = Histogram.of(sample).observing(low, high)
            self.histograms[name] = merge(self.histograms[name], found)
        self.waiting.clear()
        self.elements = 0
        return self.histograms


def _not_finite(name: str, feed: int) -> CalibrationError:
    return CalibrationError(
        f"the value '{name}' is not finite on the calibration data",
        where=f"feed {feed}",
        why="the float model overflows or divides by zero on this input",
        hint="check --preprocess and the data, or leave the sample out",
    )
