"""What is measured besides scores: compile processes, start-up, latency side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from task import Feed, session

_WARM_UP, _FEWEST_ROUNDS = 3, 15
_LARGEST_ID = 200
_LAUNCH = Path(__file__).with_name("launch.py")


@final
@dataclass(frozen=True)
class Process:
    """A process that ended: wall seconds, peak resident bytes, what it wrote, its exit code."""

    seconds: float
    peak_bytes: int
    output: str
    code: int


def run(arguments: Sequence[str | Path]) -> Process:
    """Run Python with arguments and an empty octavo cache; nothing is raised for its exit code."""
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
        result = Path(folder, "result.json")
        done = subprocess.run(
            [sys.executable, _LAUNCH, result, sys.executable, *arguments],
            env=os.environ | {"OCTAVO_CACHE": str(Path(folder, "cache"))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=True,
        )
        return Process(output=done.stdout, **json.loads(result.read_text()))


def startup_seconds(arguments: Sequence[str], runs: int = 7) -> float:
    """Median wall seconds of a Python process."""
    return float(np.median([run(arguments).seconds for _ in range(runs)]))


@final
@dataclass(frozen=True)
class Latency:
    """Median seconds of one run, and how many times faster than the first file, with quartiles."""

    seconds: float
    speed: float
    low: float
    high: float


def latencies(models: Sequence[Path], feed: Feed, threads: int, limit: float = 3) -> list[Latency]:
    """Time models in turns for `limit` seconds, at least 15 rounds; ratios are per round."""
    calls = [_call(model, feed, threads) for model in models]
    for call in calls * _WARM_UP:
        call()
    rounds = list[list[float]]()
    begin = time.perf_counter()
    while len(rounds) < _FEWEST_ROUNDS or time.perf_counter() - begin < limit:
        order = np.roll(np.arange(len(calls)), len(rounds))
        timed = {int(k): _seconds(calls[k]) for k in order}
        rounds.append([timed[k] for k in range(len(calls))])
    seconds = np.array(rounds)
    low, middle, high = np.percentile(seconds[:, :1] / seconds, (25, 50, 75), axis=0)
    rows = zip(np.median(seconds, 0).tolist(), middle, low, high, strict=True)
    return [Latency(s, float(m), float(a), float(b)) for s, m, a, b in rows]


def random_feed(model: Path, shapes: Mapping[str, Sequence[int]], seed: int = 0) -> Feed:
    """Normal numbers, small ids and masks of ones, in the types a model declares."""
    rng = np.random.default_rng(seed)
    types = {value.name: value.type for value in session(model, 1).get_inputs()}
    return {name: _array(name, types[name], shape, rng) for name, shape in shapes.items()}


def model_bytes(model: Path) -> int:
    """Bytes of an ONNX file, or of the one in an artifact folder, with its external data."""
    file = model / "model.onnx" if model.is_dir() else model
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))


def _array(name: str, kind: str, shape: Sequence[int], rng: np.random.Generator) -> Any:
    if "mask" in name:
        return np.ones(shape, np.int64)
    if kind == "tensor(float)":
        return rng.standard_normal(shape, np.float32)
    dtype = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}[kind]
    return rng.integers(1, _LARGEST_ID, shape).astype(dtype)


def _call(model: Path, feed: Feed, threads: int) -> Callable[[], object]:
    running = session(model, threads)
    binding = running.io_binding()
    for name, array in feed.items():
        binding.bind_cpu_input(name, array)
    for value in running.get_outputs():
        binding.bind_output(value.name)
    return lambda: running.run_with_iobinding(binding)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
