"""Named arrays in an .npz file: no pickle, no dates, the same bytes for the same arrays."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

Array = np.ndarray[Any, Any]


@final
@dataclass(frozen=True)
class StoredArray:
    """An array in an .npy file that is read when it is used."""

    path: Path

    def load(self) -> Array:
        """The whole array."""
        read: Array = np.load(self.path, allow_pickle=False)
        return read


def write_arrays(path: Path, arrays: Mapping[str, Array], *, comment: str = "") -> None:
    """Write arrays under any names; `numpy.savez` refuses a few. Strings become fixed width.

    `comment` is what the archive says of itself.
    """
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = comment.encode()
        for name, array in arrays.items():
            plain = array.astype(np.str_) if array.dtype == np.object_ else array
            # A name, not a ZipInfo of now: entries opened by name carry no date.
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, plain, allow_pickle=False)


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file; ValueError where it is none, OSError where it is not there."""
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("the file is no zip archive")
            file.seek(0)
            return dict(np.load(file, allow_pickle=False))
    except (EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(str(error)) from None
