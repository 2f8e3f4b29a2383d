"""Targets and their backends by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.backends.registry import TARGETS, backend
from octavo.ir.backend import Checker
from octavo.ir.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from octavo.ir.backend import Backend
    from octavo.ir.target import Target

DEFAULT = "ort-cpu"


def target_of(name: str) -> Target:
    """The target of a name; UnknownName with near misses."""
    if name not in TARGETS:
        raise UnknownName("target", name, TARGETS, why=_why_unknown(name))
    return TARGETS[name]


def _why_unknown(name: str) -> str:
    """What a family of targets has instead of a part that it lacks."""
    family = name.partition("-")[0].partition(":")[0]
    parts = [known for known in TARGETS if known.startswith(f"{family}-")]
    if family not in TARGETS or not parts:
        return ""
    return f"{family} knows {', '.join(parts)}; '{family}' itself is what all of them run"


def backend_of(name: str) -> Backend:
    """The backend of a target's name; UnknownName with near misses."""
    return backend(target_of(name).name)


def checker_of(name: str) -> Checker:
    """What holds files against a target's rules; UsageError for a target that has none."""
    found = backend_of(name)
    if not isinstance(found, Checker):
        message = f"{name} has no rules to check: it loads any ONNX file"
        raise UsageError(message, hint="octavo targets list shows the others, as tensorrt")
    return found
