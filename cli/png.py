"""A PNG file from pixels, and a sheet of images to look at."""

from __future__ import annotations

import math
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GRAY, _COLOUR = 0, 2
_MARGIN, _BACKGROUND = 2, 32
# Small images are enlarged until a person sees something.
_LEAST_SIZE = 56
_MOST_IMAGES = 64


def write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write `[H, W]` in grey or `[H, W, 3]` in colour, eight bits a channel."""
    height, width = pixels.shape[:2]
    kind = _GRAY if pixels.ndim == 2 else _COLOUR
    rows = pixels.reshape(height, -1)
    # Every row starts with the filter it is stored with: none.
    raw = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    path.write_bytes(_SIGNATURE + b"".join(_chunk(name, content) for name, content in parts))


def _chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def contact_sheet(images: NDArray[np.generic]) -> NDArray[np.uint8] | None:
    """A square of images `[N, C, H, W]` or `[N, H, W, C]`, all on one scale; None if they are none.

    Black and white are the 0.5th and 99.5th percentile of all numbers.
    """
    if images.ndim != 4 or min(images.shape) < 1:
        return None
    if images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.shape[-1] not in (1, 3) or min(images.shape[1:3]) < 4:
        return None
    numbers = images.astype(np.float64)
    low, high = np.percentile(numbers, (0.5, 99.5))
    scaled = np.clip((numbers[:_MOST_IMAGES] - low) / max(high - low, 1e-12), 0, 1) * 255
    times = max(1, -(-_LEAST_SIZE // scaled.shape[1]))
    large = scaled.astype(np.uint8).repeat(times, axis=1).repeat(times, axis=2)
    framed = np.pad(
        large, ((0, 0), (0, _MARGIN), (0, _MARGIN), (0, 0)), constant_values=_BACKGROUND
    )
    count, height, width, channels = framed.shape
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    sheet = np.full((down * across, height, width, channels), _BACKGROUND, np.uint8)
    sheet[:count] = framed
    rows = sheet.reshape(down, across, height, width, channels).transpose(0, 2, 1, 3, 4)
    found = rows.reshape(down * height, across * width, channels)
    return found[..., 0] if channels == 1 else found
