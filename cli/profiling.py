"""Measure every kernel a model could use, once per device, and what plans are predicted to take."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, cast, final

from octavo.backends.bench import bench
from octavo.cli.target import backend_of
from octavo.ir.cache import cache_key
from octavo.ir.errors import UnknownName, UsageError
from octavo.ir.facts import FLOAT, Choice, Option, Plan, Range, Ranges
from octavo.ir.latency_table import NOMINAL_SECONDS_PER_BYTE, LatencyTable
from octavo.ir.menu import Menu
from octavo.ir.shapes import concrete_shapes
from octavo.ir.signature import option_key, signature
from octavo.ir.table_cost import TableCost
from octavo.passes.chains import find_chains, static_values
from octavo.passes.insert_fake_quant import InsertFakeQuant
from octavo.passes.latency import predicted_seconds
from octavo.passes.offer_options import OfferOptions
from octavo.passes.pipeline import Pipeline
from octavo.passes.place_quantizers import PlaceQuantizers

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.artifact import Artifact
    from octavo.ir.backend import Backend, Timing
    from octavo.ir.calibration import Feed
    from octavo.ir.facts import Method
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

Row = dict[str, float]
# Ranges do not change what a kernel costs.
_ANY_RANGE = Range(-1.0, 1.0, -1.0, 1.0)
_LABEL = "profile"
_RATES = ("quantize", "dequantize")
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_LINEAR = ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN")
_FORM = re.compile(r"weight-only:s([248])/block(16|32|64|128|256)")
_NOT_A_NAME = re.compile(r"\W+")


@final
@dataclass(frozen=True)
class Kind:
    """One way to compute, given to every node that has it: a method, and a weight-only form."""

    method: Method
    bits: int = 8
    block: int = 0

    def __str__(self) -> str:
        return f"{self.method}:s{self.bits}/block{self.block}" if self.block else self.method

    @staticmethod
    def parse(text: str) -> Kind:
        """The kind that `str` writes; UnknownName for any other text."""
        form = _FORM.fullmatch(text)
        if text in ("static", "dynamic"):
            return Kind(cast("Method", text))
        if form is None:
            raise UnknownName("way to compute", text, map(str, DEFAULT_KINDS))
        return Kind("weight-only", int(form[1]), int(form[2]))

    def plan(self, model: Model, ctx: PassContext) -> Plan:
        """This kind wherever the target offers it, float everywhere else; no node left out."""
        offers = OfferOptions(
            bits=(self.bits,),
            blocks=(self.block,),
            static=self.method == "static",
            dynamic=self.method == "dynamic",
            weight_only=self.method == "weight-only",
            storage=False,
        )
        menu = Pipeline((offers,)).run(model, ctx).model.fact(Menu)
        chosen: dict[str, Option] = {}
        for offered in menu.offers.values():
            for offer in offered:
                own = {n: o for n, o in offer.options.items() if o.method == self.method}
                chosen |= own
        chains = find_chains(model, ctx.target)
        static = [c for n, c in chains.items() if n in chosen and self.method == "static"]
        absorbed = {member.name for chain in static for member in chain.members[1:]}
        nodes = (node.name or "" for node in model.graph if node.name not in absorbed)
        return Plan({n: Choice(chosen.get(n, FLOAT), "profiled") for n in nodes}, "")


FLOAT_KIND = Kind("float")
DEFAULT_KINDS = (
    Kind("static"),
    Kind("dynamic"),
    Kind("weight-only", 8, 32),
    Kind("weight-only", 4, 32),
    Kind("weight-only", 4, 128),
    Kind("weight-only", 2, 128),
)
# What copies of a model with other shapes are measured in; other kernels scale as float does.
COPY_KINDS = (Kind("static"), Kind("dynamic"))


@final
@dataclass(frozen=True)
class Check:
    """Seconds that a whole file took, and what the table predicts for it."""

    kind: str
    predicted_seconds: float
    measured_seconds: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted_seconds / self.measured_seconds - 1


@final
@dataclass(frozen=True)
class Profiled:
    """What a model's nodes cost: the table of its signatures, how many nodes share each, checks.

    `checks` cover the files that were run now; what came from the cache was run before.
    """

    table: LatencyTable
    counts: Mapping[str, int]
    checks: tuple[Check, ...]
    cost: TableCost


def with_any_ranges(model: Model, ctx: PassContext) -> Model:
    """The model with an arbitrary range for every value that has none."""
    known = model.find(Ranges) or Ranges({}, "arbitrary", 0, "")
    missing = dict.fromkeys(static_values(model, ctx.target), _ANY_RANGE)
    return model.with_fact(replace(known, by_value={**missing, **known.by_value}))


def profile_model(
    model: Model,
    feed: Feed,
    ctx: PassContext,
    *,
    kinds: Sequence[Kind] = DEFAULT_KINDS,
    threads: int = 1,
    seconds_limit: float = 0.5,
) -> Profiled:
    """Measure what the cache lacks: each signature in float and in every kind that it has.

    `model` is canonicalized; `seconds_limit` bounds the runs of each kind. Nothing runs where
    the cache knows everything. Raises UsageError for a model without nodes.
    """
    if not len(model.graph):
        message = "the model has no node to measure"
        raise UsageError(message, where=model.source.name, why="all of it is constant")
    shapes = concrete_shapes(model, feed)
    signatures = {node.name or "": signature(node, shapes) for node in model.graph}
    rows: dict[str, Row] = {text: {} for text in signatures.values()}
    own = with_any_ranges(model, ctx)
    return _Work(own, feed, ctx, threads, seconds_limit, signatures, rows).run(kinds)


def with_neighbours(model: Model, plan: Plan, before: Timing, after: Timing) -> dict[str, float]:
    """Seconds of planned nodes, with what their kernels save or cost the float nodes around them.

    The runtime fuses a bias or a scale into one kernel in float and into another, or none, next
    to an integer kernel. What a float node around the planned ones then takes less or more is
    theirs, in equal parts; so a plan's seconds are those of its nodes as if nothing moved.
    """
    planned = {n for n, c in plan.by_node.items() if c.option.method != "float"}
    seconds = {name: s for name, s in after.by_node.items() if name in planned}
    movable = {n.name or "" for n in model.graph if n.op_type not in _LINEAR} - planned
    touched: dict[str, list[str]] = defaultdict(list)
    for node in model.graph:
        if node.name in seconds:
            for name in dict.fromkeys(_around(node)):
                if name in movable and name in plan.by_node:
                    touched[name].append(node.name or "")
    for name, owners in touched.items():
        moved = after.by_node.get(name, 0.0) - before.by_node.get(name, 0.0)
        for owner in owners:
            seconds[owner] += moved / len(owners)
    return seconds


def _around(node: onnx_ir.Node) -> Iterator[str]:
    """Names of the nodes a fusion could join with this one: two behind it, one before."""
    for value in node.inputs:
        made = value.producer() if value is not None else None
        if made is not None:
            yield made.name or ""
    for reader in node.successors():
        yield reader.name or ""
        yield from (behind.name or "" for behind in reader.successors())


@dataclass
class _Work:
    model: Model
    feed: Feed
    ctx: PassContext
    threads: int
    seconds_limit: float
    signatures: Mapping[str, str]
    rows: dict[str, Row]
    lost: set[tuple[str, str]] = field(default_factory=set)
    fresh: dict[tuple[str, str], None] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    built: dict[Kind, tuple[Plan, Artifact]] = field(default_factory=dict)

    @property
    def backend(self) -> Backend:
        return backend_of(self.ctx.target.name)

    def run(self, kinds: Sequence[Kind]) -> Profiled:
        plans = {kind: kind.plan(self.model, self.ctx) for kind in (FLOAT_KIND, *kinds)}
        missing = []
        for kind, plan in plans.items():
            found = {self._load(text, option) for (text, option), _ in self._keys(kind, plan)}
            if False in found:
                missing.append(kind)
        if missing:
            self._measure(missing, plans)
        return self._profiled()

    def _keys(self, kind: Kind, plan: Plan) -> Iterator[tuple[tuple[str, str], str]]:
        """Signature and option key of every node that computes in this kind, and its name."""
        for name, choice in plan.by_node.items():
            if choice.option.method == kind.method:
                yield (self.signatures[name], option_key(choice.option)), name

    def _measure(self, missing: Sequence[Kind], plans: Mapping[Kind, Plan]) -> None:
        """Time each kind against float, one after the other: a stop loses only the last one."""
        kinds = [kind for kind in missing if kind is not FLOAT_KIND]
        steps = len(kinds) + 2
        self.ctx.progress(_LABEL, 0, steps)
        base = self._lowered(FLOAT_KIND, plans[FLOAT_KIND])
        times: list[float] = []
        for done, kind in enumerate(kinds or [FLOAT_KIND], 1):
            files = [base] if kind is FLOAT_KIND else [base, self._lowered(kind, plans[kind])]
            timed = self.backend.time_nodes(
                files, self.feed, threads=self.threads, seconds_limit=self.seconds_limit
            )
            self._record(FLOAT_KIND, plans[FLOAT_KIND], timed[0].by_node)
            # A machine is faster or slower by the minute; float tells by how much.
            scale = self._float_seconds() / (sum(timed[0].by_node.values()) or 1.0)
            times.append(1 / (scale or 1.0))
            if kind is not FLOAT_KIND:
                seconds = with_neighbours(self.model, plans[kind], timed[0], timed[1])
                scaled = {name: own * scale for name, own in seconds.items()}
                self._record(kind, plans[kind], scaled)
                if kind.method == "static":
                    rates = [_rate(timed[1].quantizers.get(name)) for name in _QUANTIZERS]
                    self._store_rates([rate * scale for rate in rates])
            self.ctx.progress(_LABEL, done, steps)
        self._settle(min(times))

    def _settle(self, factor: float) -> None:
        """Scale what is new to the least of all times that float was measured at.

        Other work on the machine slows whole minutes, and only ever adds time. Nothing changes
        unless all of float is new: other figures of this device rest on what is known.
        """
        known = {text for text, row in self.rows.items() if "float" in row}
        if not all((text, "float") in self.fresh for text in known):
            return
        for text, option in list(self.fresh):
            self._store(text, option, self.rows[text][option] * factor)
        if self.rates:
            self._store_rates([rate * factor for rate in self.rates])

    def _lowered(self, kind: Kind, plan: Plan) -> Artifact:
        passes = (PlaceQuantizers(), InsertFakeQuant())
        planned = Pipeline(passes).run(self.model.with_fact(plan), self.ctx).model
        folder = self.ctx.workdir / _NOT_A_NAME.sub("-", str(kind))
        folder.mkdir(parents=True, exist_ok=True)
        artifact = self.backend.lower(planned, folder / "model.onnx")
        self.built[kind] = plan, artifact
        return artifact

    def _float_seconds(self) -> float:
        return sum(self.rows[text].get("float", 0.0) for text in self.signatures.values())

    def _record(self, kind: Kind, plan: Plan, measured: Mapping[str, float]) -> None:
        """Keep the mean over the nodes of a signature, so that the sum over nodes stays.

        A node without a kernel is part of another one's and takes no time of its own, unless it
        multiplies: then nothing is known.
        """
        nodes = {node.name or "": node for node in self.model.graph}
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        for key, name in self._keys(kind, plan):
            seconds = measured.get(name)
            if seconds is None and self.ctx.cost.macs(nodes[name]) == 0:
                seconds = 0.0
            found[key] += [] if seconds is None else [seconds]
        for (text, option), values in found.items():
            if not self._load(text, option):
                self._store(text, option, max(0.0, fmean(values)) if values else None)

    def _profiled(self) -> Profiled:
        rows = {text: row for text, row in self.rows.items() if row}
        table = LatencyTable(self.backend.environment(self.threads), rows, *self._rates())
        cost = TableCost.of(self.model, table, self.ctx.target, self.feed)
        checks = tuple(self._checks(cost))
        return Profiled(table, Counter(self.signatures.values()), checks, cost)

    def _checks(self, cost: TableCost) -> Iterator[Check]:
        """Predictions against the clock, in runs that the table does not rest on."""
        if not self.built:
            return
        files = [artifact.path for _, artifact in self.built.values()]
        limit = self.seconds_limit * len(files) / 2
        timed = bench(
            files,
            self.feed,
            threads=self.threads,
            seconds_limit=limit,
            sessions=lambda file: self.backend.open(file, threads=self.threads),
        )
        for (kind, (plan, _)), row in zip(self.built.items(), timed.rows, strict=True):
            seconds = predicted_seconds(self.model, plan, cost, self.ctx.target)
            yield Check(str(kind), seconds, row.median_seconds)

    def _load(self, text: str, key: str) -> bool:
        """Whether a latency is known, now or from the cache; `null` there says: not measurable."""
        if key in self.rows[text] or (text, key) in self.lost:
            return True
        stored = self.ctx.cache.get(self._cache_key(text, key)) if self.ctx.cache else None
        if stored is not None:
            self._keep(text, key, json.loads(stored))
        return stored is not None

    def _store(self, text: str, key: str, seconds: float | None) -> None:
        self._keep(text, key, seconds)
        if seconds is not None:
            self.fresh[text, key] = None
        if self.ctx.cache:
            self.ctx.cache.put(self._cache_key(text, key), json.dumps(seconds).encode())

    def _keep(self, text: str, key: str, seconds: float | None) -> None:
        if seconds is None:
            self.lost.add((text, key))
        else:
            self.rows[text][key] = seconds

    def _store_rates(self, rates: Sequence[float]) -> None:
        self.rates = tuple(rates)
        if self.ctx.cache:
            self.ctx.cache.put(self._cache_key(*_RATES), json.dumps(self.rates).encode())

    def _rates(self) -> tuple[float, ...]:
        stored = self.ctx.cache.get(self._cache_key(*_RATES)) if self.ctx.cache else None
        return self.rates or (tuple(json.loads(stored)) if stored is not None else ())

    def _cache_key(self, *parts: str) -> str:
        environment = self.backend.environment(self.threads)
        return cache_key("latency", self.ctx.target.name, environment, *parts)


def _rate(found: tuple[float, int] | None) -> float:
    """Seconds per byte of the float tensors that one operator (de)quantized."""
    seconds, moved = found or (0.0, 0)
    return seconds / moved if moved else NOMINAL_SECONDS_PER_BYTE
