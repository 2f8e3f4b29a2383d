"""What a compressed model is compared with: the same graph before anything was rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.ir.facts import Fact

if TYPE_CHECKING:
    from octavo.ir.model import Model


@final
@dataclass(frozen=True)
class Reference(Fact):
    """The float model, whose nodes and values have the names they have in the compressed one.

    Its tensors are those of the source, so that keeping it costs no memory.
    """

    model: Model


@final
@dataclass(frozen=True)
class Original(Fact):
    """The float model before its structure changed: nodes and values may have other names."""

    model: Model


def with_original(model: Model, before: Model) -> Model:
    """A model that remembers what it was before its structure changed for the first time."""
    known = before.find(Original)
    return model.with_fact(known or Original(before.keeping(())))
