"""Pipelines with a name. A preset is a text; whatever it does can be written out and changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.ir.errors import UnknownName

if TYPE_CHECKING:
    from collections.abc import Mapping

PRESETS: Mapping[str, str] = {
    "int8": "canonicalize,calibrate,choose-kernels,place-quantizers,insert-fake-quant",
    "fp8": (
        "canonicalize,calibrate{method=minmax},choose-kernels{static=false,float8=true},"
        "insert-fake-quant"
    ),
    "int8-analytic": "canonicalize,bound-ranges,choose-kernels,place-quantizers,insert-fake-quant",
    "mixed": (
        "canonicalize,fold-scales,halve-constants,calibrate,collect-moments,offer-options,"
        "sensitivity{rounding=gptq},allocate,refine,place-quantizers,insert-fake-quant,"
        "clip-weights,round-gptq,match-moments"
    ),
    "structured": (
        "canonicalize,fold-scales,halve-constants,calibrate,collect-moments,offer-options,"
        "sensitivity{rounding=gptq},offer-structure,allocate,refine,apply-structure,calibrate,"
        "collect-moments,place-quantizers,insert-fake-quant,clip-weights,round-gptq,match-moments"
    ),
    "int4": (
        "canonicalize,fold-scales,halve-constants,calibrate,collect-moments,"
        "choose-kernels{bits=4,block-size=64,output-block-size=32},place-quantizers,"
        "insert-fake-quant,clip-weights,round-gptq,match-moments"
    ),
    "int8-dynamic": "canonicalize,choose-kernels,insert-fake-quant",
    "nvfp4": (
        "canonicalize,calibrate,collect-moments,choose-kernels{static=false,float4=true},"
        "insert-fake-quant,clip-weights,round-gptq,match-moments"
    ),
}


def preset(name: str) -> str:
    """The pipeline text of a preset; UnknownName with near misses."""
    if name not in PRESETS:
        raise UnknownName("preset", name, PRESETS)
    return PRESETS[name]
