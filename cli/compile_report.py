"""What `octavo compile` says at the end: size, speed, fidelity, kernels, and what it assumed."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from octavo.cli.candidates import NOT_SLOWER
from octavo.cli.render import format_bytes, format_seconds, print_json, print_message, print_table
from octavo.ir.menu import Solution

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from octavo.cli.compilation import Compiled
    from octavo.ir.artifact_io import Manifest


def show(compiled: Compiled, manifest: Manifest, output: Path, as_json: bool) -> None:
    """Print the result of a compilation."""
    if as_json:
        print_json(_to_json(compiled, manifest))
        return
    source, artifact = compiled.bench.rows[0], compiled.bench.rows[-1]
    files = ((manifest.source.name, source), (f"{output}/model.onnx", artifact))
    rows = [
        (
            name,
            format_bytes(row.bytes),
            f"{100 * row.bytes / source.bytes:.1f} %",
            format_seconds(row.median_seconds or None),
            f"{row.speed:.2f}x" if row.speed else "",
        )
        for name, row in files
    ]
    print_table(("file", "size", "of source", "median", "speed"), rows)
    print_table(("nodes", "option", "weights", "in source"), _option_rows(compiled))
    for line in _lines(compiled, manifest, output):
        print_message(line)


def _to_json(compiled: Compiled, manifest: Manifest) -> dict[str, object]:
    return {
        "manifest": manifest.to_json(),
        "bench": compiled.bench.to_json(),
        "fidelity": compiled.fidelity.to_json(),
        "audit": compiled.audit.to_json(),
        "notes": compiled.notes,
    }


def _option_rows(compiled: Compiled) -> list[tuple[object, ...]]:
    """Options with the nodes they got, the most frequent first."""
    nodes: Counter[str] = Counter()
    now: Counter[str] = Counter()
    before: Counter[str] = Counter()
    for node in compiled.artifact.planned:
        nodes[node.option] += 1
        now[node.option] += node.weight_bytes
        before[node.option] += node.source_bytes
    return [
        (count, option, format_bytes(now[option]), format_bytes(before[option]))
        for option, count in nodes.most_common()
    ]


def _lines(compiled: Compiled, manifest: Manifest, output: Path) -> Iterator[str]:
    fidelity, audit, timing = compiled.fidelity, compiled.audit, compiled.bench
    agreement = fidelity.agreement
    same = "" if agreement is None else f", same arg-max in {100 * agreement:.1f} %"
    yield (
        f"outputs:     relative error {fidelity.relative_error:.4f}, cosine {fidelity.cosine:.5f}"
        f"{same}, over {fidelity.samples} feed(s)"
    )
    planned = sum(row.ok for row in audit.rows)
    verb = "run as planned" if audit.seen else "conform; their kernels were not seen"
    yield f"audit:       {planned} of {len(audit.rows)} nodes {verb}"
    yield from (f"             {finding}" for finding in audit.findings)
    yield from _plan_lines(compiled)
    if manifest.calibration_samples:
        source = "" if manifest.calibration_source == "real" else f", {manifest.calibration_source}"
        yield f"calibration: {manifest.calibration_samples} samples{source}"
    elif manifest.calibration_source:
        yield f"calibration: no data, {manifest.calibration_source} ranges"
    else:
        yield "calibration: none given (--calibration), so activations have no static parameters"
    yield f"pipeline:    {manifest.pipeline}"
    shapes = ", ".join(f"{name} {shape}" for name, shape in timing.shapes.items())
    sampled = compiled.calibration is not None and not compiled.request.shapes
    feed = "a calibration sample" if sampled else "random numbers"
    if timing.timed:
        yield f"measured:    {feed}, {shapes}; {timing.rounds} rounds; {timing.environment}"
    else:
        yield f"measured:    no latency; {timing.environment}"
    yield f"seed:        {manifest.seed}"
    yield from (f"note:        {note}" for note in compiled.notes)
    if timing.timed and timing.rows[-1].speed < NOT_SLOWER:
        yield "note:        the artifact is slower than its source here"
    yield f"next:        octavo inspect {output} lists every layer with its kernel and reason"


def _plan_lines(compiled: Compiled) -> Iterator[str]:
    """How the plan was found, and what it was predicted to take beside what it takes."""
    solution = compiled.model.find(Solution)
    if solution is None:
        return
    if not compiled.bench.timed:
        yield f"predicted:   {format_seconds(solution.totals['seconds'])}, by estimates alone"
        return
    measured, source = compiled.bench.rows[-1].median_seconds, compiled.bench.rows[0]
    yield (
        f"plan:        {solution.status} to a gap of {solution.gap:.1e} in "
        f"{solution.seconds:.2f} s, predicted damage {solution.totals['damage']:.2e}"
    )
    yield (
        f"predicted:   {format_seconds(solution.totals['seconds'])} "
        f"({_percent(solution.totals['seconds'], measured)} of measured); source "
        f"{format_seconds(solution.float_seconds)} "
        f"({_percent(solution.float_seconds, source.median_seconds)})"
    )


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"
