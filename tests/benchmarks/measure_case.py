"""One model from its FP32 file to rows of results: compile, score, compare, time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cases import Case, Speed
from measure import Latency, Process, latencies, model_bytes, random_feed, run
from report import Goal, Row
from task import Task, fidelity, score

from octavo.ir.artifact import Audit
from octavo.ir.artifact_io import read_artifact

_FLOAT, _OCTAVO = "FP32", "octavo"
_AUDIT_FAILED = 4
_PEERS = Path(__file__).with_name("peers.py")


def measure_case(case: Case, folder: Path, peers: bool, threads: int) -> list[Row]:
    """All rows of one model; files go to `folder`. Raises RuntimeError when it does not compile."""
    source = case.model()
    task = case.task(source)
    data = folder / "calibration"
    data.mkdir()
    calibration = case.calibration(source, data) if case.calibration else None
    processes = {_OCTAVO: _compile(case, source, folder / "artifact", calibration, threads)}
    files = {_FLOAT: source, _OCTAVO: folder / "artifact"}
    for peer in case.peers if peers else ():
        target = folder / f"{peer}.onnx"
        inputs = [calibration] if calibration and "static" in peer else []
        processes[peer] = run([_PEERS, peer, source, target, *inputs])
        if processes[peer].code == 0:
            files[peer] = target
    return [
        *_bytes_rows(case, files),
        *_score_rows(case, task, files, threads),
        *_speed_rows(case.speeds, files, threads),
        *_process_rows(case, processes),
        _audit_row(read_artifact(folder / "artifact").audit),
    ]


def _compile(
    case: Case, source: Path, artifact: Path, calibration: Path | None, threads: int
) -> Process:
    command: list[str | Path] = [
        "-m",
        "octavo",
        "compile",
        source,
        "-o",
        artifact,
        "--threads",
        str(threads),
    ]
    for name, shape in case.speeds[0].shapes.items():
        command += ["--shape", f"{name}={'x'.join(map(str, shape))}"]
    if calibration is not None:
        command += ["--calibration", calibration]
    command += case.options
    process = run(command)
    if process.code not in (0, _AUDIT_FAILED) or not artifact.exists():
        message = f"octavo compile ended with code {process.code}:\n{process.output}"
        raise RuntimeError(message)
    return process


def _bytes_rows(case: Case, files: Mapping[str, Path]) -> Iterator[Row]:
    sizes = {name: model_bytes(file) for name, file in files.items()}
    yield Row("size", "bytes", sizes, _at_most(case.bytes))
    shares = {name: size / sizes[_FLOAT] for name, size in sizes.items()}
    yield Row("size, share of FP32", "score", shares, _at_most(case.bytes_ratio))


def _score_rows(case: Case, task: Task, files: Mapping[str, Path], threads: int) -> Iterator[Row]:
    scores = {name: score(task, file, threads) for name, file in files.items()}
    for quantity, reference in scores[_FLOAT].items():
        values = {name: found[quantity] for name, found in scores.items()}
        goal = _score_goal(case, task, reference) if quantity == task.headline else None
        yield Row(quantity, "score", values, goal)
    compared = {
        name: fidelity(task, files[_FLOAT], file, threads)
        for name, file in files.items()
        if name != _FLOAT
    }
    for quantity in compared[_OCTAVO]:
        values = {name: found[quantity] for name, found in compared.items()}
        least = case.outputs.get(quantity)
        goal = None if least is None else Goal(least, at_least=True)
        yield Row(f"outputs, {quantity}", "score", values, goal)


def _score_goal(case: Case, task: Task, reference: float) -> Goal:
    loss = (case.score_loss or 0.0) * (-1 if task.lower_is_better else 1)
    limit = reference - loss if case.score is None else case.score
    return Goal(limit, at_least=not task.lower_is_better)


def _speed_rows(speeds: Sequence[Speed], files: Mapping[str, Path], threads: int) -> Iterator[Row]:
    for speed in speeds:
        feed = random_feed(files[_FLOAT], speed.shapes)
        timed = latencies(list(files.values()), feed, threads)
        found = dict(zip(files, timed, strict=True))
        yield Row(
            f"speed, {speed.label}",
            "speed",
            {name: latency.speed for name, latency in found.items()},
            Goal(speed.at_least, at_least=True),
            {name: _spread(latency) for name, latency in found.items()},
        )


def _spread(latency: Latency) -> str:
    return f"{latency.low:.2f}-{latency.high:.2f}, {1e3 * latency.seconds:.2f} ms"


def _process_rows(case: Case, processes: Mapping[str, Process]) -> Iterator[Row]:
    """Seconds and memory of the compilers; a peer that failed has its last line instead."""
    done = {n: p for n, p in processes.items() if n == _OCTAVO or p.code == 0}
    failed = {
        name: process.output.strip().rsplit("\n", 1)[-1]
        for name, process in processes.items()
        if name not in done
    }
    seconds = {name: process.seconds for name, process in done.items()}
    peaks = {name: process.peak_bytes for name, process in done.items()}
    yield Row("compile", "seconds", seconds, _at_most(case.compile_seconds), failed)
    yield Row("compile, peak memory", "bytes", peaks, _at_most(case.peak_bytes))


def _audit_row(audit: Audit) -> Row:
    """The share of planned nodes that run as planned; findings on the whole graph beside it."""
    share = sum(row.ok for row in audit.rows) / max(len(audit.rows), 1)
    missed = [f"{row.node}: {row.reason}" for row in audit.rows if not row.ok]
    notes = {_OCTAVO: "; ".join([*audit.findings, *missed])}
    return Row("run as planned", "score", {_OCTAVO: share}, Goal(1.0, at_least=True), notes)


def _at_most(limit: float | None) -> Goal | None:
    return None if limit is None else Goal(limit, at_least=False)
