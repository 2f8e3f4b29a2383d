"""Write the data files that ship beside the networks: `python -m octavo.models.make_data FOLDER`.

The images are taken at equal distances from Fashion-MNIST, so the same files come out each time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from octavo.models import fashion

CALIBRATION_IMAGES = 256
TEST_IMAGES = 2_000


def write(folder: Path) -> None:
    """Write `fashion.npz` and `fashion_test.npz` into a folder."""
    train, test = fashion.images("train"), fashion.images("t10k")
    calibration = _spread(len(train), CALIBRATION_IMAGES)
    held_out = _spread(len(test), TEST_IMAGES)
    np.savez_compressed(folder / "fashion.npz", input=train[calibration])
    np.savez_compressed(
        folder / "fashion_test.npz", input=test[held_out], label=fashion.labels("t10k")[held_out]
    )


def _spread(available: int, wanted: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(wanted) * available // wanted


if __name__ == "__main__":
    write(Path(sys.argv[1]))
