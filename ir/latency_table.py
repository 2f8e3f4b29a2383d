"""Seconds of kernels on one device, in a file that is recorded there and used elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

from octavo.ir.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT = "octavo latencies 1"
_PARTS = ("runtime", "processor", "threads")
# Moving a float32 at memory speed: the rate where nothing was measured.
NOMINAL_SECONDS_PER_BYTE = 1 / 8e9


@final
@dataclass(frozen=True)
class LatencyTable:
    """Seconds by node signature and option key (see `ir/signature.py`), and where they hold.

    Every figure is a share of wall time: a kernel's part of all kernel seconds of a run, times
    the seconds that run takes without a profiler. So the rows of a model add up to its latency,
    what the runtime does between kernels included. `environment` reads "runtime, processor,
    threads"; rates are seconds per byte of the float32 tensor that is (de)quantized.
    """

    environment: str
    rows: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    quantize_seconds_per_byte: float = NOMINAL_SECONDS_PER_BYTE
    dequantize_seconds_per_byte: float = NOMINAL_SECONDS_PER_BYTE

    def merge(self, newer: LatencyTable) -> LatencyTable:
        """The rows of both, `newer` where both know an option; for tables of one environment."""
        rows = {name: dict(row) for name, row in self.rows.items()}
        for name, row in newer.rows.items():
            rows[name] = rows.get(name, {}) | dict(row)
        return replace(newer, rows=rows)

    def differences(self, environment: str) -> tuple[str, ...]:
        """How the table's environment differs from another one, a phrase for each part."""
        pairs = zip(_PARTS, _split(self.environment), _split(environment), strict=True)
        return tuple(
            f"{part}: the profile has '{own}', here is '{other}'"
            for part, own, other in pairs
            if own != other
        )

    def write(self, path: Path) -> None:
        """Write the table as JSON, the same bytes for the same table; raises UsageError."""
        content = {
            "format": _FORMAT,
            "environment": self.environment,
            "quantize_seconds_per_byte": self.quantize_seconds_per_byte,
            "dequantize_seconds_per_byte": self.dequantize_seconds_per_byte,
            "rows": {name: dict(sorted(row.items())) for name, row in sorted(self.rows.items())},
        }
        try:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            message = f"the profile cannot be written to {path}"
            raise UsageError(message, why=error.strerror or str(error)) from error


def read_table(path: Path) -> LatencyTable:
    """The table that `write` wrote; UsageError where the file is anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"the profile {path} cannot be read"
        raise UsageError(message, why=error.strerror or str(error)) from error
    except ValueError as error:
        raise _damaged(path, f"it is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise _damaged(path, f'it does not say "format": "{_FORMAT}"')
    environment, rows = content.get("environment"), content.get("rows")
    if not isinstance(environment, str) or not isinstance(rows, dict):
        raise _damaged(path, "it lacks an environment or rows")
    rates: list[Any] = [content.get(f"{n}_seconds_per_byte") for n in ("quantize", "dequantize")]
    if not all(map(_is_seconds, rates)):
        raise _damaged(path, "the rates of quantization are not finite seconds of at least 0")
    for name, row in rows.items():
        if not isinstance(row, dict) or not all(map(_is_seconds, row.values())):
            raise _damaged(path, f"the row '{name}' does not hold finite seconds of at least 0")
    return LatencyTable(environment, rows, float(rates[0]), float(rates[1]))


def _is_seconds(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0  # type: ignore[arg-type,operator]


def _damaged(path: Path, why: str) -> UsageError:
    message = f"{path} is no latency profile"
    return UsageError(message, why=why, hint="octavo profile MODEL -o FILE writes one")


def _split(environment: str) -> tuple[str, str, str]:
    """Runtime, processor, threads; a processor's name may hold commas."""
    runtime, _, rest = environment.partition(", ")
    processor, _, threads = rest.rpartition(", ")
    return runtime, processor, threads
