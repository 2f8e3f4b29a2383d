"""Reading lines of text: share of right characters on rendered, noisy lines of news."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import corpus
import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFilter
from task import Array, Scores, Task

_HEIGHT, _LINES, _FONTS = 48, 100, 12
_NOISE = 25


@final
@dataclass(frozen=True)
class Line:
    """A rendered line, float32 `[1, 3, 48, width]`, and what it says."""

    image: Array
    text: str


def lines(words: list[str], count: int, seed: int) -> Iterator[Line]:
    """Lines of three to six words, a little turned and blurred, grey on grey."""
    fonts = corpus.fonts(monospaced=False)[:_FONTS]
    rng = np.random.default_rng(seed)
    used = 0
    for k in range(count):
        length = int(rng.integers(3, 7))
        text = " ".join(words[used : used + length])
        used += length
        picture = _draw(text, fonts[k % len(fonts)], rng)
        width = max(_HEIGHT, round(picture.width * _HEIGHT / picture.height))
        picture = picture.resize((width, _HEIGHT), Image.Resampling.BILINEAR)
        noisy = np.asarray(picture, np.float32) + rng.normal(0, _NOISE, (_HEIGHT, width))
        grey = ((noisy / 255 - 0.5) / 0.5).astype(np.float32)
        yield Line(np.repeat(grey[None, None], 3, axis=1), text)


def _draw(text: str, path: Path, rng: np.random.Generator) -> Image.Image:
    font = corpus.font(path, int(rng.integers(10, 16)))
    ink, paper = int(rng.integers(0, 90)), int(rng.integers(170, 256))
    picture = Image.new("L", (int(font.getlength(text)) + 16, int(font.size) + 10), paper)
    ImageDraw.Draw(picture).text((8, 4), text, fill=ink, font=font)
    angle = float(rng.uniform(-1, 1))
    picture = picture.rotate(angle, fillcolor=paper, resample=Image.Resampling.BICUBIC)
    return picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.9))))


def task(model: Path) -> Task:
    """A hundred lines; the characters that classes stand for lie in the model's metadata."""
    source = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    alphabet = ["", *source.get_modelmeta().custom_metadata_map["character"].split("\n"), " "]
    scored = list(lines(corpus.news().split(), _LINES, seed=0))

    def score(outputs: Iterable[Array]) -> Scores:
        read = [_decode(output[0].argmax(1), alphabet) for output in outputs]
        pairs = list(zip(read, (line.text for line in scored), strict=True))
        wrong = sum(_distance(answer, text) for answer, text in pairs)
        return {
            "right_characters": 1 - wrong / sum(len(text) for _, text in pairs),
            "right_lines": float(np.mean([answer == text for answer, text in pairs])),
        }

    return Task("right_characters", [{"x": line.image} for line in scored], score)


def _decode(best: Array, alphabet: list[str]) -> str:
    """Connectionist temporal classification: drop repetitions, then blanks (class 0)."""
    kept = best[np.insert(best[1:] != best[:-1], 0, True)]
    return "".join(alphabet[k] for k in kept).strip()


def _distance(a: str, b: str) -> int:
    """Levenshtein's edit distance."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            substituted = diagonal + (left != right)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1]
