"""The edits canonicalization rules share, and what they report."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.facts import Norm
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

Rule = Callable[[onnx_ir.Node, "Rewrite"], bool]


@final
@dataclass
class Rewrite:
    """One run over one model: the only way in which rules change the graph.

    A rule looks at a node and returns whether it changed something; the node may then be gone.
    `norms` collects normalization parameters by the name of the value they describe, `missed`
    why a node was left alone in the last round, `unfolded` why constants could not be folded.
    """

    model: Model
    ctx: PassContext
    norms: dict[str, Norm] = field(default_factory=dict)
    missed: dict[str, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set, init=False)
    unfolded: str = ""

    def __post_init__(self) -> None:
        graph = self.model.graph
        nodes = list(graph.all_nodes())
        self.names = {v.name or "" for node in nodes for v in node.outputs}
        self.names |= {v.name or "" for v in graph.inputs} | set(graph.initializers)
        self.names |= {node.name or "" for node in nodes}

    def done(self, rule: str, node: onnx_ir.Node, text: str) -> bool:
        """Report an edit; returns true so that a rule can end with it."""
        self.ctx.count(rule)
        self.ctx.remark("applied", node.name or "", text)
        return True

    def miss(self, node: onnx_ir.Node, reason: str) -> bool:
        """Report why a node stays as it is; returns false so that a rule can end with it."""
        self.missed[node.name or ""] = reason
        return False

    def drop(self, node: onnx_ir.Node) -> bool:
        """Remove a node that hands on its first input; false where the graph needs it."""
        source, output = node.inputs[0], node.outputs[0]
        if source is None:
            return False
        if output.is_graph_output():
            producer = source.producer()
            if producer is None or producer.graph is not node.graph or source.is_graph_output():
                return False
            source.name, output.name = output.name, None
        _keep_type(source, output)
        output.replace_all_uses_with(source, replace_graph_outputs=True)
        _remove(node)
        return True

    def absorb(self, node: onnx_ir.Node, into: onnx_ir.Node) -> None:
        """Remove a node whose only producer now computes its output, under the same name."""
        merged, output = into.outputs[0], node.outputs[0]
        merged.name, output.name = output.name, None
        merged.shape, merged.type = output.shape or merged.shape, output.type or merged.type
        output.replace_all_uses_with(merged, replace_graph_outputs=True)
        _remove(node)

    def bypass(self, node: onnx_ir.Node, index: int, source: onnx_ir.Value) -> None:
        """Let input `index` of a node read `source`; its producer goes when nobody reads it."""
        value = node.inputs[index]
        producer = value.producer() if value is not None else None
        assert producer is not None
        node.replace_input_with(index, source)
        if not any(v.uses() or v.is_graph_output() for v in producer.outputs):
            _remove(producer)

    def transpose_output(self, node: onnx_ir.Node, perm: Sequence[int], suffix: str) -> None:
        """Put a Transpose behind a node; it takes over the name of what the node computed."""
        old, graph = node.outputs[0], node.graph
        assert graph is not None
        new = onnx_ir.Value(name=old.name, type=old.type, shape=old.shape)
        transpose = onnx_ir.Node(
            "",
            "Transpose",
            [],
            [onnx_ir.AttrInt64s("perm", perm)],
            outputs=[new],
            name=self.fresh(f"{node.name}_transpose"),
            metadata_props=dict(node.metadata_props),
        )
        old.name, old.shape = self.fresh(f"{old.name}_{suffix}"), None
        graph.insert_after(node, transpose)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        transpose.resize_inputs(1)
        transpose.replace_input_with(0, old)

    def set_constant(
        self, node: onnx_ir.Node, index: int, array: NDArray[np.generic], suffix: str
    ) -> None:
        """Make input `index` a constant: in its own initializer where nobody else reads it."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None or not owned(value):
            value = self._initializer(node, f"{node.outputs[0].name}_{suffix}")
        tensor = onnx_ir.tensor(np.asarray(array, order="C"), name=value.name)
        value.const_value, value.shape = tensor, onnx_ir.Shape(array.shape)
        value.type = onnx_ir.TensorType(tensor.dtype)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)

    def _initializer(self, node: onnx_ir.Node, base: str) -> onnx_ir.Value:
        name = self.fresh(base)
        value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(np.zeros(0, np.float32)))
        assert node.graph is not None
        node.graph.register_initializer(value)
        return value

    def fresh(self, base: str) -> str:
        """A name that nothing has yet: `base`, or `base` with a number; it is taken from now on."""
        numbered = itertools.chain([base], (f"{base}_{k}" for k in itertools.count(1)))
        name = next(candidate for candidate in numbered if candidate not in self.names)
        self.names.add(name)
        return name

    def report(self) -> None:
        """Remark on every node that was left alone and is still there."""
        if self.unfolded:
            self.ctx.remark("missed", self.model.source.name, self.unfolded)
        for node in self.model.graph.all_nodes():
            if reason := self.missed.get(node.name or ""):
                self.ctx.remark("missed", node.name or "", reason)


def is_op(node: onnx_ir.Node | None, *op_types: str) -> bool:
    """Whether a node is one of these standard operators."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def constant(value: onnx_ir.Value | None) -> NDArray[np.generic] | None:
    """The array of a constant; `None` for computed values and for inputs a caller may set."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    array: NDArray[np.generic] = value.const_value.numpy()
    return array


def scalar(value: onnx_ir.Value | None) -> float | None:
    """The number of a constant that holds exactly one."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    array = constant(value)
    return None if array is None else float(array.reshape(()))


def owned(value: onnx_ir.Value) -> bool:
    """Whether a constant is read once, so that an edit disturbs nobody."""
    private = value.is_initializer() and not value.is_graph_input() and not value.is_graph_output()
    return private and len(value.uses()) == 1


def only_reader(value: onnx_ir.Value) -> onnx_ir.Node | None:
    """The node that alone reads a value, in the graph that computes it."""
    producer, uses = value.producer(), list(value.uses())
    if value.is_graph_output() or len(uses) != 1 or producer is None:
        return None
    return uses[0].node if uses[0].node.graph is producer.graph else None


def static_shape(value: onnx_ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a value where all of it is known."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(value.shape.numpy())


def operand(node: onnx_ir.Node, constant_of: Callable[[onnx_ir.Value | None], object]) -> int:
    """The index of the computed operand of a binary node whose other one is constant, or -1."""
    found = [constant_of(v) is not None for v in node.inputs]
    return found.index(False) if len(found) == 2 and sum(found) == 1 else -1


def _keep_type(value: onnx_ir.Value, other: onnx_ir.Value) -> None:
    value.shape, value.type = value.shape or other.shape, value.type or other.type


def _remove(node: onnx_ir.Node) -> None:
    assert node.graph is not None
    node.graph.remove(node, safe=True)
