"""Top-1 accuracy on the 10,000 test images of Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from task import Array, Scores, Task

from octavo.models import fashion

_BATCH = 250


def task(model: Path) -> Task:
    """The test images in batches; every classifier of `models/` reads them as `input`."""
    images, labels = fashion.images("t10k"), fashion.labels("t10k")

    def score(outputs: Iterable[Array]) -> Scores:
        predicted = np.concatenate([logits.argmax(1) for logits in outputs])
        return {"top1": float((predicted == labels).mean())}

    batches = range(0, len(images), _BATCH)
    return Task("top1", [{"input": images[k : k + _BATCH]} for k in batches], score)
