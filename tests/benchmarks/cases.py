"""The models that are measured, on what, and the goals they have to meet."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import calibration
from scores import fashion, filetypes, language, lines, pages, sentences, stamps
from task import Task

from octavo.models import fetch, names, shipped
from octavo.models.public import PUBLIC
from octavo.passes.presets import preset

_MEGABYTE = 10**6
Shapes = dict[str, tuple[int, ...]]


@final
@dataclass(frozen=True)
class Speed:
    """Input shapes to time a model with, and how many times faster than float it has to be."""

    label: str
    shapes: Shapes
    at_least: float = 1.0


@final
@dataclass(frozen=True)
class Case:
    """One model with its goals: limits of the score or its loss, bytes, seconds and memory.

    `calibration` writes data into a folder and returns what `octavo compile` takes; `texts` does so
    where int8 needs no data, for methods of fewer bits. `options` are further ones of `octavo
    compile`, `outputs` the least fidelity; what follows an @ in `name` tells such cases apart from
    the plain one of a model. `peers` are
    tools of `peers.py`. The first of `speeds` is the one the compiler is told.
    """

    name: str
    task: Callable[[Path], Task]
    speeds: Sequence[Speed]
    calibration: Callable[[Path, Path], Path] | None = None
    texts: Callable[[Path, Path], Path] | None = None
    score: float | None = None
    score_loss: float | None = None
    bytes: float | None = None
    bytes_ratio: float | None = None
    options: Sequence[str] = ()
    outputs: Mapping[str, float] = field(default_factory=dict)
    compile_seconds: float | None = None
    peak_bytes: float | None = None
    peers: Sequence[str] = ()

    def model(self) -> Path:
        """The FP32 file: from the folder $OCTAVO_BENCH_MODELS, shipped, or fetched."""
        folder = os.environ.get("OCTAVO_BENCH_MODELS")
        name = self.name.partition("@")[0]
        if name in names():
            return shipped(name)
        if folder:
            return Path(folder) / name / "model.onnx"
        return fetch.get(PUBLIC[name], fetch.cache_folder())[0]


def _fashion(name: str, speed: float, bytes_ratio: float = 0.3) -> Case:
    return Case(
        name=name,
        task=fashion.task,
        calibration=calibration.fashion,
        speeds=[Speed("batch 64", {"input": (64, 1, 28, 28)}, speed)],
        score_loss=0.003,
        bytes_ratio=bytes_ratio,
    )


def _tokens(batch: int, length: int) -> Shapes:
    return {"input_ids": (batch, length), "attention_mask": (batch, length)}


CASES = (
    Case(
        name="efficientnet-lite0",
        task=stamps.task,
        calibration=calibration.photo_stamps,
        speeds=[Speed("batch 1", {"input": (1, 3, 224, 224)}, 1.8)],
        score=0.797,
        bytes=5.1 * _MEGABYTE,
        compile_seconds=4,
        peers=("ort-static-minmax", "ort-static-percentile"),
    ),
    Case(
        name="minilm",
        task=sentences.task,
        texts=calibration.sentences_of_articles,
        speeds=[Speed("1x32", _tokens(1, 32), 2.3), Speed("8x128", _tokens(8, 128), 2.2)],
        score=0.33,
        bytes=23 * _MEGABYTE,
        peers=("ort-dynamic",),
    ),
    Case(
        name="ppocr-rec",
        task=lines.task,
        calibration=calibration.text_lines,
        speeds=[Speed("48x320", {"x": (1, 3, 48, 320)}, 1.5)],
        score_loss=0.01,
        bytes_ratio=0.3,
        peers=("ort-dynamic",),
    ),
    Case(
        name="ppocr-det",
        task=pages.task,
        calibration=calibration.text_pages,
        speeds=[Speed("480x640", {"x": (1, 3, 480, 640)}, 2.0)],
        score_loss=0.01,
        bytes_ratio=0.3,
        peers=("ort-dynamic",),
    ),
    Case(
        name="magika",
        task=filetypes.task,
        calibration=calibration.file_ends,
        speeds=[Speed("batch 1", {"bytes": (1, 2048)})],
        score_loss=0.01,
        bytes_ratio=0.3,
        peers=("ort-dynamic",),
    ),
    Case(
        name="textgenrnn",
        task=language.characters_task,
        calibration=calibration.character_contexts,
        speeds=[Speed("batch 1", {"ids": (1, 40)})],
        score_loss=0.01,
        bytes_ratio=0.3,
    ),
    _fashion("fashion-resnet", 2.0),
    _fashion("fashion-vit", 2.0),
    _fashion("fashion-mobile", 1.0, bytes_ratio=0.45),
    _fashion("fashion-lstm", 1.0),
    Case(
        name="smollm2-135m",
        task=language.perplexity_task,
        texts=calibration.windows_of_articles,
        speeds=[Speed("1x64", {"input_ids": (1, 64)})],
        score=38.0,
        compile_seconds=30,
        peak_bytes=1.5e9,
    ),
)


def _low_bits(name: str, label: str, *options: str, **goals: Any) -> Case:
    """A case of few bits: what the plain one has, but for its goals."""
    plain = next(case for case in CASES if case.name == name)
    plain = replace(plain, score=None, score_loss=None, bytes_ratio=None, compile_seconds=None)
    data = plain.calibration or plain.texts
    found = replace(plain, name=f"{name}@{label}", options=options, calibration=data, peers=())
    return replace(found, **goals)


def _tiny(name: str, bits: int, loss: float) -> Case:
    text = preset("int4").replace("bits=4", f"bits={bits}")
    return _low_bits(name, f"W{bits}A8", "--pipeline", text, score_loss=loss)


LOW_BIT_CASES = (
    _low_bits(
        "efficientnet-lite0", "2.6MB", "--size", "2.6MB",
        bytes=2.6 * _MEGABYTE, score=0.78, outputs={"same_argmax": 0.9},
    ),
    _low_bits(
        "minilm", "12MB", "--size", "12MB",
        "--pipeline", f"{preset('mixed')},recover{{seconds=180}}",
        bytes=12 * _MEGABYTE, score=0.325, outputs={"cosine": 0.98},
    ),
    _low_bits(
        "smollm2-135m", "75MB", "--pipeline", "int4", bytes=75 * _MEGABYTE, score=39.3,
        speeds=[Speed("1x1", {"input_ids": (1, 1)}, 2.5), Speed("1x64", {"input_ids": (1, 64)})],
    ),
    _low_bits("smollm2-135m", "60MB", "--size", "60MB", bytes=60 * _MEGABYTE, score=45.0),
    _low_bits("ppocr-rec", "3.2MB", "--size", "3.2MB", bytes=3.2 * _MEGABYTE, score=0.89),
    _low_bits("ppocr-det", "1.6MB", "--size", "1.6MB", bytes=1.6 * _MEGABYTE, score=0.965),
    _low_bits("textgenrnn", "0.35MB", "--size", "350kB", bytes=0.35 * _MEGABYTE, score=2.42),
    *(
        _tiny(f"fashion-{kind}", bits, loss)
        for kind in ("vit", "resnet", "mobile")
        for bits, loss in ((4, 0.005), (3, 0.02))
    ),
)  # fmt: skip
