"""A crash, as a folder that runs it again: the model before the pass and all the pass was given.

model.onnx  facts.json  facts.npz      the model before the pass
calibration.npz                        the first feeds, where there were any
replay.json                            remaining pipeline, target, seed, versions, source
error.txt                              the error with its traceback
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from octavo.ir.artifact import Probes
from octavo.ir.artifact_io import read_probes, write_probes
from octavo.ir.errors import OctavoError, UsageError
from octavo.ir.facts_io import read_facts, write_facts
from octavo.ir.model import Model, Source
from octavo.ir.output_folder import open_output
from octavo.ir.read_onnx import read_verbatim
from octavo.ir.versions import versions
from octavo.ir.write import write
from octavo.passes.instruments import Instrument
from octavo.passes.spec import format_passes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.passes.instruments import Step

FORMAT = 1
_REPLAY, _MODEL, _CALIBRATION = "replay.json", "model.onnx", "calibration.npz"
_MOST_CALIBRATION_BYTES = 64 << 20


@final
@dataclass(frozen=True)
class StoredFeeds:
    """Calibration feeds kept in memory."""

    feeds: tuple[Feed, ...]
    labels: NDArray[np.generic] | None = None

    @property
    def samples(self) -> int:
        firsts = (next(iter(feed.values())) for feed in self.feeds)
        return sum(len(array) if array.ndim else 1 for array in firsts)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for feed in self.feeds:
            for name, array in sorted(feed.items()):
                digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.feeds)


@final
@dataclass(frozen=True)
class Reproduction:
    """What `read_reproduction` found: run `pipeline` on `model` and see `error` again."""

    model: Model
    pipeline: str
    target: str
    seed: int
    versions: dict[str, str]
    error: str
    calibration: StoredFeeds | None


@final
class Reproducer(Instrument):
    """Writes a folder `003_insert-fake-quant-0123abcd` inside `folder` when a pass breaks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def failed(self, step: Step, error: Exception) -> Path | None:
        path = self._folder / f"{step.label}-{step.before.fingerprint[:8]}"
        if (path / _REPLAY).exists():
            return path
        try:
            with open_output(path) as partial:
                _write(step, error, partial)
        except (OctavoError, OSError):
            # The first error is the one to report, with or without a reproducer.
            return None
        return path


def read_reproduction(folder: Path) -> Reproduction:
    """What a Reproducer wrote; UsageError where the folder is anything else."""
    try:
        replay = json.loads((folder / _REPLAY).read_text(encoding="utf-8"))
        if replay["format"] != FORMAT:
            message = f"the reproducer has format {replay['format']}, this octavo reads {FORMAT}"
            raise UsageError(message, where=str(folder))
        source = Source(**replay["source"])
        error = (folder / "error.txt").read_text(encoding="utf-8")
        stored = folder / _CALIBRATION
        calibration = StoredFeeds(read_probes(stored).feeds) if stored.exists() else None
        pipeline, target, seed = str(replay["pipeline"]), str(replay["target"]), int(replay["seed"])
        recorded = dict(replay["versions"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        message = f"{folder} is not a reproducer folder"
        raise UsageError(message, why=f"{type(problem).__name__}: {problem}") from None
    # As it is: what is wrong with the model may be what broke the pass.
    model = replace(read_verbatim(folder / _MODEL), source=source, facts=read_facts(folder))
    return Reproduction(model, pipeline, target, seed, recorded, error, calibration)


def _write(step: Step, error: Exception, folder: Path) -> None:
    write(step.before, folder / _MODEL)
    write_facts(step.before.facts, folder)
    if step.ctx.calibration is not None:
        feeds = tuple(_first(step.ctx.calibration))
        write_probes(Probes(feeds, ()), folder / _CALIBRATION)
    replay = {
        "format": FORMAT,
        "pipeline": format_passes(step.rest),
        "target": step.ctx.target.name,
        "seed": step.ctx.seed,
        "versions": versions(),
        "source": asdict(step.before.source),
    }
    (folder / _REPLAY).write_text(json.dumps(replay, indent=1) + "\n", encoding="utf-8")
    (folder / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")


def _first(feeds: Iterable[Feed]) -> Iterator[Feed]:
    """The leading feeds that stay within the size limit together; at least one."""
    left = _MOST_CALIBRATION_BYTES
    for feed in feeds:
        yield feed
        left -= sum(array.nbytes for array in feed.values())
        if left <= 0:
            return
