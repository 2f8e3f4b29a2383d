"""What a graph knows of the inputs it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.facts import Norms
from octavo.passes.output_damage import OutputDamage

if TYPE_CHECKING:
    from octavo.ir.facts import Norm
    from octavo.ir.model import Model
    from octavo.ir.synthetic import Origin
    from octavo.ir.torch_synthesis import Moments
    from octavo.passes.input_laws import InputLaw

_VIEWS = ("Cast", "Dropout", "Identity", "Reshape")


@final
@dataclass(frozen=True)
class Evidence:
    """What a graph knows of its inputs: statistics by value, attention, and the classes."""

    moments: tuple[Moments, ...]
    attended: tuple[str, ...]
    logits: str

    @staticmethod
    def of(model: Model) -> Evidence:
        """Read from Norms and the graph's structure."""
        from octavo.ir.torch_synthesis import Moments

        moments = tuple(
            Moments(name, 1, norm.beta, np.abs(norm.gamma))
            for name, norm in batch_norms(model).items()
        )
        return Evidence(moments, tuple(_attended(model)), _logits(model))

    def why_not(self, statistics: float, entropy: float, laws: Mapping[str, InputLaw]) -> str:
        """Why these terms cannot optimise inputs; empty where they can."""
        if not any(law.kind != "ids" for law in laws.values()):
            return "no input is of floats"
        if not (statistics and self.moments) and not (entropy and self.attended):
            return "no BatchNormalization statistics are stored, and there is no attention"
        return ""

    @property
    def origin(self) -> Origin:
        """What the feeds made with it are called."""
        return "synthetic-bn" if self.moments else "synthetic-attention"


def batch_norms(model: Model) -> dict[str, Norm]:
    """The BatchNormalizations, folded or not, whose values the graph still computes, by value."""
    norms = model.find(Norms) or Norms({})
    made = {value.name for node in model.graph for value in node.outputs}
    return {n: norm for n, norm in norms.by_value.items() if norm.kind == "batch" and n in made}


def _attended(model: Model) -> Iterator[str]:
    """What attention hands on: products with the probabilities of a Softmax on the left."""
    for node in model.graph:
        if node.op_type != "MatMul" or node.inputs[0] is None:
            continue
        maker = node.inputs[0].producer()
        while maker is not None and maker.op_type in _VIEWS and maker.inputs[0] is not None:
            maker = maker.inputs[0].producer()
        rank = node.outputs[0].shape.rank() if node.outputs[0].shape is not None else 0
        if maker is not None and maker.op_type == "Softmax" and rank in (3, 4):
            yield node.outputs[0].name or ""


def _logits(model: Model) -> str:
    """The first output if it holds one row of logits per sample, or what its Softmax reads."""
    value = model.graph.outputs[0]
    kind = OutputDamage.of(model).kinds.get(value.name or "")
    if value.shape is None or value.shape.rank() != 2:
        return ""
    maker = value.producer()
    if kind == "probabilities" and maker is not None and maker.op_type == "Softmax":
        return (maker.inputs[0].name or "") if maker.inputs[0] is not None else ""
    return (value.name or "") if kind == "logits" else ""
