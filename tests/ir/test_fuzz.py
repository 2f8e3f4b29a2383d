"""Mutated model files: reading one gives a Model or an OctavoError, soon and in bounded memory.

The mutations run in a child process, so that a crash or a limit ends the child, not the tests.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MUTATIONS = 2000
BATCHES = 2


@pytest.mark.parametrize("batch", range(BATCHES))
def test_mutated_models_never_break_reading(batch: int, tmp_path: Path) -> None:
    script = Path(__file__).with_name("fuzz_reading.py")
    arguments = [str(MUTATIONS // BATCHES), str(batch), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    read, refused = (int(word) for word in done.stdout.split())
    assert read + refused == MUTATIONS // BATCHES
    # A fuzzer that only makes noise would find nothing: both outcomes must be common.
    assert min(read, refused) > MUTATIONS // BATCHES // 20
