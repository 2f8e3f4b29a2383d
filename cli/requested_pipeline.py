"""The pipeline that a request names, with what the request says of its passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.cli.request import Request
from octavo.ir.constants import constant_behind
from octavo.ir.errors import UsageError
from octavo.passes.allocate import Allocate
from octavo.passes.collect_moments import CollectMoments
from octavo.passes.offer_options import OfferOptions
from octavo.passes.offer_structure import OfferStructure
from octavo.passes.pipeline import Pipeline
from octavo.passes.presets import PRESETS, preset
from octavo.passes.registry import PASSES

if TYPE_CHECKING:
    from octavo.ir.model import Model

# Where bytes do not count, other widths save nothing.
_FAST_BITS = (8, 4)


def pipeline_of(request: Request, calibrated: bool) -> Pipeline:
    """The preset or text that was asked for, with the float patterns of the request."""
    _check(request)
    planned = "structured" if request.structure else "mixed"
    default = planned if request.planned else "int8" if calibrated else "int8-dynamic"
    name = request.pipeline or default
    is_text = name in PASSES or any(mark in name for mark in ",{")
    pipeline = Pipeline.parse(name if is_text else preset(name))
    allocates = any(p.name == Allocate.name for p in pipeline.passes)
    if request.portable and not allocates:
        message = f"portable weights need a pipeline that allocates, '{name}' does not"
        raise UsageError(message, hint="leave the pipeline out, or use the preset mixed")
    if request.planned and not allocates:
        message = f"budgets need a pipeline that allocates, '{name}' does not"
        raise UsageError(message, hint="leave the pipeline out, or use the preset mixed")
    if request.structure and not any(p.name == OfferStructure.name for p in pipeline.passes):
        message = "structure is chosen where there is a budget and a pass that offers it"
        hint = "give a budget, as --latency 0.2x, and leave the pipeline out"
        raise UsageError(message, hint=hint)
    if request.profile and not allocates:
        message = "a recorded profile decides only where there is a budget"
        raise UsageError(message, hint="give a budget, as --size 20%, or --pipeline mixed")
    return _configured(pipeline, request)


def suited(pipeline: Pipeline, model: Model, request: Request) -> Pipeline:
    """The pipeline without what costs time to measure and is never chosen; only presets change.

    Static kernels where few bits meet a model that reads token ids: those that find ranges at run
    time are as fast on matrices of activations, and no range has to be calibrated, of which a
    decoder has thousands. Widths that no kernel is faster for where structure is to save time.
    """
    few_bits = any(pass_.name == CollectMoments.name for pass_ in pipeline.passes)
    if not few_bits or not _is_preset(request):
        return pipeline
    if request.structure and not _counts_bits(request):
        pipeline = pipeline.with_options(OfferOptions.name, bits=_FAST_BITS)
    if not _reads_tokens(model):
        return pipeline
    for name in ("choose-kernels", "offer-options"):
        pipeline = pipeline.with_options(name, static=False)
    return pipeline


def _counts_bits(request: Request) -> bool:
    """Whether a plan is better for weights of fewer bits, whatever kernel reads them."""
    budgets = request.size or request.bops or request.max_drop or request.portable
    return bool(budgets) or request.objective == "size" or request.pareto > 0 or request.top_k > 1


def _is_preset(request: Request) -> bool:
    return not request.pipeline or request.pipeline in PRESETS


def _reads_tokens(model: Model) -> bool:
    """Whether a table is looked up by a graph input."""
    return any(
        node.op_type == "Gather" and node.inputs[0] is not None
        and constant_behind(node.inputs[0]) is not None
        and node.inputs[1] is not None and node.inputs[1].is_graph_input()
        for node in model.graph
    )  # fmt: skip


def _check(request: Request) -> None:
    """Refuse a metric that would never be asked."""
    if not request.max_drop and (request.metric or request.goal != Request().goal):
        message = "a metric and a goal need to be told how far the metric may fall"
        raise UsageError(message, hint="give --max-drop")


def _configured(pipeline: Pipeline, request: Request) -> Pipeline:
    """The pipeline with the options of the request, where those of its text are the defaults."""
    if request.keep_float:
        for name in ("choose-kernels", "offer-options"):
            pipeline = pipeline.with_options(name, keep_float=request.keep_float)
    defaults = Request()
    wanted = {
        "allocate": {
            "objective": "objective", "memory": "memory", "bops": "bops",
            "max_damage": "max_damage", "top_k": "top_k", "pareto": "pareto",
        },
        "offer-options": {"portable": "portable"},
        "sensitivity": {"estimator": "estimator"},
        "refine": {"seconds": "refine_seconds"},
    }  # fmt: skip
    for name, options in wanted.items():
        given = {
            option: getattr(request, own)
            for option, own in options.items()
            if getattr(request, own) != getattr(defaults, own)
        }
        pipeline = pipeline.with_options(name, **given) if given else pipeline
    return pipeline
