"""octavo's int8 artifacts beside NNCF's on OpenVINO: `python tests/benchmarks/openvino_vs_nncf.py`.

Both quantize the same FP32 file with the same calibration data; scores and latencies are those of
OpenVINO, one stream, float32 where nothing is quantized. NNCF runs in an environment of its own
(`--nncf PYTHON`, made with `pip install nncf openvino`). Exits 3 where octavo is slower, or its
score more than .005 below NNCF's.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, final

import numpy as np
import typer
from cases import CASES, Case
from elsewhere import feeds, quantize
from measure import model_bytes, random_feed, run
from rich.console import Console
from rich.table import Table
from task import Array, Feed, Task

from octavo.backends.ov_session import OPTIONS, OvSession, environment, open_session, runtime
from octavo.ir.artifact_io import read_artifact

_MODELS = (
    "fashion-resnet", "fashion-vit", "fashion-mobile", "fashion-lstm",
    "efficientnet-lite0", "minilm", "ppocr-rec", "ppocr-det",
)  # fmt: skip
_SCORE_LOSS = 0.005
_FEWEST_ROUNDS, _QUIET_SHARE = 15, 25


@final
@dataclass(frozen=True)
class Row:
    """One file of one model: `speed` is that of FP32 on OpenVINO = 1, by medians in turns.

    `against_nncf` is the median over rounds of NNCF's seconds / own seconds.
    """

    model: str
    tool: str
    bytes: int
    score: float
    seconds: float
    speed: float
    against_nncf: float
    as_planned: str = ""


def rows(case: Case, nncf: Path, folder: Path, seconds: float) -> Iterator[Row]:
    """FP32, NNCF and octavo; RuntimeError where one of the tools fails."""
    source, data = case.model(), folder / "data"
    data.mkdir()
    writer = case.calibration or case.texts
    assert writer is not None
    calibration = writer(source, data)
    artifact, other = folder / "artifact", folder / "nncf.xml"
    _compile(case, source, calibration, artifact)
    given = feeds(calibration, source, folder / "feeds")
    quantize("nncf", nncf, case, source, given, other)
    task = case.task(source)
    files = {"FP32": source, "NNCF": other, "octavo": artifact / "model.onnx"}
    sessions = {tool: _session(path) for tool, path in files.items()}
    scores = {tool: _score(task, session) for tool, session in sessions.items()}
    feed = random_feed(source, case.speeds[0].shapes)
    timed = _in_turns([session.bound(feed) for session in sessions.values()], seconds)
    audit = read_artifact(artifact).audit
    kept = f"{sum(row.ok for row in audit.rows)} of {len(audit.rows)}"
    sizes = {"NNCF": other.stat().st_size + other.with_suffix(".bin").stat().st_size}
    for k, (tool, path) in enumerate(files.items()):
        yield Row(
            model=case.name,
            tool=tool,
            bytes=sizes.get(tool) or model_bytes(path),
            score=scores[tool],
            seconds=float(np.median(timed[:, k])),
            speed=float(np.median(timed[:, 0] / timed[:, k])),
            against_nncf=float(np.median(timed[:, 1] / timed[:, k])),
            as_planned=kept if tool == "octavo" else "",
        )


def _compile(case: Case, source: Path, calibration: Path, artifact: Path) -> None:
    command: list[str | Path] = ["-m", "octavo", "compile", source, "-o", artifact]
    command += ["--target", "openvino", "--calibration", calibration, "--force"]
    for name, shape in case.speeds[0].shapes.items():
        command += ["--shape", f"{name}={'x'.join(map(str, shape))}"]
    done = run(command)
    if done.code not in (0, 4):
        raise RuntimeError(done.output)


def _session(path: Path) -> OvSession:
    """A session of an ONNX file, or of OpenVINO's own format."""
    if path.suffix == ".onnx":
        return open_session(path, threads=1)
    options = {**OPTIONS, "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    compiled = runtime().Core().compile_model(path, "CPU", options)
    inputs, outputs = compiled.inputs, compiled.outputs
    names = tuple(port.any_name for port in inputs), tuple(port.any_name for port in outputs)
    return OvSession(path.name, compiled, *names)


def _score(task: Task, session: OvSession) -> float:
    """The score that goals are about, higher is better."""

    def answers(feeds: Iterable[Feed]) -> Iterator[Array]:
        for feed in feeds:
            known = {name: feed[name] for name in session.inputs}
            yield session.run(known)[session.outputs[0]]

    found = task.score(answers(task.feeds))[task.headline]
    return -found if task.lower_is_better else found


def _in_turns(calls: Sequence[Callable[[], None]], limit: float) -> Array:
    """Seconds `[round, file]`, every round in another order."""
    for call in calls:
        call()
    measured: list[list[float]] = []
    begin = time.perf_counter()
    while len(measured) < _FEWEST_ROUNDS or time.perf_counter() - begin < limit:
        own = [0.0] * len(calls)
        for k in range(len(calls)):
            index = (k + len(measured)) % len(calls)
            start = time.perf_counter()
            calls[index]()
            own[index] = time.perf_counter() - start
        measured.append(own)
    found = np.array(measured)
    # Other work on the machine only adds time: the quieter quarter of the rounds is kept.
    total = found.sum(axis=1)
    return found[total <= np.percentile(total, _QUIET_SHARE)]


def _met(group: Sequence[Row]) -> bool:
    by_tool = {row.tool: row for row in group}
    own, other = by_tool["octavo"], by_tool["NNCF"]
    return own.against_nncf >= 1 and own.score >= other.score - _SCORE_LOSS


def main(
    nncf: Annotated[Path, typer.Option(help="Python of an environment that has NNCF.")],
    models: Annotated[list[str] | None, typer.Option(help="Models; repeatable.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of timing for each model.")] = 4.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where rows go.")] = None,
) -> None:
    """Print a table, and write it as JSON."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    console, found, missed = Console(width=150), list[Row](), list[str]()
    console.print(environment(1), highlight=False)
    for case in (case for case in CASES if case.name in (models or _MODELS)):
        with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
            group = list(rows(case, nncf, Path(folder), seconds))
        found += group
        missed += [] if _met(group) else [case.name]
        table = Table("model", "file", "size", "score", "median", "speed", "NNCF = 1", "as planned")
        for row in group:
            table.add_row(
                row.model, row.tool, f"{row.bytes / 1e6:.3f} MB", f"{row.score:.4f}",
                f"{row.seconds * 1e3:.3f} ms", f"{row.speed:.2f}x", f"{row.against_nncf:.3f}x",
                row.as_planned,
            )  # fmt: skip
        console.print(table)
        if json_path is not None:
            json_path.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    if missed:
        console.print(f"missed: {', '.join(missed)}")
        raise typer.Exit(3)


if __name__ == "__main__":
    typer.run(main)
