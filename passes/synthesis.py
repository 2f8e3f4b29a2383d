"""Calibration inputs from a model alone: optimised against what the graph says of its data.

ZeroQ (arXiv 2001.00281) matches the statistics of BatchNormalization, paired here by graph edge;
SynQ (arXiv 2603.18423) adds classes and a low-pass filter; PSAQ-ViT (arXiv 2203.02250) needs no
normalization, only attention, which is found by structure.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.cache import cache_key
from octavo.ir.errors import CalibrationError, UnknownName, UsageError
from octavo.ir.facts import Norms
from octavo.ir.synthetic import Origin, Synthetic
from octavo.ir.versions import versions
from octavo.passes.input_laws import InputLaw, laws_of
from octavo.passes.output_damage import OutputDamage

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.torch_synthesis import Moments, Objective, Outcome, Start
    from octavo.passes.base import PassContext

    Feed = dict[str, NDArray[np.generic]]

_FEED_SAMPLES = 8
_VIEWS = ("Cast", "Dropout", "Identity", "Reshape")


@final
@dataclass(frozen=True)
class Synthesis:
    """How inputs are made: `samples` in groups of `batch`, `steps` of size `rate` (deviations).

    The terms are those of `torch_synthesis.Terms`. `seconds` bounds the whole; `laws` and
    `shapes` say what the graph does not.
    """

    samples: int = 64
    batch: int = 32
    steps: int = 100
    rate: float = 0.1
    seconds: float = 300.0
    statistics: float = 1.0
    labels: float = 0.1
    entropy: float = 0.3
    variation: float = 0.1
    low_pass: float = 0.0
    roll: float = 0.0
    laws: Mapping[str, InputLaw] = field(default_factory=dict)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def run(self, model: Model, ctx: PassContext) -> Synthetic:
        """Feeds of a canonicalized model with its Norms, the same for the same seed.

        Inputs that no gradient reaches are sampled by their laws. Raises UsageError where
        nothing tells what inputs look like, NotDifferentiable, CalibrationError.
        """
        shapes, laws = self._shapes(model), laws_of(model, self.laws)
        _require_laws(model, laws)
        evidence = Evidence.of(model)
        entropy = self.entropy if not evidence.moments else 0.0
        how = replace(self, entropy=entropy)
        if evidence.why_not(how, laws):
            if set(self.laws) >= set(shapes):
                return self._sampled(shapes, laws, model, ctx)
            raise _unsupported(model, evidence.why_not(how, laws))
        return _Groups(how, model, ctx, evidence, shapes, laws).run()

    def _shapes(self, model: Model) -> dict[str, tuple[int, ...]]:
        """The shape of one group of every input."""
        for name in self.shapes:
            known = [value.name or "" for value in model.graph.inputs]
            if name not in known:
                raise UnknownName("input", name, known)
        batch = min(self.batch, self.samples)
        return {v.name or "": _shape(v, self.shapes, batch) for v in model.graph.inputs}

    def _sampled(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        laws: Mapping[str, InputLaw],
        model: Model,
        ctx: PassContext,
    ) -> Synthetic:
        feeds, groups = [], []
        for group in range(_rounds(self.samples, shapes)):
            drawn = _drawn(shapes, laws, model, ctx.rng(f"synthesis {group}"))
            for feed in _divided(drawn):
                feeds.append(feed)
                groups.append(group)
        note = "inputs are drawn from the given distributions; nothing else is known of them"
        return Synthetic(tuple(feeds), "sampled", tuple(groups), notes=(note,))


@final
@dataclass(frozen=True)
class Evidence:
    """What a graph knows of its inputs: statistics by value, attention, and the classes."""

    moments: tuple[Moments, ...]
    attended: tuple[str, ...]
    logits: str

    @staticmethod
    def of(model: Model) -> Evidence:
        """Read from Norms and the graph's structure."""
        from octavo.ir.torch_synthesis import Moments

        norms, made = model.find(Norms) or Norms({}), _made(model)
        found = {n: norm for n, norm in norms.by_value.items() if norm.kind == "batch"}
        moments = tuple(
            Moments(name, 1, norm.beta, np.abs(norm.gamma))
            for name, norm in found.items()
            if name in made
        )
        return Evidence(moments, tuple(_attended(model)), _logits(model))

    def why_not(self, how: Synthesis, laws: Mapping[str, InputLaw]) -> str:
        """Why inputs cannot be optimised; empty where they can."""
        if not any(law.kind != "ids" for law in laws.values()):
            return "no input is of floats"
        statistics = how.statistics and self.moments
        if not statistics and not (how.entropy and self.attended):
            return "no BatchNormalization statistics are stored, and there is no attention"
        return ""

    @property
    def origin(self) -> Origin:
        """What the feeds made with it are called."""
        return "synthetic-bn" if self.moments else "synthetic-attention"


