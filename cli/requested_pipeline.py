"""The pipeline that a request names, with what the request says of its passes."""

from __future__ import annotations

from octavo.cli.request import Request
from octavo.ir.errors import UsageError
from octavo.passes.allocate import Allocate
from octavo.passes.pipeline import Pipeline
from octavo.passes.presets import preset
from octavo.passes.registry import PASSES


def pipeline_of(request: Request, calibrated: bool) -> Pipeline:
    """The preset or text that was asked for, with the float patterns of the request."""
    default = "mixed" if request.planned else "int8" if calibrated else "int8-dynamic"
    name = request.pipeline or default
    is_text = name in PASSES or any(mark in name for mark in ",{")
    pipeline = Pipeline.parse(name if is_text else preset(name))
    if request.planned and not any(p.name == Allocate.name for p in pipeline.passes):
        message = f"budgets need a pipeline that allocates, '{name}' does not"
        raise UsageError(message, hint="leave the pipeline out, or use the preset mixed")
    return _configured(pipeline, request)


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
