"""ImageNet accuracy on photo stamps: cut-outs on white, whose classes a person assigned.

They rank compressions of one network; the numbers are no accuracy on ImageNet. A picture counts as
right when the network names one of its classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from task import Array, Scores, Task

FOLDER = Path("/usr/share/tuxpaint/stamps")
_CLASSES = Path(__file__).with_suffix(".txt")
_SIDE, _LONGEST = 224, 200
_MEAN, _STD = 127, 128
_BATCH = 16


def classes() -> dict[str, set[int]]:
    """The ImageNet classes that count for each scored stamp, by path without its ending."""
    lines = (line.split() for line in _CLASSES.read_text().splitlines() if line[0] != "#")
    return {path: {int(number) for number in numbers} for path, *numbers in lines}


def picture(path: Path) -> Array:
    """A stamp in the middle of a white square, float32 `[3, 224, 224]`."""
    stamp = Image.open(path).convert("RGBA")
    scale = _LONGEST / max(stamp.size)
    width, height = (max(1, round(side * scale)) for side in stamp.size)
    stamp = stamp.resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.new("RGBA", (_SIDE, _SIDE), "white")
    canvas.paste(stamp, ((_SIDE - width) // 2, (_SIDE - height) // 2), stamp)
    pixels = np.asarray(canvas.convert("RGB"), np.float32)
    return (pixels.transpose(2, 0, 1) - _MEAN) / _STD


def task(model: Path) -> Task:
    """Every stamp and its mirror image."""
    scored = classes()
    stamps = np.stack([picture(FOLDER / f"{name}.png") for name in scored])
    images = np.concatenate([stamps, stamps[..., ::-1]])
    labels = [*scored.values()] * 2

    def score(outputs: Iterable[Array]) -> Scores:
        ranked = np.concatenate([np.argsort(-logits, axis=1)[:, :5] for logits in outputs])
        pairs = list(zip(ranked.tolist(), labels, strict=True))
        return {
            "top1": float(np.mean([best[0] in right for best, right in pairs])),
            "top5": float(np.mean([not right.isdisjoint(best) for best, right in pairs])),
        }

    batches = range(0, len(images), _BATCH)
    feeds = [{"input": np.ascontiguousarray(images[k : k + _BATCH])} for k in batches]
    return Task("top1", feeds, score)