@final
@dataclass(frozen=True)
class _Groups:
    """One synthesis: groups of samples, each from a seed of its own."""

    how: Synthesis
    model: Model
    ctx: PassContext
    evidence: Evidence
    shapes: Mapping[str, tuple[int, ...]]
    laws: Mapping[str, InputLaw]

    def run(self) -> Synthetic:
        from octavo.ir.torch_losses import one_thread

        feeds: list[Feed] = []
        groups: list[int] = []
        outcomes: list[Outcome] = []
        rounds, deadline = _rounds(self.how.samples, self.shapes), self._deadline()
        with one_thread():
            objective = self._objective()
            for group in range(rounds):
                left = deadline - time.monotonic()
                if outcomes and left <= 0:
                    break
                feed, outcome = self._group(objective, group, rounds, left / (rounds - group))
                outcomes.append(outcome)
                made = list(_divided(feed))
                feeds += made
                groups += [group] * len(made)
        distance = float(np.mean([outcome.distance for outcome in outcomes]))
        notes = tuple(_notes(outcomes, rounds))
        return Synthetic(tuple(feeds), self.evidence.origin, tuple(groups), distance, notes)

    def _deadline(self) -> float:
        return time.monotonic() + self.how.seconds

    def _objective(self) -> Objective:
        from octavo.ir.torch_module import differentiable
        from octavo.ir.torch_synthesis import Objective, Terms

        how, found = self.how, self.evidence
        moments = found.moments if how.statistics else ()
        attended = found.attended if how.entropy else ()
        logits = found.logits if how.labels else ""
        wanted = dict.fromkeys([*(m.value for m in moments), *attended, *filter(None, [logits])])
        terms = Terms(
            statistics=how.statistics, labels=how.labels, entropy=how.entropy,
            variation=how.variation, low_pass=how.low_pass, roll=how.roll,
        )  # fmt: skip
        return Objective(differentiable(self.model, list(wanted)), moments, attended, logits, terms)

    def _group(
        self, objective: Objective, group: int, rounds: int, seconds: float
    ) -> tuple[Feed, Outcome]:
        """One group, from the cache where an earlier run has made it."""
        from octavo.ir.torch_synthesis import Descent

        drawn = _drawn(self.shapes, self.laws, self.model, self.ctx.rng(f"synthesis {group}"))
        starts = self._starts(drawn)
        fixed = {name: array for name, array in drawn.items() if name not in starts}
        cache, key = self.ctx.cache, self._key(group)
        stored = cache.get(key) if cache is not None else None
        if stored is not None:
            arrays, outcome = _decode(stored)
        else:
            descent = Descent(self.how.steps, self.how.rate, seconds, self.ctx.seed + group)
            outcome = descent.run(objective, starts, fixed, self._progress(group, rounds))
            arrays = dict(outcome.arrays)
            if not np.isfinite(outcome.distance) and not outcome.steps:
                raise _diverged(self.model)
            if cache is not None and not outcome.late:
                cache.put(key, _encode(outcome))
        return {name: {**drawn, **arrays}[name] for name in drawn}, outcome

    def _progress(self, group: int, rounds: int) -> Callable[[int, int], None]:
        def report(done: int, steps: int) -> None:
            self.ctx.progress("synthesize", group * steps + done, rounds * steps)

        return report

    def _starts(self, drawn: Feed) -> dict[str, Start]:
        from octavo.ir.torch_synthesis import Start

        return {
            name: Start(drawn[name], law.deviation, law.low, law.high)
            for name, law in self.laws.items()
            if law.kind != "ids" and drawn[name].dtype.kind == "f"
        }

    def _key(self, group: int) -> str:
        options = repr(replace(self.how, seconds=0.0, samples=0))
        return cache_key(
            "synthesis", self.model.fingerprint, options, f"{self.ctx.seed} {group}",
            repr(self.shapes), repr(sorted(versions().items())),
        )  # fmt: skip


def _shape(
    value: onnx_ir.Value, shapes: Mapping[str, Sequence[int]], batch: int
) -> tuple[int, ...]:
    """The given shape with a free first axis set to the batch, or the declared one."""
    name, declared = value.name or "", list(value.shape) if value.shape is not None else None
    given = shapes.get(name)
    if declared is None and given is None:
        message = f"input '{name}' declares no shape"
        raise UsageError(message, hint=f"give --shape {name}=…")
    dims = list(given) if given is not None else declared or []
    free = declared is None or not declared or not isinstance(declared[0], int)
    found = [batch if k == 0 and free else dim for k, dim in enumerate(dims)]
    if any(not isinstance(dim, int) or dim < 1 for dim in found):
        known = "x".join(str(dim) if isinstance(dim, int) else "?" for dim in found)
        message = f"input '{name}' has a dimension without a size"
        raise UsageError(message, why=f"it is {value.shape}", hint=f"give --shape {name}={known}")
    return tuple(int(dim) for dim in found)  # type: ignore[call-overload]


