"""Instruments watch a pipeline: they may look at everything and complete the record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.ir.model import Model
    from octavo.passes.base import Pass
    from octavo.passes.pipeline import Pipeline
    from octavo.passes.record import PassRecord


class Instrument:
    """Does nothing; subclasses override what they watch. Called in stack order."""

    def before_pass(self, index: int, pass_: Pass, model: Model, pipeline: Pipeline) -> None:
        """Called with the model a pass is about to get."""

    def after_pass(self, record: PassRecord, model: Model) -> PassRecord:
        """Called with the verified result; returns the record, completed or as it was."""
        return record

    def failed(
        self, index: int, pass_: Pass, model: Model, pipeline: Pipeline, error: Exception
    ) -> Path | None:
        """Called when a pass raised what nobody expected; may name a folder that replays it."""
        return None
