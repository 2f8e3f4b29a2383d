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
from octavo.passes.clipping import ClipMethod, choose_interval, depends_on_grid
from octavo.passes.spec import format_pass
from octavo.passes.sweep import sweep_ranges

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

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
        batches = ctx.calibration
        if batches.samples > self.max_samples:
            batches = _First(batches, self.max_samples)
        names = _measurable(model, ctx)
        keys = {name: self._key(model, ctx, batches, name) for name in names}
        found = _known(ctx, keys)
        if len(found) == len(names):
            ctx.remark("note", "", "the ranges are known from an earlier run: no sweep")
        else:
            # Another target asks for other values: only they are swept.
            found |= self._measure(model, ctx, batches, [n for n in names if n not in found])
            _store(ctx, {keys[name]: found[name] for name in names})
        by_value = {name: known for name in names if (known := found[name]) is not None}
        return model.with_fact(Ranges(by_value, self.method, batches.samples, batches.sha256))

    def _measure(
        self, model: Model, ctx: PassContext, batches: Batches, names: Sequence[str]
    ) -> dict[str, Range | None]:
        """The range of every named value, `None` for one that the data leaves empty."""
        found: dict[str, Range | None] = {}
        histograms = sweep_ranges(model, ctx.evaluator, batches, names, ctx.progress)
        for name, histogram in histograms.items():
            if histogram.total == 0:
                ctx.remark("missed", name, "the calibration data leaves this value empty")
                found[name] = None
                continue
            if histogram.low == histogram.high:
                ctx.remark("note", name, "constant on all calibration data", value=histogram.low)
            grid = ctx.target.activation_grid
            low, high = choose_interval(histogram, self.method, self.percentile, grid)
            found[name] = Range(low, high, histogram.low, histogram.high)
            ctx.count("ranges")
        return found

    def _key(self, model: Model, ctx: PassContext, batches: Batches, name: str) -> str:
        installed = json.dumps(versions(), sort_keys=True)
        parts = [model.fingerprint, batches.sha256, format_pass(self), installed, name]
        if depends_on_grid(self.method):
            parts.append(repr(ctx.target.activation_grid))
        return cache_key("range", *parts)


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


def _known(ctx: PassContext, keys: Mapping[str, str]) -> dict[str, Range | None]:
    """What earlier runs found, by value."""
    if ctx.cache is None:
        return {}
    stored = {name: ctx.cache.get(key) for name, key in keys.items()}
    return {name: _decode(content) for name, content in stored.items() if content is not None}


def _store(ctx: PassContext, found: Mapping[str, Range | None]) -> None:
    if ctx.cache is None:
        return
    for key, known in found.items():
        ctx.cache.put(key, _encode(known))


def _encode(found: Range | None) -> bytes:
    return json.dumps(None if found is None else astuple(found)).encode()


def _decode(stored: bytes) -> Range | None:
    numbers = json.loads(stored)
    return None if numbers is None else Range(*numbers)
