"""Measure what every offer does to the outputs, one decision at a time, without gradients.

The values in front of a decision are computed once and rounded instead of the graph, and only
what depends on them runs again. No session is made per offer: weights are inputs.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.cache import cache_key
from octavo.ir.calibration import first_samples, samples_of
from octavo.ir.facts import Ranges
from octavo.ir.menu import Damage, Sensitivity
from octavo.ir.versions import versions
from octavo.passes.activation_rounding import ActivationRounding
from octavo.passes.chains import static_values
from octavo.passes.offered_rounding import OfferedRounding, Trial, offered_roundings, static_trial
from octavo.passes.output_damage import OutputDamage, summary
from octavo.passes.rounding import rounding_of
from octavo.passes.suffix import Flow, Suffix

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.output_damage import Metric

    Array = NDArray[np.generic]
    Values = dict[str, Array]

# Trials that round one activation are named after it.
_VALUE = "value "
# What lies in front of a decision is kept up to this size while its offers are tried.
_KEPT_BYTES = 96 << 20


def measure_damage(
    model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric
) -> Sensitivity:
    """Damage of every offer of the menu and of every static quantizer, on `limit` samples.

    Forward only: KL or normalised error of the outputs with that one change (ZeroQ, section 3.2,
    arXiv 2001.00281; AdaQuant's integer programme, arXiv 2006.10518). Interrupted work resumes
    decision by decision from the cache.
    """
    begin = time.perf_counter()
    study = _Study.of(model, ctx, batches, limit, metric)
    jobs = list(study.jobs())
    done = _Progress(ctx, len(jobs))

    def run(job: _Job) -> Mapping[str, Damage]:
        found = study.resumed(job)
        done.step()
        return found

    found: dict[str, Damage] = {}
    for damages in ctx.executor.map(run, jobs):
        found |= damages
    by_value = {k.removeprefix(_VALUE): d for k, d in found.items() if k.startswith(_VALUE)}
    roundings = study.roundings.items()
    by_group = {name: rounding.damages(found) for name, rounding in roundings}
    seconds = time.perf_counter() - begin
    return Sensitivity(by_group, by_value, "measured", study.damage.text, study.samples, seconds)


@final
@dataclass
class _Progress:
    """Counts decisions that are done, from several threads."""

    ctx: PassContext
    total: int
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self) -> None:
        with self.lock:
            self.done += 1
            self.ctx.progress("measure damage", self.done, self.total)


@final
@dataclass(frozen=True)
class _Job:
    """One suffix of the graph, the weights it is fed, and what to try, by name."""

    suffix: Suffix
    constants: Mapping[str, Array]
    trials: Mapping[str, Trial]


@final
@dataclass(frozen=True)
class _Study:
    """Everything the jobs share."""

    model: Model
    ctx: PassContext
    damage: OutputDamage
    feeds: Sequence[Feed]
    references: Sequence[Mapping[str, Array]]
    roundings: Mapping[str, OfferedRounding]
    activations: ActivationRounding
    digest: str

    @staticmethod
    def of(model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric) -> _Study:
        damage = OutputDamage.of(model, metric)
        feeds = tuple(first_samples(batches, limit))
        run = ctx.evaluator.load(model)
        references = tuple({n: a for n, a in run(f).items() if n in damage.kinds} for f in feeds)
        activations = ActivationRounding(ctx.evaluator)
        roundings = offered_roundings(model, ctx.target, activations)
        ranges = model.find(Ranges)
        calibration = ranges.calibration_sha256 + ranges.method if ranges is not None else ""
        parts = (
            model.fingerprint,
            batches.sha256,
            str(limit),
            damage.text,
            calibration,
            rounding_of(model),
        )
        digest = cache_key("damage", *parts, repr(sorted(versions().items())))
        return _Study(model, ctx, damage, feeds, references, roundings, activations, digest)

    @property
    def samples(self) -> int:
        return sum(map(samples_of, self.feeds))

    def jobs(self) -> Iterator[_Job]:
        """One job per group, then one for every value that no group's job could round."""
        flow = Flow(self.model)
        pending = self._pending()
        for rounding in self.roundings.values():
            readers = (r for value in rounding.operands for r in value.consumers())
            suffix = flow.suffix([*rounding.nodes, *_top(readers, flow)])
            values = self._values_of(suffix, pending)
            if rounding.trials or values:
                yield _Job(suffix, rounding.constants, {**rounding.trials, **values})
        while pending:
            value = next(iter(pending.values()))
            suffix = flow.suffix(_top(value.consumers(), flow))
            values = self._values_of(suffix, pending)
            if values:
                yield _Job(suffix, {}, values)
            pending.pop(value.name or "", None)

    def _pending(self) -> dict[str, onnx_ir.Value]:
        """Values with a range that a static kernel could read or write, and that somebody reads."""
        ranges = self.model.find(Ranges)
        wanted = static_values(self.model, self.ctx.target) if ranges is not None else []
        known = ranges.by_value if ranges is not None else {}
        made = [*self.model.graph.inputs, *(v for n in self.model.graph for v in n.outputs)]
        values = {v.name or "": v for v in made}
        return {n: values[n] for n in wanted if n in known and values[n].consumers()}

    def _values_of(self, suffix: Suffix, pending: dict[str, onnx_ir.Value]) -> dict[str, Trial]:
        """Trials that round one value of the boundary each; they are no longer pending."""
        trials: dict[str, Trial] = {}
        for name in suffix.boundary:
            value = pending.get(name)
            if value is not None and suffix.holds_readers(value):
                del pending[name]
                found = self.model.fact(Ranges).by_value[name]
                grid = self.ctx.target.activation_grid
                trials[f"{_VALUE}{name}"] = static_trial(name, found, self.activations, grid)
        return trials

    def resumed(self, job: _Job) -> Mapping[str, Damage]:
        """The damages of a job, trial by trial from the cache where another target did it."""
        cache, read = self.ctx.cache, repr((*job.suffix.boundary, *job.constants))
        if cache is None:
            return self._run(job)
        grid = repr(self.ctx.target.activation_grid)
        # What rounding a value does depends on no suffix, as all of its readers are in any.
        parts = {n: grid if n.startswith(_VALUE) else read for n in job.trials}
        keys = {n: cache_key("damage trial", self.digest, n, p) for n, p in parts.items()}
        stored = {name: cache.get(key) for name, key in keys.items()}
        known = {n: Damage(*json.loads(text)) for n, text in stored.items() if text is not None}
        trials = {name: trial for name, trial in job.trials.items() if name not in known}
        fresh = self._run(replace(job, trials=trials)) if trials else {}
        for name, damage in fresh.items():
            cache.put(keys[name], json.dumps(astuple(damage)).encode())
        return {name: fresh[name] if name in fresh else known[name] for name in job.trials}

    def _run(self, job: _Job) -> Mapping[str, Damage]:
        if not job.suffix.outputs:
            return dict.fromkeys(job.trials, Damage(0.0))
        run = self.ctx.evaluator.load(job.suffix.runnable(job.constants))
        rows: dict[str, list[NDArray[np.float64]]] = {name: [] for name in job.trials}
        kept: dict[str, Values] = {}
        for chunk in self._chunks(job):
            for name, trial in job.trials.items():
                weights = kept.get(name) or {**job.constants, **trial.weights()}
                if (
                    sum(a.nbytes for w in (*kept.values(), weights) for a in w.values())
                    < _KEPT_BYTES
                ):
                    kept[name] = weights
                for index, fed in chunk:
                    outputs = run({**fed, **weights, **trial.activations(fed)})
                    count = samples_of(self.feeds[index])
                    scored = self.damage.per_sample(self.references[index], outputs, count)
                    rows[name].append(scored)
        return {name: summary(np.concatenate(found)) for name, found in rows.items()}

    def _chunks(self, job: _Job) -> Iterator[list[tuple[int, Values]]]:
        """Feeds with what the suffix reads of each, as many at a time as memory allows."""
        before = job.suffix.before(value.name or "" for value in self.model.graph.inputs)
        compute = self.ctx.evaluator.load(before) if before is not None else None
        needed = [v.name or "" for v in before.graph.inputs] if before is not None else []
        chunk: list[tuple[int, Values]] = []
        size = 0
        for index, feed in enumerate(self.feeds):
            fed: Values = {n: np.asarray(feed[n]) for n in job.suffix.boundary if n in feed}
            if compute is not None:
                fed |= compute({name: feed[name] for name in needed})
            chunk.append((index, fed))
            size += sum(array.nbytes for array in fed.values())
            if size > _KEPT_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk


def _top(nodes: Iterable[onnx_ir.Node], flow: Flow) -> Iterator[onnx_ir.Node]:
    """The nodes of the top-level graph among some; a body's node is in its owner's suffix."""
    return (node for node in nodes if flow.nodes.get(node.name or "") is node)
