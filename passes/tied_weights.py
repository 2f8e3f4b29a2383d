"""Weights that several nodes read, some of them turned: stored once where all agree on a grid."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from octavo.ir.constants import matrix_source
from octavo.ir.quant import fitted, turned

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir

    from octavo.ir.facts import Choice
    from octavo.ir.model import Model
    from octavo.ir.quant import QuantSpec
    from octavo.ir.target import Target


def stored(value: onnx_ir.Value, spec: QuantSpec) -> tuple[onnx_ir.Value, QuantSpec]:
    """The constant behind a weight that is read with a spec, and the spec along its own axes."""
    source = matrix_source(value)
    own = value if source is None else source
    assert own.const_value is not None
    along = spec if source is None else turned(spec)
    return own, fitted(along, tuple(own.const_value.shape.numpy()))


def tied_weights(model: Model, chosen: Mapping[str, Choice], target: Target) -> set[str]:
    """Names of constants that are also read turned, and that all planned readers store alike."""
    specs: dict[str, set[QuantSpec]] = defaultdict(set)
    readers: dict[str, set[bool]] = defaultdict(set)
    for node in model.graph:
        choice = chosen.get(node.name or "")
        spec = None if choice is None else choice.option.weight
        row = target.support(node, choice.option.method).row if choice and spec else None
        for index in row.weights if row is not None else ():
            value = node.inputs[index]
            if value is None or spec is None:
                continue
            source, own = stored(value, spec)
            specs[source.name or ""].add(own)
            readers[source.name or ""].add(source is value)
    return {name for name, found in specs.items() if len(found) == 1 and len(readers[name]) == 2}
