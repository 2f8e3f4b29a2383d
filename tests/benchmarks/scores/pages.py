"""Finding text: how well a probability map separates text from photographs, pixel by pixel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import corpus
import numpy as np
from PIL import Image, ImageDraw
from task import Array, Scores, Task, package_folder

_WIDTH, _HEIGHT, _PAGES, _EVERY = 640, 480, 12, 4
_NOISE, _THRESHOLD = 12, 0.3
# Of the blue, green and red channel.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCORED_PHOTOS = (
    "astronaut.png",
    "coffee.png",
    "chelsea.png",
    "brick.png",
    "hubble_deep_field.jpg",
    "rocket.jpg",
)


@final
@dataclass(frozen=True)
class Page:
    """A page, float32 `[1, 3, 480, 640]`, and where its text is, `[480, 640]`."""

    image: Array
    text: Array


def pages(words: Iterable[str], photos: Iterable[str], count: int, seed: int) -> Iterator[Page]:
    """Lines of two to five words in several fonts and colours over photographs."""
    folder = package_folder("skimage") / "data"
    size = (_WIDTH, _HEIGHT)
    backgrounds = [Image.open(folder / name).convert("RGB").resize(size) for name in photos]
    rng = np.random.default_rng(seed)
    stream = iter(words)
    for k in range(count):
        picture = backgrounds[k % len(backgrounds)].copy()
        text = _write(picture, stream, rng)
        pixels = np.asarray(picture, np.float32)[..., ::-1]
        noisy = pixels + rng.normal(0, _NOISE, (_HEIGHT, _WIDTH, 3))
        image = ((noisy / 255 - _MEAN) / _STD).astype(np.float32)
        yield Page(image.transpose(2, 0, 1)[None], text)


def _write(picture: Image.Image, words: Iterator[str], rng: np.random.Generator) -> Array:
    """Fill a picture with lines; returns the mask of their boxes."""
    fonts = corpus.fonts(monospaced=True)
    mask = np.zeros((_HEIGHT, _WIDTH), np.bool_)
    draw = ImageDraw.Draw(picture)
    y = int(rng.integers(5, 40))
    while y < _HEIGHT - 50:
        font = corpus.font(fonts[int(rng.integers(len(fonts)))], int(rng.integers(12, 28)))
        text = " ".join(next(words) for _ in range(int(rng.integers(2, 6))))
        x = int(rng.integers(5, 250))
        left, top, right, bottom = map(int, draw.textbbox((x, y), text, font=font))
        ink = 255 * int(rng.integers(0, 2))
        colour, edge = (ink, ink, int(rng.integers(0, 256))), (255 - ink,) * 3
        draw.text((x, y), text, fill=colour, font=font, stroke_width=1, stroke_fill=edge)
        mask[top:bottom, left:right] = True
        y = bottom + int(rng.integers(8, 50))
    return mask


def task(model: Path) -> Task:
    """Twelve pages; every fourth pixel in each direction counts."""
    scored = list(pages(corpus.news().split(), SCORED_PHOTOS, _PAGES, seed=0))
    truth = np.concatenate([page.text[::_EVERY, ::_EVERY].ravel() for page in scored])

    def score(outputs: Iterable[Array]) -> Scores:
        from sklearn.metrics import f1_score, roc_auc_score

        maps = [output[0, 0, ::_EVERY, ::_EVERY].ravel() for output in outputs]
        likely = np.concatenate(maps)
        area, f1 = roc_auc_score(truth, likely), f1_score(truth, likely > _THRESHOLD)
        return {"pixel_auc": float(area), "pixel_f1": float(f1)}

    return Task("pixel_auc", [{"x": page.image} for page in scored], score, rows=False)
