"""Every model compiled for TensorRT and held against it: `python tests/benchmarks/tensorrt.py`.

Nothing is timed: there is no device. A row says what octavo made of a model, how close its outputs
are to FP32 (both run by onnxruntime), whether the file conforms, and whether TensorRT for RTX
builds it. `--peers` checks files of onnxruntime's quantizers, `--tool nncf=PYTHON` (`quark`,
`modelopt`) those of tools with an environment of their own, `--file NAME=PATH` any other.
Exits 4 where a file of octavo does not conform.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, final

import numpy as np
import typer
from cases import CASES, Case
from elsewhere import feeds, quantize
from rich.console import Console
from rich.table import Table

from octavo.backends.trt_check import check
from octavo.backends.trt_target import TARGETS
from octavo.cli.calibration_data import load_calibration
from octavo.cli.compilation import compile_model
from octavo.cli.request import Request
from octavo.ir.read import read

_DECODERS = ("smollm2-135m",)
_INT4 = "canonicalize,choose-kernels{weight-only=true,bits=4,block-size=64},insert-fake-quant"
_PEERS = ("ort-static-minmax", "ort-dynamic")


@final
@dataclass(frozen=True)
class Row:
    """One file: what made it, its nodes by option, and what was found, by rule."""

    model: str
    tool: str
    options: dict[str, int]
    size: float | None
    relative_error: float | None
    agreement: float | None
    errors: dict[str, int]
    advice: dict[str, int]
    built: str

    @property
    def ok(self) -> bool:
        return not self.errors


def compiled(case: Case, target: str, folder: Path, pipeline: str = "") -> Row:
    """A model compiled with its calibration data; a decoder with 4-bit weights, without."""
    source = read(case.model())
    write = case.calibration or case.texts
    decoder = case.name in _DECODERS
    data = None
    if write is not None and not decoder:
        (folder / "data").mkdir()
        data = load_calibration(str(write(case.model(), folder / "data")), source)
    request = Request(target=target, pipeline=_INT4 if decoder else pipeline)
    made = compile_model(source, calibration=data, request=request, workdir=folder)
    options = Counter(node.option for node in made.artifact.planned if not node.absorbed_by)
    size = made.artifact.bytes / source.source.bytes
    found = made.fidelity.relative_error, made.fidelity.agreement
    return _row(case.name, "octavo", made.artifact.path, target, dict(options), size, *found)


def peers(case: Case, target: str, folder: Path) -> Iterator[Row]:
    """Files of onnxruntime's quantizers for the same model, which they can read."""
    import peers as tools

    for name in [n for n in _PEERS if not case.peers or n in case.peers]:
        path, arguments = folder / f"{name}.onnx", []
        if "static" in name:
            if case.calibration is None:
                continue
            (folder / name).mkdir()
            data = case.calibration(case.model(), folder / name)
            if data.is_dir():
                continue
            arguments = [data]
        with chdir(folder):
            # It leaves files in the current folder.
            tools.TOOLS[name](case.model(), path, *arguments)
        yield _row(case.name, name, path, target)


def elsewhere(
    tools: Sequence[tuple[str, Path]], case: Case, target: str, folder: Path
) -> Iterator[Row]:
    """Files of tools with an environment of their own, from the data octavo is calibrated with."""
    writer, source = case.calibration or case.texts, case.model()
    if writer is None or case.name in _DECODERS or not tools:
        return
    (folder / "other-data").mkdir()
    given = feeds(writer(source, folder / "other-data"), source, folder / "feeds")
    for tool, python in tools:
        made = folder / f"{tool}.onnx"
        try:
            quantize(tool, python, case, source, given, made)
        except RuntimeError as error:
            *_, last = str(error).strip().splitlines()
            yield Row(case.name, f"{tool}: {last[:90]}", {}, None, None, None, {}, {}, "no file")
            continue
        yield _row(case.name, tool, made, target)


def _row(
    model: str,
    tool: str,
    path: Path,
    target: str,
    options: dict[str, int] | None = None,
    size: float | None = None,
    error: float | None = None,
    agreement: float | None = None,
) -> Row:
    found = check(path, TARGETS[target])
    rules = [Counter(f.rule for f in found.findings if f.error == wrong) for wrong in (True, False)]
    refused = next((f for f in found.findings if f.rule in ("parser", "builder")), None)
    built = "not tried" if len(found.checked) < 2 else refused.rule if refused else "yes"
    errors, advice = map(dict, rules)
    return Row(model, tool, options or {}, size, error, agreement, errors, advice, built)


def _show(rows: Sequence[Row]) -> None:
    table = Table(
        "model", "tool", "nodes", "bytes", "error", "arg-max", "errors", "advice", "built"
    )
    for row in rows:
        table.add_row(
            row.model, row.tool, _counted(row.options), _percent(row.size),
            "" if row.relative_error is None else f"{row.relative_error:.4f}",
            _percent(row.agreement), _counted(row.errors), _counted(row.advice), row.built,
        )  # fmt: skip
    Console(width=200).print(table)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _percent(share: float | None) -> str:
    return "" if share is None or not np.isfinite(share) else f"{100 * share:.1f}%"


def main(
    models: Annotated[list[str] | None, typer.Option(help="Names of cases; default: all.")] = None,
    target: Annotated[str, typer.Option(help="A target of TensorRT.")] = "tensorrt-sm86",
    pipeline: Annotated[str, typer.Option(help="As octavo compile takes it: fp8, nvfp4.")] = "",
    with_peers: Annotated[bool, typer.Option("--peers", help="Check peers' files too.")] = False,
    tool: Annotated[list[str] | None, typer.Option(help="TOOL=PYTHON that has it.")] = None,
    file: Annotated[list[str] | None, typer.Option(help="TOOL=PATH of a file to check.")] = None,
    results: Annotated[Path | None, typer.Option("--json", help="Write every number.")] = None,
) -> None:
    """Compile, check, build; print a table."""
    rows: list[Row] = []
    tools = [(name, Path(path)) for name, _, path in (t.partition("=") for t in tool or ())]
    for case in CASES if models is None else [c for c in CASES if c.name in models]:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compiled(case, target, Path(folder), pipeline))
            rows += peers(case, target, Path(folder)) if with_peers else ()
            rows += elsewhere(tools, case, target, Path(folder))
    for text in file or ():
        maker, _, path = text.partition("=")
        rows.append(_row(Path(path).stem, maker, Path(path), target))
    _show(rows)
    if results is not None:
        results.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if not all(row.ok for row in rows if row.tool == "octavo"):
        raise typer.Exit(4)


if __name__ == "__main__":
    typer.run(main)
