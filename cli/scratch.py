"""Where files of a compilation go that nobody asked to keep."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path


def scratch_folder() -> Path:
    """A temporary folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="octavo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
