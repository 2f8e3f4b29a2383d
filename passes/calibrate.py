"""Observe activations on calibration data and choose the interval each quantizer shall cover."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, final

import onnx_ir

from octavo.ir.cache import cache_key
from octavo.ir.facts import Fact, Range, Ranges
from octavo.ir.versions import versions
from octavo.passes.base import Pass
from octavo.passes.clipping import ClipMethod, choose_interval
from octavo.passes.spec import format_pass
from octavo.passes.sweep import sweep_ranges

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext


@final
@dataclass(frozen=True)
class Calibrate(Pass):
    """Measure the ranges that later passes asked for, in one sweep over the calibration data.

    **What it does.** The model runs with probes that return the exact extremes of each value and
    an even sample of its elements. Histograms of the samples grow by powers of two, so memory is
    bounded whatever the number of samples. From each, the method chooses the interval.
    **Why.** A static integer kernel needs its activation range when it is compiled.
    **When it does not apply.** No calibration data: a note, and no ranges. Integer, boolean,
    string and scalar values have no range.
    **Cost and accuracy.** About twice the float inference. Extremes are exact; a percentile is
    exact on the sample within one bin, 1/2048 of the range at most.
    """

    name = "calibrate"
    produces = (Ranges,)
    preserves = (Fact,)

    method: ClipMethod = "percentile"
    percentile: float = 99.99
    max_samples: int = 512

    def run(self, model: Model, ctx: PassContext) -> Model:
        if ctx.calibration is None:
            ctx.remark("note", "", "no calibration data: no activation ranges")
            return model
        names = _measurable(model, ctx)
        key = self._key(model, ctx.calibration, names)
        stored = ctx.cache.get(key) if ctx.cache is not None else None
        if stored is not None:
            ctx.remark("note", "", "the ranges are known from an earlier run: no sweep")
            return model.with_fact(_decode(stored))
        ranges = self._measure(model, ctx, ctx.calibration, names)
        if ctx.cache is not None:
            ctx.cache.put(key, _encode(ranges))
        return model.with_fact(ranges)

    def _measure(
        self, model: Model, ctx: PassContext, batches: Batches, names: Sequence[str]
    ) -> Ranges:
        if batches.samples > self.max_samples:
            batches = _First(batches, self.max_samples)
        by_value: dict[str, Range] = {}
        histograms = sweep_ranges(model, ctx.evaluator, batches, names, ctx.progress)
        for name, histogram in histograms.items():
            if histogram.total == 0:
                ctx.remark("missed", name, "the calibration data leaves this value empty")
                continue
            if histogram.low == histogram.high:
                ctx.remark("note", name, "constant on all calibration data", value=histogram.low)
            low, high = choose_interval(histogram, self.method, self.percentile)
            by_value[name] = Range(low, high, histogram.low, histogram.high)
            ctx.count("ranges")
        return Ranges(by_value, self.method, batches.samples, batches.sha256)

    def _key(self, model: Model, batches: Batches, names: Sequence[str]) -> str:
        installed = json.dumps(versions(), sort_keys=True)
        return cache_key(
            "ranges", model.fingerprint, batches.sha256, format_pass(self), installed, *names
        )


@final
@dataclass(frozen=True)
class _First:
    """The first feeds of other batches, as many as hold `samples` samples."""

    batches: Batches
    samples: int

    @property
    def sha256(self) -> str:
        return self.batches.sha256

    @property
    def labels(self) -> NDArray[np.generic] | None:
        labels = self.batches.labels
        return labels if labels is None else labels[: self.samples]

    def __iter__(self) -> Iterator[Feed]:
        seen = 0
        for feed in self.batches:
            yield feed
            shape = next(iter(feed.values())).shape
            seen += shape[0] if shape else 1
            if seen >= self.samples:
                return


def _measurable(model: Model, ctx: PassContext) -> tuple[str, ...]:
    """The values that later passes want a range of and that have one."""
    values = {v.name: v for v in model.graph.inputs}
    values |= {v.name: v for node in model.graph for v in node.outputs}
    wanted = dict.fromkeys(s.value for s in ctx.statistics if s.kind == "range")
    reasons = {name: _no_range(values.get(name)) for name in wanted}
    for name, reason in reasons.items():
        if reason:
            ctx.remark("missed", name, reason)
    return tuple(name for name, reason in reasons.items() if not reason)


def _no_range(value: onnx_ir.Value | None) -> str:
    if value is None:
        return "no value of the main graph has this name"
    if value.dtype is not None and not value.dtype.is_floating_point():
        return f"{value.dtype.name} values have no range"
    if value.shape is not None and value.shape.rank() == 0:
        return "a scalar has no range"
    return ""


def _encode(ranges: Ranges) -> bytes:
    by_value = {name: astuple(found) for name, found in ranges.by_value.items()}
    fields = [ranges.method, ranges.samples, ranges.calibration_sha256]
    return json.dumps([by_value, *fields]).encode()


def _decode(stored: bytes) -> Ranges:
    by_value, *fields = json.loads(stored)
    return Ranges({name: Range(*found) for name, found in by_value.items()}, *fields)
