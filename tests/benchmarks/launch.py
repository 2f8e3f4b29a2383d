"""Run a command and say what it cost: `python launch.py RESULT.json COMMAND …`, output passed on.

A process of its own and a small one: on Linux the peak memory of a process counts that of the one
which started it, up to the moment the new program is loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(result: Path, command: list[str]) -> None:
    """Write `seconds`, `peak_bytes` and the exit `code` of a command to a file."""
    begin = time.perf_counter()
    process = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(process, 0)
    found = {
        "seconds": time.perf_counter() - begin,
        "peak_bytes": usage.ru_maxrss * 1024,
        "code": os.waitstatus_to_exitcode(status),
    }
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
