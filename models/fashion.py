"""Fashion-MNIST (Xiao et al. 2017) as the networks read it, from Debian's dataset-fashion-mnist."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from octavo.ir.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOLDER = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.286, 0.353


def images(part: Literal["train", "t10k"], folder: Path = FOLDER) -> NDArray[np.float32]:
    """Normalized images, `[n, 1, 28, 28]`; UsageError when the data set is not installed."""
    pixels = _read(folder / f"{part}-images-idx3-ubyte.gz", header_bytes=16)
    return ((pixels.reshape(-1, 1, 28, 28) / np.float32(255) - MEAN) / STD).astype(np.float32)


def labels(part: Literal["train", "t10k"], folder: Path = FOLDER) -> NDArray[np.int64]:
    """Classes 0 to 9, `[n]`; UsageError when the data set is not installed."""
    return _read(folder / f"{part}-labels-idx1-ubyte.gz", header_bytes=8).astype(np.int64)


def _read(path: Path, header_bytes: int) -> NDArray[np.uint8]:
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise UsageError(
            "Fashion-MNIST is not installed",
            where=str(error.filename),
            hint="apt-get install dataset-fashion-mnist",
        ) from error
    return np.frombuffer(content, np.uint8, offset=header_bytes)
