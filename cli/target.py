"""Targets by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.backends.ort_target import TARGETS
from octavo.ir.errors import UnknownName

if TYPE_CHECKING:
    from octavo.ir.target import Target


def target_of(name: str) -> Target:
    """The target of a name; UnknownName with near misses."""
    if name not in TARGETS:
        raise UnknownName("target", name, TARGETS)
    return TARGETS[name]
