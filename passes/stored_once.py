"""Storing a weight in few bits shrinks the file only where nobody else needs it in float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from octavo.ir.facts import FLOAT, Choice

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.model import Model
    from octavo.ir.target import Target

_REASON = "its weight is needed in float elsewhere, which storing codes beside would enlarge"


def without_float_copies(
    model: Model, choices: Mapping[str, Choice], target: Target
) -> dict[str, Choice]:
    """The choices, with float for each stored weight that an output or a float node keeps.

    A node that becomes float may keep the weight of another one, so this repeats.
    """
    chosen = dict(choices)
    nodes = {node.name or "": node for node in model.graph}
    while True:
        lost = [
            name
            for name, choice in chosen.items()
            if choice.option.method == "storage"
            and any(_stays_float(v, chosen, model) for v in _weights(nodes[name], target))
        ]
        if not lost:
            return chosen
        chosen |= {name: replace(chosen[name], option=FLOAT, reason=_REASON) for name in lost}


def _weights(node: onnx_ir.Node, target: Target) -> list[onnx_ir.Value]:
    """The constants that a node stores; a Transpose may turn a tied one."""
    row = target.support(node, "storage").row
    read = [node.inputs[index] for index in row.weights] if row is not None else []
    made = [value.producer() if value is not None else None for value in read]
    sources = [v if n is None else n.inputs[0] for v, n in zip(read, made, strict=True)]
    return [value for value in sources if value is not None]


def _stays_float(value: onnx_ir.Value, chosen: Mapping[str, Choice], model: Model) -> bool:
    if value.is_graph_output():
        return True
    for reader in value.consumers():
        name = reader.name or ""
        if name in chosen and reader.graph is model.graph:
            if chosen[name].option.method == "float":
                return True
        elif reader.op_type != "Transpose" or _stays_float(reader.outputs[0], chosen, model):
            return True
    return False
