"""Calibration data that octavo makes itself: on request, or where none was given and it can."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from octavo.ir.errors import OctavoError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from octavo.cli.progress import Progress
    from octavo.cli.request import Request
    from octavo.ir.cache import Cache
    from octavo.ir.calibration import Batches
    from octavo.ir.model import Model
    from octavo.ir.synthetic import Synthetic
    from octavo.passes.base import PassContext
    from octavo.passes.input_laws import InputLaw
    from octavo.passes.synthesis import Synthesis

SYNTHETIC, ANALYTIC, NONE = "synthetic", "analytic", "none"
_ANALYTIC_PRESET = "int8-analytic"
# What a compilation spends that was given no data; a model that takes longer compiles as before.
_UNASKED: Mapping[str, Any] = {"seconds": 60.0, "all_or_nothing": True}
_ENOUGH_TRUST = 0.7


@final
@dataclass(frozen=True)
class Chosen:
    """The calibration of a compilation, the request it leads to, and what to say of it."""

    batches: Batches | None
    request: Request
    notes: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Maker:
    """Makes data for one model, with a target to ask which ranges matter."""

    source: Model
    target: str
    seed: int
    cache: Cache | None
    progress: Progress

    def make(self, how: Synthesis, real: Batches | None = None) -> Synthetic:
        """Feeds and the trust in them. Raises what `Synthesis.run` does."""
        from octavo.passes.trust import Truster

        with self._context() as ctx:
            model = self._canonical(ctx)
            made = how.run(model, ctx)
            trust = Truster(model, ctx, how.laws).of(made, real)
        return replace(made, trust=trust)

    def unasked(self, how: Synthesis) -> str:
        """Why no data is made for this model unless somebody asks; empty where it is."""
        from octavo.passes.input_laws import laws_of
        from octavo.passes.token_inputs import TokenInputs

        if find_spec("torch") is None:
            return "torch is not installed"
        with self._context() as ctx:
            model = self._canonical(ctx)
            if TokenInputs.of(model) is not None:
                return "it reads token ids"
            from octavo.passes.evidence import Evidence

            laws = laws_of(model, how.laws)
            return Evidence.of(model).why_not(how.statistics, 0.0, laws)

    def assumed(self, given: Mapping[str, InputLaw]) -> list[tuple[str, InputLaw]]:
        """The laws of inputs that nobody gave one for.

        Raises UnknownName, and UsageError where these are all that would bound the model.
        """
        from octavo.ir.facts import Norms
        from octavo.passes.input_laws import laws_of

        with self._context() as ctx:
            model = self._canonical(ctx)
        found = [(name, law) for name, law in laws_of(model, given).items() if name not in given]
        norms = model.find(Norms)
        if found and not (norms and norms.by_value):
            raise UsageError(
                "no normalization bounds what this model computes",
                where=self.source.source.name,
                hint="say how its inputs are distributed: "
                + " ".join(f"--input '{name}={law}'" for name, law in found),
            )
        return found

    def _canonical(self, ctx: PassContext) -> Model:
        from octavo.passes.canonicalize import Canonicalize
        from octavo.passes.pipeline import Pipeline

        return Pipeline((Canonicalize(),)).run(self.source, ctx).model

    @contextmanager
    def _context(self) -> Iterator[PassContext]:
        from octavo.cli.target import backend_of
        from octavo.ir.cost import AnalyticCost
        from octavo.passes.base import PassContext

        backend = backend_of(self.target)
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as executor:
            yield PassContext(
                target=backend.target,
                cost=AnalyticCost(backend.target),
                evaluator=backend.evaluator(),
                executor=executor,
                workdir=Path(folder),
                seed=self.seed,
                cache=self.cache,
                progress=self.progress,
            )


def self_made(source: Model, seed: int) -> Synthetic:
    """Feeds as `octavo synthesize` makes them unless told otherwise, for any command.

    Raises what `Synthesis.run` does.
    """
    from octavo.cli.synthetic_options import SyntheticOptions
    from octavo.ir.cache import Cache, default_folder

    how = SyntheticOptions().synthesis(Path(source.source.name))
    maker = Maker(source, "ort-cpu", seed, Cache(default_folder()), lambda *_: None)
    return maker.make(how)


def chosen(named: str, maker: Maker, how: Synthesis, request: Request) -> Chosen:
    """Data for `synthetic`, ranges without data for `analytic`; for nothing, data if it is good.

    What the model does not support leaves a compilation without data as it was.
    """
    if named == NONE:
        return Chosen(None, request)
    if named == ANALYTIC:
        return _analytic(maker, how.laws, request)
    if named == SYNTHETIC:
        made = maker.make(how)
        return Chosen(made, request, tuple(_said(made)))
    return _by_default(maker, how, request)


def _analytic(maker: Maker, given: Mapping[str, InputLaw], request: Request) -> Chosen:
    """The preset without data, told how inputs are distributed.

    Raises UsageError where no norm and no given law bounds anything.
    """
    from octavo.passes.bound_ranges import BoundRanges
    from octavo.passes.presets import preset
    from octavo.passes.spec import format_pass

    if request.pipeline or request.planned:
        message = "ranges without data have a pipeline of their own"
        raise UsageError(message, hint="put bound-ranges into --pipeline, without --calibration")
    assumed = maker.assumed(given)
    notes = tuple(f"input '{n}' is taken as {law}; --input says otherwise" for n, law in assumed)
    if not given:
        return Chosen(None, replace(request, pipeline=_ANALYTIC_PRESET), notes)
    told = BoundRanges(inputs=tuple(f"{name}={law}" for name, law in given.items()))
    text = preset(_ANALYTIC_PRESET).replace(BoundRanges.name, format_pass(told))
    return Chosen(None, replace(request, pipeline=text), notes)


def _by_default(maker: Maker, how: Synthesis, request: Request) -> Chosen:
    if request.pipeline or request.max_drop or maker.unasked(how):
        return Chosen(None, request)
    how = replace(how, **_UNASKED)
    try:
        made = maker.make(how)
    except OctavoError as error:
        note = f"no data given, and none could be made: {error.what}"
        return Chosen(None, request, (note,))
    trust = made.trust
    if trust is None or trust.value < _ENOUGH_TRUST:
        text = trust.text if trust is not None else "0"
        note = f"data made from the model is not trusted ({text}): kernels without static ranges"
        return Chosen(None, request, (note,))
    return Chosen(made, request, ("no data given: made from the model", *_said(made)))


def _said(made: Synthetic) -> Iterator[str]:
    trust = "" if made.trust is None else f", trust {made.trust.text}"
    yield f"calibration data is {made.origin}, {made.samples} samples{trust}"
    yield from made.notes
