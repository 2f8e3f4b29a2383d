"""Instruments watch a pipeline: they may look at everything and complete the record."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from octavo.ir.text import model_text
from octavo.passes.base import Remark
from octavo.passes.record import GraphDiff, PassRecord, line, summarise, write_records
from octavo.passes.spec import format_pass

if TYPE_CHECKING:
    from collections.abc import Callable

    from octavo.ir.model import Model
    from octavo.passes.base import Pass, PassContext
    from octavo.passes.record import Header

_STATUS = Path("/proc/self/status")


@final
@dataclass(frozen=True)
class Step:
    """One pass that is about to run, with everything that is needed to run it again.

    `index` counts the passes of the whole pipeline, from 0; `rest` is `pass_` and all after it.
    """

    index: int
    pass_: Pass
    rest: tuple[Pass, ...]
    before: Model
    ctx: PassContext

    @property
    def label(self) -> str:
        """A file name that sorts in running order: `003_insert-fake-quant`."""
        return f"{self.index + 1:03}_{self.pass_.name}"


class Instrument:
    """Does nothing; subclasses override what they watch. Called in stack order."""

    def before_pass(self, step: Step) -> None:
        """Called with the model a pass is about to get."""

    def after_pass(self, step: Step, record: PassRecord, model: Model) -> PassRecord:
        """Called with the verified result; returns the record, completed or as it was."""
        return record

    def failed(self, step: Step, error: Exception) -> Path | None:
        """Called when a pass broke as nobody expected; may name a folder that replays it."""
        return None


@final
class PeakMemory(Instrument):
    """Completes `peak_bytes`: the process's highest resident memory until the pass ended.

    The mark never falls, so the record where it rises names the pass that needed the memory.
    """

    def after_pass(self, step: Step, record: PassRecord, model: Model) -> PassRecord:
        return replace(record, peak_bytes=peak_resident_bytes())


@final
class ShowProgress(Instrument):
    """Says which pass runs."""

    def __init__(self, progress: Callable[[str, int, int], None]) -> None:
        self._progress = progress

    def before_pass(self, step: Step) -> None:
        self._progress(step.pass_.name, 0, 1)

    def after_pass(self, step: Step, record: PassRecord, model: Model) -> PassRecord:
        self._progress(step.pass_.name, 1, 1)
        return record


@final
class DumpText(Instrument):
    """Writes every changed model as ONNX text: `003_insert-fake-quant.onnx.txt`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def before_pass(self, step: Step) -> None:
        if step.index == 0:
            self._write("000_source", step.before)

    def after_pass(self, step: Step, record: PassRecord, model: Model) -> PassRecord:
        if record.before.fingerprint != record.after.fingerprint:
            self._write(step.label, model)
        return record

    def _write(self, label: str, model: Model) -> None:
        path = self._folder / f"{label}.onnx.txt"
        path.write_text(model_text(model.ir), encoding="utf-8")


@final
class JsonLog(Instrument):
    """Writes one JSON line per pass as it ends, after the header; `read_records` reads it."""

    def __init__(self, path: Path, header: Header) -> None:
        self._path = path
        write_records(path, header, ())

    def after_pass(self, step: Step, record: PassRecord, model: Model) -> PassRecord:
        self._append(record)
        return record

    def failed(self, step: Step, error: Exception) -> Path | None:
        summary = summarise(step.before)
        message = Remark("note", step.pass_.name, f"{type(error).__name__}: {error}")
        self._append(
            PassRecord(
                index=step.index,
                spec=format_pass(step.pass_),
                status="failed",
                seconds=0.0,
                verify_seconds=0.0,
                peak_bytes=peak_resident_bytes(),
                before=summary,
                after=summary,
                diff=GraphDiff((), (), ()),
                remarks=(*step.ctx.recorder.remarks, message),
            )
        )
        return None

    def _append(self, record: PassRecord) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line(record))


def peak_resident_bytes() -> int:
    """The highest resident memory of this process so far, 0 where nobody counts it."""
    # VmHWM counts this program alone; ru_maxrss starts at the parent's size when it was forked.
    if _STATUS.exists():
        fields = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        mark = next((text for text in fields if text.startswith("VmHWM:")), None)
        if mark is not None:
            return int(mark.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
