"""Bytes that the weights of a group take in the emitted file, under the options of an offer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.ir.facts import FLOAT, Option
from octavo.ir.option_bytes import each_weight_bytes
from octavo.ir.quant import QuantSpec
from octavo.passes.groups import weight_row, weight_source
from octavo.passes.tied_weights import stored

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir

    from octavo.ir.target import Target

# What a weight takes that stays float where a file holds float16.
_HALF = Option("storage", QuantSpec("f16"))


def offer_bytes(
    nodes: Mapping[str, onnx_ir.Node],
    options: Mapping[str, Option],
    target: Target,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> int:
    """The weights of all nodes with an option; one that several store alike is counted once.

    `shapes` are those of constants that are to be smaller than they are, by name.
    """
    counted: set[tuple[object, ...]] = set()
    total = 0
    for name, option in options.items():
        node = nodes[name]
        row = weight_row(node, target)
        weights = row.weights if row is not None else ()
        held = _HALF if option == FLOAT and target.half_constants else option
        for value, found in each_weight_bytes(node, weights, held, shapes):
            source, spec = (
                stored(value, option.weight) if option.weight else (weight_source(value), None)
            )
            in_blocks = option.method == "weight-only"
            key = (source.name if source is not None else "", spec, in_blocks)
            total += found.read + (0 if key in counted else found.stored)
            counted.add(key)
    return total
