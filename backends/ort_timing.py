"""Seconds by node that add up to the latency of a file: profiled shares of unprofiled runs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from octavo.backends.ort_profile import (
    Owners,
    Subject,
    graph_files,
    profiled,
    read_profile,
)
from octavo.ir.backend import Timing
from octavo.ir.memory import release_memory

if TYPE_CHECKING:
    from octavo.backends.ort_profile import KernelTime
    from octavo.ir.artifact import Artifact
    from octavo.ir.calibration import Feed

_FEWEST_ROUNDS = 5
_MOST_ROUNDS = 100
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def time_nodes(
    artifacts: Sequence[Artifact], feed: Feed, *, threads: int = 1, seconds_limit: float = 1.0
) -> list[Timing]:
    """Time lowered files in turns: half of the time profiled, half as they are deployed.

    A profiler slows small kernels down, so that it tells shares and the clock tells seconds.
    Medians of both: other work on the machine delays some of the runs. At least five runs each.
    """
    subjects = [Subject(a.path, a.session_options, read_graph=True) for a in artifacts]
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        graphs = graph_files(subjects, Path(folder))
        sessions = [profiled(s, g, threads) for s, g in zip(subjects, graphs, strict=True)]
        calls = [s.bound({n: feed[n] for n in s.inputs if n in feed}) for s in sessions]
        _rounds(calls, 0.0, 1)
        runs = len(_rounds(calls, seconds_limit / 2, _FEWEST_ROUNDS))
        profiles = [
            read_profile(session, graph, 1 + runs, median)
            for session, graph in zip(sessions, graphs, strict=True)
        ]
        walls = _rounds(calls, seconds_limit / 2, _FEWEST_ROUNDS)
    del sessions, calls
    release_memory()
    return [
        _timing(artifact, profile.kernels, median(column))
        for artifact, profile, column in zip(
            artifacts, profiles, zip(*walls, strict=True), strict=True
        )
    ]


def _rounds(
    calls: Sequence[Callable[[], None]], seconds_limit: float, fewest: int
) -> list[list[float]]:
    """Seconds `[round, call]`; every round starts with another call."""
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) < fewest or (
        len(rounds) < _MOST_ROUNDS and time.perf_counter() - begin < seconds_limit
    ):
        seconds = [0.0] * len(calls)
        for k in range(len(calls)):
            index = (k + len(rounds)) % len(calls)
            start = time.perf_counter()
            calls[index]()
            seconds[index] = time.perf_counter() - start
        rounds.append(seconds)
    return rounds


def _timing(artifact: Artifact, kernels: Sequence[KernelTime], seconds: float) -> Timing:
    """Scale kernels to the seconds of a run; what no node owns is spread over those that do."""
    total = sum(kernel.seconds for kernel in kernels) or 1.0
    quantizers: dict[str, tuple[float, int]] = {}
    for kernel in kernels:
        if kernel.op_type in _QUANTIZERS and kernel.outputs:
            known, moved = quantizers.get(kernel.op_type, (0.0, 0))
            own = kernel.seconds * seconds / total
            quantizers[kernel.op_type] = known + own, moved + 4 * kernel.outputs[0][1]
    others = [kernel for kernel in kernels if kernel.op_type not in _QUANTIZERS]
    owned = Owners.of(artifact.planned, artifact.path).seconds(others)
    left = sum(kernel.seconds for kernel in others) * seconds / total
    scale = left / (sum(owned.values()) or 1.0)
    return Timing(seconds, {name: s * scale for name, s in owned.items()}, quantizers)
