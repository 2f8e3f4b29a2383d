"""The commands that build an engine from a lowered file, for Python and for trtexec."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.backends.bench import random_feed
from octavo.backends.trt_target import PART_OF
from octavo.ir.artifact_io import MODEL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo.ir.model import Model
    from octavo.ir.target import Target

SCRIPT, SHELL = "build_engine.py", "build_engine.sh"
ENGINE, TIMING_CACHE, LAYERS = "model.engine", "timing.cache", "layers.json"
# How far from a typical size a dynamic dimension may go: eight samples, four times the length.
_MOST_SAMPLES, _MOST_LENGTH = 8, 4


@final
@dataclass(frozen=True)
class Shapes:
    """The least, typical and largest shape of an input: one optimisation profile."""

    least: tuple[int, ...]
    typical: tuple[int, ...]
    most: tuple[int, ...]


def profiles(model: Model) -> dict[str, Shapes]:
    """The shapes of every input with a dynamic dimension, by name; typical ones are 1 sample."""
    found = {}
    feed = random_feed(model)
    for value in model.graph.inputs:
        name, declared = value.name or "", list(value.shape or ())
        if name not in feed or all(isinstance(d, int) for d in declared):
            continue
        typical = feed[name].shape
        sizes = list(zip(declared, typical, strict=True))
        least = tuple(size if isinstance(d, int) else min(1, size) for d, size in sizes)
        most = tuple(
            size if isinstance(d, int) else _most(axis, size)
            for axis, (d, size) in enumerate(sizes)
        )
        found[name] = Shapes(least, tuple(typical), most)
    return found


def _most(axis: int, size: int) -> int:
    return size * _MOST_SAMPLES if axis == 0 else max(1, size) * _MOST_LENGTH


def build_files(model: Model, target: Target) -> dict[str, str]:
    """The two scripts, by file name; both run in the folder of the model, on the device."""
    found = profiles(model)
    return {SCRIPT: _script(found, target), SHELL: _shell(found, target)}


def _script(found: Mapping[str, Shapes], target: Target) -> str:
    shapes = {name: [list(s.least), list(s.typical), list(s.most)] for name, s in found.items()}
    return _SCRIPT.format(
        target=target.name,
        model=MODEL,
        engine=ENGINE,
        cache=TIMING_CACHE,
        layers=LAYERS,
        sparse=_SPARSE if PART_OF[target.name].sparse else "",
        shapes=json.dumps(shapes, indent=4),
    )


def _shell(found: Mapping[str, Shapes], target: Target) -> str:
    options = [
        f"--onnx={MODEL}",
        f"--saveEngine={ENGINE}",
        f"--timingCacheFile={TIMING_CACHE}",
        "--profilingVerbosity=detailed",
        "--dumpLayerInfo",
        f"--exportLayerInfo={LAYERS}",
    ]
    if PART_OF[target.name].sparse:
        options.append("--sparsity=enable")
    for option, pick in (("min", "least"), ("opt", "typical"), ("max", "most")):
        texts = [f"{n}:{'x'.join(map(str, getattr(s, pick)))}" for n, s in found.items()]
        options += [f"--{option}Shapes={','.join(texts)}"] if texts else []
    lines = " \\\n    ".join(f"'{option}'" for option in options)
    return f'#!/bin/sh\n# Builds and times an engine for {target.name}, on the device.\n\
cd "$(dirname "$0")"\ntrtexec {lines}\n'


# Weights with two zeros of four run twice as fast where all of a kernel's are so.
_SPARSE = "config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)\n"
_SCRIPT = '''"""Builds an engine for {target}; run it on the device, with TensorRT 11 installed."""

import json
from pathlib import Path

import tensorrt as trt

# Smallest, typical and largest shape of every input with a dynamic dimension.
SHAPES = {shapes}

folder = Path(__file__).resolve().parent
logger = trt.Logger(trt.Logger.WARNING)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(str(folder / "{model}")):
    raise SystemExit("\\n".join(parser.get_error(k).desc() for k in range(parser.num_errors)))
config = builder.create_builder_config()
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
{sparse}if SHAPES:
    profile = builder.create_optimization_profile()
    for name, (least, typical, most) in SHAPES.items():
        profile.set_shape(name, least, typical, most)
    config.add_optimization_profile(profile)
timings = folder / "{cache}"
cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
config.set_timing_cache(cache, ignore_mismatch=False)
serialized = builder.build_serialized_network(network, config)
if serialized is None:
    raise SystemExit("the build failed; the lines above say why")
(folder / "{engine}").write_bytes(serialized)
timings.write_bytes(config.get_timing_cache().serialize())
engine = trt.Runtime(logger).deserialize_cuda_engine(serialized)
layers = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
(folder / "{layers}").write_text(layers)
print(len(json.loads(layers)["Layers"]), "layers; {layers} names their types")
'''
