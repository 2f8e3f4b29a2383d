"""Calibration inputs from a model alone: optimised against what the graph says of its data.

ZeroQ (arXiv 2001.00281) matches the statistics of BatchNormalization, paired here by graph edge;
SynQ (arXiv 2603.18423) adds classes and a low-pass filter; PSAQ-ViT (arXiv 2203.02250) needs no
normalization, only attention, which is found by structure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, final

from octavo.ir.errors import UnknownName, UsageError
from octavo.ir.synthetic import Synthetic
from octavo.passes.evidence import Evidence
from octavo.passes.input_laws import InputLaw, laws_of
from octavo.passes.optimised_inputs import InputGroups, divided, draw, group_count
from octavo.passes.text_synthesis import TextSynthesis
from octavo.passes.token_inputs import TokenInputs, rows_selected

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.model import Model
    from octavo.ir.vocabulary import Vocabulary
    from octavo.passes.base import PassContext
    from octavo.passes.token_feeds import Prior


@final
@dataclass(frozen=True)
class Synthesis:
    """How inputs are made: `samples` in groups of `batch`, `steps` of size `rate` (deviations).

    The terms are those of `torch_synthesis.Terms`; `entropy` counts where no statistics are
    stored. Images `start` as leaves, or as noise of the input's law. Texts have up to `length`
    tokens of the `vocabulary`, drawn by `prior` where the model writes none. `seconds` bounds the
    whole, and with `all_or_nothing` what would not be finished then is an error after a few steps.
    `laws` and `shapes` say what the graph does not.
    """

    samples: int = 64
    batch: int = 32
    steps: int = 60
    rate: float = 0.1
    seconds: float = 300.0
    all_or_nothing: bool = False
    statistics: float = 1.0
    labels: float = 0.1
    focus: float = 0.5
    entropy: float = 0.3
    variation: float = 0.1
    low_pass: float = 0.0
    start: Literal["leaves", "noise"] = "leaves"
    roll: float = 0.0
    length: int = 128
    prior: Prior = "ranked"
    vocabulary: Vocabulary | None = None
    laws: Mapping[str, InputLaw] = field(default_factory=dict)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def run(self, model: Model, ctx: PassContext) -> Synthetic:
        """Feeds of a canonicalized model with its Norms, the same for the same seed.

        Inputs that no gradient reaches are sampled by their laws. Raises UsageError where
        nothing tells what inputs look like, NotDifferentiable, CalibrationError.
        """
        _check_names(model, self.laws, self.shapes)
        _check_rows(model, self.laws)
        tokens = TokenInputs.of(model)
        if tokens is not None and not set(self.laws) >= set(tokens.roles):
            return TextSynthesis(self, tokens, ctx).run()
        laws = laws_of(model, self.laws)
        _require_laws(model, laws)
        # Two groups at least, so that they can be compared.
        batch = min(self.batch, -(-self.samples // 2))
        shapes = {v.name or "": _shape(v, self.shapes, batch) for v in model.graph.inputs}
        how, evidence = self.suited(model), Evidence.of(model)
        why = evidence.why_not(how.statistics, how.entropy, laws)
        if not why:
            return InputGroups(how, model, ctx, evidence, shapes, laws).run()
        if set(self.laws) >= set(shapes):
            return self._sampled(shapes, laws, model, ctx)
        raise _unsupported(model, why)

    def suited(self, model: Model) -> Synthesis:
        """Without the entropy of patches where statistics say more."""
        known = self.statistics and Evidence.of(model).moments
        return replace(self, entropy=0.0) if known else self

    def _sampled(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        laws: Mapping[str, InputLaw],
        model: Model,
        ctx: PassContext,
    ) -> Synthetic:
        feeds, groups = [], []
        for group in range(group_count(self.samples, shapes)):
            made = list(divided(draw(shapes, laws, model, ctx.rng(f"synthesis {group}"))))
            feeds += made
            groups += [group] * len(made)
        note = "inputs are drawn from the given distributions; nothing else is known of them"
        return Synthetic(tuple(feeds), "sampled", tuple(groups), notes=(note,))


def _check_names(
    model: Model, laws: Mapping[str, InputLaw], shapes: Mapping[str, Sequence[int]]
) -> None:
    known = [value.name or "" for value in model.graph.inputs]
    for name in (*laws, *shapes):
        if name not in known:
            raise UnknownName("input", name, known)


def _check_rows(model: Model, laws: Mapping[str, InputLaw]) -> None:
    """UsageError for ids that select rows which a table lacks."""
    for value in model.graph.inputs:
        law, rows = laws.get(value.name or ""), rows_selected(value)
        if law is not None and rows is not None and law.high >= rows:
            message = f"input '{value.name}' selects from {rows} rows, and {law} goes beyond"
            raise UsageError(message, hint=f"give --input '{value.name}=ids(0,{rows - 1})'")


def _shape(
    value: onnx_ir.Value, shapes: Mapping[str, Sequence[int]], batch: int
) -> tuple[int, ...]:
    """The given shape with a free first axis set to the batch, or the declared one."""
    name, declared = value.name or "", list(value.shape) if value.shape is not None else None
    given = shapes.get(name)
    if declared is None and given is None:
        message = f"input '{name}' declares no shape"
        raise UsageError(message, hint=f"give --shape {name}=…")
    dims: list[object] = list(given) if given is not None else list(declared or ())
    if dims and (not declared or not isinstance(declared[0], int)):
        dims[0] = batch
    sizes = tuple(dim for dim in dims if isinstance(dim, int) and dim > 0)
    if len(sizes) < len(dims):
        known = "x".join(str(dim) if isinstance(dim, int) else "?" for dim in dims)
        message = f"input '{name}' has a dimension without a size"
        raise UsageError(message, why=f"it is {value.shape}", hint=f"give --shape {name}={known}")
    return sizes


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
