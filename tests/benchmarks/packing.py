"""What every way to store weights costs: bytes, seconds to load, memory while and after loading.

    python tests/benchmarks/packing.py [--layers 8] [--width 1024] [--only s3]

A chain of float layers of one shape is lowered by each option; a process of its own loads it with
one thread and runs one row. Memory is what the process has more than before loading: its peak,
what stays resident, and what does when the allocator has returned what is free.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir
from onnx import helper, numpy_helper

from octavo.backends.ort_lowering import lower
from octavo.backends.ort_session import OrtEvaluator
from octavo.backends.ort_target import ORT_CPU
from octavo.ir.cost import AnalyticCost
from octavo.ir.facts import FLOAT, Choice, Method, Option, Plan
from octavo.ir.fake_quant import DOMAIN, params_of, set_rounded
from octavo.ir.levels import set_levels
from octavo.ir.model import Model
from octavo.ir.quant import PerAxis, PerBlock, QuantSpec, QuantType, dequantize, quantize
from octavo.ir.read import read
from octavo.passes.base import PassContext
from octavo.passes.insert_fake_quant import InsertFakeQuant

_WIDTHS: tuple[QuantType, ...] = ("s8", "s7", "s6", "s5", "s4", "s3", "s2", "s1")
_BLOCK = 64
_LOAD = """
import ctypes, json, resource, sys, time
import numpy as np
import onnxruntime
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
def peak():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before, begin = resident(), time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], options)
seconds = time.perf_counter() - begin
given = session.get_inputs()[0]
feed = {given.name: np.ones(given.shape, np.float32)}
times = []
for _ in range(20):
    begin = time.perf_counter()
    session.run(None, feed)
    times.append(time.perf_counter() - begin)
highest, after = peak(), resident()
ctypes.CDLL(None).malloc_trim(0)
found = {"load": seconds, "run": float(np.median(times)), "peak": highest - before,
         "after": after - before, "trimmed": resident() - before}
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--only", default="", help="only options whose text contains this")
    given = parser.parse_args()
    sys.stdout.write(
        "option                          bits/weight  load s  peak MB    after  trimmed  run ms\n"
    )
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as executor:
        ctx = PassContext(
            ORT_CPU, AnalyticCost(ORT_CPU), OrtEvaluator(threads=1), executor, Path(folder)
        )
        for name, option in _options():
            if given.only in name:
                path = Path(folder, "model.onnx")
                planned = _planned(_chain(given.layers, given.width), name, option, ctx)
                size = lower(planned, path).bytes
                _print(name, 8 * size / (given.layers * given.width**2), path)
                # Graphs hold cycles.
                del planned
                gc.collect()


def _options() -> Iterator[tuple[str, Option]]:
    yield "float", FLOAT
    yield "storage:f16", Option("storage", QuantSpec("f16"))
    methods: tuple[Method, ...] = ("dynamic", "storage")
    for method in methods:
        for dtype in _WIDTHS:
            spec = QuantSpec(dtype, PerAxis(1), symmetric=True, half_scales=True)
            yield f"{method}:{dtype}", Option(method, spec)
    for dtype in _WIDTHS:
        spec = QuantSpec(dtype, PerBlock(0, _BLOCK), symmetric=True, half_scales=True)
        yield f"weight-only:{dtype}/block{_BLOCK}", Option("weight-only", spec)
    for bits in (4, 3):
        spec = QuantSpec("s8", PerAxis(1), symmetric=True, index_bits=bits)
        yield f"dynamic:codebook{bits}", Option("dynamic", spec)
        spec = QuantSpec("s4", PerAxis(1), symmetric=True)
        yield f"storage:levels{bits}", Option("storage", spec)


def _chain(layers: int, width: int) -> Model:
    rng = np.random.default_rng(0)
    names = [*(f"h{k}" for k in range(layers)), "y"]
    nodes, weights = [], []
    for k in range(layers):
        array = rng.standard_normal((width, width)).astype(np.float32) / np.float32(width**0.5)
        weights.append(numpy_helper.from_array(array, f"w{k}"))
        nodes.append(helper.make_node("MatMul", [names[k], f"w{k}"], [names[k + 1]], f"n{k}"))
    nodes[-1].output[0] = "y"
    x, y = (helper.make_tensor_value_info(n, 1, [1, width]) for n in ("h0", "y"))
    graph = helper.make_graph(nodes, "chain", [x], [y], weights)
    opset = [helper.make_opsetid("", 21)]
    return read(helper.make_model(graph, opset_imports=opset, ir_version=10))


def _planned(model: Model, name: str, option: Option, ctx: PassContext) -> Model:
    plan = {node.name or "": Choice(option, "") for node in model.graph}
    model = InsertFakeQuant().run(model.with_fact(Plan(plan, "")), ctx)
    for fake in [n for n in model.graph if n.domain == DOMAIN and n.op_type == "FakeQuant"]:
        if name.startswith("storage:levels"):
            bits = int(name[-1])
            levels = np.linspace(-0.1, 0.1, 2**bits, dtype=np.float32)
            columns = params_of(fake).scale.size
            set_levels(model, fake, np.tile(levels, (columns, 1)), 1)
        elif option.weight is not None and option.weight.index_bits is not None:
            _take_codes(model, fake, option.weight.index_bits)
    return model


def _take_codes(model: Model, fake: onnx_ir.Node, bits: int) -> None:
    """Let a weight have the codes of a codebook only."""
    params, value = params_of(fake), fake.inputs[0]
    assert value is not None
    assert value.const_value is not None
    codes = quantize(value.const_value.numpy(), params).astype(np.int16)
    step = 256 // 2**bits
    coarse = np.clip(codes // step * step, -127, 127).astype(np.int8)
    set_rounded(model.graph, fake, dequantize(coarse, params))


def _print(name: str, bits: float, path: Path) -> None:
    command = [sys.executable, "-c", _LOAD, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    memory = [found[key] / 1e6 for key in ("peak", "after", "trimmed")]
    sizes = " ".join(f"{size:8.0f}" for size in memory)
    row = f"{name:32} {bits:10.2f} {found['load']:7.2f} {sizes} {1e3 * found['run']:7.2f}"
    sys.stdout.write(f"{row}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
