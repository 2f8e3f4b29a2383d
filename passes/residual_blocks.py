"""Residual blocks: from a value to the sum of what two branches made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir

    from octavo.ir.model import Model


@final
@dataclass(frozen=True)
class Block:
    """What a residual block reads and what it computes, by value name."""

    entry: str
    exit: str


def residual_blocks(model: Model) -> dict[str, Block]:
    """The innermost residual block of every node that lies in one, by node name.

    A block ends at an Add of two computed values, and begins at the last float value that both
    depend on: the input of the identity, or of both branches where the skip has a projection.
    """
    nodes = list(model.graph)
    behind = _Behind(model, nodes)
    blocks: dict[str, Block] = {}
    for at, node in enumerate(nodes):
        if node.op_type != "Add" or node.domain:
            continue
        left, right = (behind.of(value) for value in node.inputs)
        if common := left & right:
            entry = behind.floats[common.bit_length() - 1]
            block = Block(entry.name or "", node.outputs[0].name or "")
            for member in _between(nodes, at, entry):
                if any(behind.connects(entry, value, node) for value in member.outputs):
                    blocks.setdefault(member.name or "", block)
    return blocks


class _Behind:
    """Which float values every value depends on: sets as the bits of an integer."""

    def __init__(self, model: Model, nodes: list[onnx_ir.Node]) -> None:
        self.floats: list[onnx_ir.Value] = []
        self.bits: dict[int, int] = {}
        self.sets: dict[int, int] = {}
        for value in model.graph.inputs:
            self._add(value, 0)
        for node in nodes:
            before = 0
            for read in node.inputs:
                before |= self.of(read)
            for value in node.outputs:
                self._add(value, before)

    def of(self, value: onnx_ir.Value | None) -> int:
        """The floats that a value depends on, itself included; none for a constant."""
        return self.sets.get(id(value), 0)

    def connects(self, entry: onnx_ir.Value, value: onnx_ir.Value, end: onnx_ir.Node) -> bool:
        """Whether a value depends on `entry`, and a node on the value."""
        after = self.of(value) & self.bits[id(entry)]
        return bool(after and self.of(end.outputs[0]) & self.bits.get(id(value), 0))

    def _add(self, value: onnx_ir.Value, before: int) -> None:
        if value.dtype is None or value.dtype.is_floating_point():
            self.bits[id(value)] = 1 << len(self.floats)
            self.floats.append(value)
        self.sets[id(value)] = before | self.bits.get(id(value), 0)


def _between(nodes: list[onnx_ir.Node], end: int, entry: onnx_ir.Value) -> Iterator[onnx_ir.Node]:
    """The nodes from `end` back to the one that computes `entry`, which is left out."""
    for node in reversed(nodes[:end]):
        if node is entry.producer():
            return
        yield node
