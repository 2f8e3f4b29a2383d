"""Budgets as people write them: `4.9MB`, `25%`, `3ms`, `0.5x`, `120G`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from octavo.ir.errors import UsageError

_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\s\d]*)\s*$")
_BYTES = {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1 << 10, "MiB": 1 << 20,
          "GiB": 1 << 30}  # fmt: skip
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_COUNTS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SHARES = {"%": 0.01, "x": 1.0}


def parse_bytes(text: str, option: str, whole: float) -> float:
    """Bytes of a budget; `25%` and `0.25x` are shares of `whole` bytes."""
    return _parse(text, option, whole, _BYTES, "bytes, as 4.9MB, 500kB or 25%")


def parse_seconds(text: str, option: str, whole: float) -> float:
    """Seconds of a budget; `0.5x` and `50%` are shares of `whole` seconds."""
    return _parse(text, option, whole, _SECONDS, "time, as 3ms, 0.2s or 0.5x")


def parse_count(text: str, option: str, whole: float) -> float:
    """A count, as bit operations; `25%` is a share of `whole`."""
    return _parse(text, option, whole, _COUNTS, "a count, as 12G or 25%")


def parse_drop(text: str, option: str, whole: float) -> float:
    """How much a metric may fall: `0.01` in its own unit, `1%` of `whole`."""
    return _parse(text, option, abs(whole), {"": 1.0}, "a drop of the metric, as 1% or 0.01")


def _parse(text: str, option: str, whole: float, units: Mapping[str, float], wanted: str) -> float:
    match = _NUMBER.match(text)
    if match is None:
        raise UsageError(f"{option}: '{text}' is not a budget", hint=f"give {wanted}")
    number, unit = float(match[1]), match[2]
    folded = {known.lower(): factor for known, factor in units.items()}
    if unit in _SHARES:
        value = number * _SHARES[unit] * whole
    elif unit in units or unit.lower() in folded:
        value = number * units.get(unit, folded.get(unit.lower(), 0.0))
    else:
        why = f"'{unit}' is no unit of it" if unit else "it has no unit"
        raise UsageError(f"{option}: '{text}' has the wrong unit", why=why, hint=f"give {wanted}")
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{option}: '{text}' must be more than zero", hint=f"give {wanted}")
    return value
