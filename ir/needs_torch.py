"""Gradients and PyTorch programs need torch, which is an optional dependency."""

from __future__ import annotations

import importlib.util

from octavo.ir.errors import UsageError


def need_torch(what: str) -> None:
    """UsageError that says what cannot be done where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise UsageError(f"{what} needs torch", hint="pip install 'octavo[torch]'")