def _rounds(samples: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    first = next((shape[0] for shape in shapes.values() if shape), 1)
    return max(1, -(-samples // first))


def _drawn(
    shapes: Mapping[str, tuple[int, ...]],
    laws: Mapping[str, InputLaw],
    model: Model,
    rng: np.random.Generator,
) -> Feed:
    types = {v.name or "": v.dtype.numpy() if v.dtype else np.float32 for v in model.graph.inputs}
    return {n: laws[n].sample(shape, np.dtype(types[n]), rng) for n, shape in shapes.items()}


def _divided(feed: Feed) -> Iterator[Feed]:
    """Feeds of a few samples each where all inputs count samples first."""
    counts = {array.shape[:1] for array in feed.values()}
    if len(counts) > 1 or not next(iter(counts), ()):
        yield feed
        return
    ((count,),) = counts
    for k in range(0, count, _FEED_SAMPLES):
        yield {name: array[k : k + _FEED_SAMPLES] for name, array in feed.items()}


def _made(model: Model) -> dict[str, onnx_ir.Value]:
    return {value.name or "": value for node in model.graph for value in node.outputs}


def _attended(model: Model) -> Iterator[str]:
    """What attention hands on: products with the probabilities of a Softmax on the left."""
    for node in model.graph:
        if node.op_type != "MatMul" or node.inputs[0] is None:
            continue
        maker = node.inputs[0].producer()
        while maker is not None and maker.op_type in _VIEWS and maker.inputs[0] is not None:
            maker = maker.inputs[0].producer()
        rank = node.outputs[0].shape.rank() if node.outputs[0].shape is not None else 0
        if maker is not None and maker.op_type == "Softmax" and rank in (3, 4):
            yield node.outputs[0].name or ""


def _logits(model: Model) -> str:
    """The first output if it holds one row of logits per sample, or what its Softmax reads."""
    value = model.graph.outputs[0]
    kind = OutputDamage.of(model).kinds.get(value.name or "")
    if value.shape is None or value.shape.rank() != 2:
        return ""
    maker = value.producer()
    if kind == "probabilities" and maker is not None and maker.op_type == "Softmax":
        return (maker.inputs[0].name or "") if maker.inputs[0] is not None else ""
    return (value.name or "") if kind == "logits" else ""


def _notes(outcomes: Sequence[Outcome], rounds: int) -> Iterator[str]:
    if any(outcome.late for outcome in outcomes) or len(outcomes) < rounds:
        steps = sum(outcome.steps for outcome in outcomes)
        yield f"the clock ended the synthesis after {steps} steps in {len(outcomes)} groups"
    if restarts := sum(outcome.restarts for outcome in outcomes):
        yield f"the optimisation was not finite and began again {restarts} time(s), more slowly"


def _encode(outcome: Outcome) -> bytes:
    content = io.BytesIO()
    how = np.array([outcome.distance, outcome.steps, outcome.restarts])
    names = list(outcome.arrays)
    arrays = {f"array_{k}": outcome.arrays[name] for k, name in enumerate(names)}
    np.savez(content, allow_pickle=False, how=how, names=np.array(names), **arrays)
    return content.getvalue()


def _decode(stored: bytes) -> tuple[Feed, Outcome]:
    from octavo.ir.torch_synthesis import Outcome

    with np.load(io.BytesIO(stored), allow_pickle=False) as content:
        names = [str(name) for name in content["names"]]
        arrays: Feed = {name: content[f"array_{k}"] for k, name in enumerate(names)}
        distance, steps, restarts = content["how"].tolist()
    return arrays, Outcome(arrays, distance, int(steps), int(restarts), late=False)


def _require_laws(model: Model, laws: Mapping[str, InputLaw]) -> None:
    for value in model.graph.inputs:
        if value.name not in laws:
            kind = value.dtype.name if value.dtype is not None else "unknown"
            message = f"input '{value.name}' is of {kind}, and nothing tells its range"
            raise UsageError(message, hint=f"give --input '{value.name}=ids(0,…)' with its largest")


def _unsupported(model: Model, why: str) -> UsageError:
    names = [value.name or "" for value in model.graph.inputs]
    given = " ".join(f"--input '{name}=normal(0,1)'" for name in names)
    return UsageError(
        "nothing in this model tells what its inputs look like",
        where=model.source.name,
        why=why,
        hint=f"say how they are distributed, as {given}, or give --calibration",
    )


def _diverged(model: Model) -> CalibrationError:
    return CalibrationError(
        "the optimisation of inputs is not finite, with smaller steps neither",
        where=model.source.name,
        hint="bound the inputs, as --input 'x=uniform(-2,2)'",
    )
