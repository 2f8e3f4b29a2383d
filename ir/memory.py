"""Memory that nobody uses any more goes back to the system."""

from __future__ import annotations

import ctypes
import sys


def release_memory() -> None:
    """Return freed memory to the system; the C library would keep most of a closed session's."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
