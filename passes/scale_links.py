"""Scale links: an operator whose output channels may shrink because all readers make up for it.

A link multiplies output channel c of its producer by 1/s[c] and the weights that read the
channel by s[c]; between the two, only operators that pass positive scales (`scale_paths`).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.ir.constants import constant_behind
from octavo.passes.linear import Linear, linear_after
from octavo.passes.rewrite import constant, is_op, only_reader, operand, owned
from octavo.passes.scale_paths import passed, rank_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.passes.scale_paths import Labels

# Normalizations with a scale and a shift per channel as inputs 1 and 2, and the channel axis.
_NORMS = {
    "LayerNormalization": -1,
    "RMSNormalization": -1,
    "BatchNormalization": 1,
    "InstanceNormalization": 1,
    "GroupNormalization": 1,
}
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FLOATS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.DOUBLE)


@final
@dataclass(frozen=True)
class Producer:
    """What computes a value and can scale each of its channels.

    Either a linear operator, or `vectors`: the inputs (node, index) that are constants with an
    entry per channel, all of which scale together (the scale and shift of a normalization).
    """

    output: onnx_ir.Value
    channels: int
    axis: int
    linear: Linear | None = None
    vectors: Sequence[tuple[onnx_ir.Node, int]] = ()

    @property
    def name(self) -> str:
        node = self.linear.node if self.linear is not None else self.output.producer()
        return (node.name or "") if node is not None else ""

    def vector(self, at: int) -> NDArray[np.float64]:
        """The constant of `vectors[at]`, shape `[channels]`."""
        node, index = self.vectors[at]
        array = constant(node.inputs[index])
        assert array is not None
        return array.reshape(-1).astype(np.float64)

    def labels(self) -> Labels | None:
        """The channel of every element of the output."""
        rank = rank_of(self.output) or (self.linear.rank if self.linear is not None else None)
        if rank is None or rank <= self.axis:
            return None
        shape = [1] * rank
        shape[self.axis] = self.channels
        return np.arange(self.channels).reshape(shape)


@final
@dataclass(frozen=True)
class Consumer:
    """A linear operator and the producer's channel of each of its input channels, -1 for none."""

    linear: Linear
    labels: NDArray[np.int64]


@final
@dataclass(frozen=True)
class Link:
    """A producer, all its consumers, and the channels that may be scaled (`[channels]`, bool).

    `values` are the labels of every value between them.
    """

    producer: Producer
    consumers: Sequence[Consumer]
    free: NDArray[np.bool_]
    values: Mapping[str, Labels]

    def spread(self, scale: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """The scale of every labelled element: 1 where there is no label."""
        return np.append(scale, 1.0)[labels]


def find_links(graph: onnx_ir.Graph) -> tuple[list[Link], dict[str, str]]:
    """All links in graph order, and why other producers have none, by node name."""
    order = {id(node): k for k, node in enumerate(graph)}
    links: list[Link] = []
    missed: dict[str, str] = {}
    for node in graph:
        producer = producer_of(node)
        if producer is None:
            continue
        reason = why_fixed(producer)
        found = reason or _Walk(producer, order).run()
        if isinstance(found, str):
            missed[producer.name] = found
        else:
            links.append(found)
    return links, missed


def producer_of(node: onnx_ir.Node) -> Producer | None:
    """The producer that a node is, `None` where its channels cannot be scaled."""
    if is_op(node, *_LINEAR):
        linear = Linear(node, node) if is_op(node, "ConvTranspose") else linear_after(node)
        if linear is None or constant(linear.weight) is None:
            return None
        return Producer(linear.last.outputs[0], linear.channels, linear.axis, linear)
    if is_op(node, *_NORMS):
        indices = [k for k in (1, 2) if k < len(node.inputs) and node.inputs[k] is not None]
        axis = _NORMS[node.op_type]
        return _of_vectors(node.outputs[0], axis, [(node, k) for k in indices])
    return _spelled_out(node)


def why_fixed(producer: Producer) -> str:
    """Why the constants of a producer cannot change, "" where they can."""
    if producer.linear is not None:
        if is_op(producer.linear.node, "ConvTranspose") and producer.linear.groups != 1:
            return "a grouped ConvTranspose"
        if reason := producer.linear.why_fixed():
            return reason
    return "" if producer.labels() is not None else "its rank is unknown"


def why_not_consumer(linear: Linear, labels: Labels) -> str:
    """Why an operator cannot multiply its input channels, "" where it can."""
    node, weight = linear.node, linear.weight
    name = f"'{node.name}'"
    array = constant(weight)
    if weight is None or array is None:
        return f"the weight of {name} is read through a Transpose"
    if weight.dtype not in _FLOATS:
        return f"the weight of {name} is {weight.dtype}"
    if not owned(weight):
        return f"the weight of {name} is shared"
    if is_op(node, "Gemm", "MatMul") and array.ndim != 2:
        return f"the weight of {name} is not a matrix"
    if node.attributes.get_int("transA", 0):
        return f"{name} transposes its input"
    if is_op(node, "ConvTranspose") and linear.groups != 1:
        return f"{name} is a grouped ConvTranspose"
    axis = linear.axis % labels.ndim
    if any(size > 1 for k, size in enumerate(labels.shape) if k != axis):
        return f"{name} reads channels of other places in one"
    return "" if labels.size in (1, linear.input_channels) else f"{name} reads other channels"


def _spelled_out(node: onnx_ir.Node) -> Producer | None:
    """Mul by a constant per channel, with the Add of another behind it."""
    index = operand(node, constant) if is_op(node, "Mul") else -1
    if index < 0:
        return None
    constants = [(node, 1 - index)]
    add, output = only_reader(node.outputs[0]), node.outputs[0]
    if add is not None and is_op(add, "Add") and (shift := operand(add, constant)) >= 0:
        constants.append((add, 1 - shift))
        output = add.outputs[0]
    array = constant(node.inputs[1 - index])
    assert array is not None
    rank = rank_of(output)
    if rank is None or array.ndim > rank:
        return None
    axes = [k - array.ndim for k, size in enumerate(array.shape) if size > 1]
    return _of_vectors(output, axes[0], constants) if len(axes) == 1 else None


def _of_vectors(
    output: onnx_ir.Value, axis: int, vectors: Sequence[tuple[onnx_ir.Node, int]]
) -> Producer | None:
    arrays = [constant(node.inputs[index]) for node, index in vectors]
    known = [array for array in arrays if array is not None and array.dtype.kind == "f"]
    if not known or len(known) < len(arrays):
        return None
    channels, rank = known[0].size, rank_of(output)
    if rank is None or any(array.size != channels for array in known):
        return None
    # Every constant must lie along the same axis of the output.
    for array in known:
        along = [k - array.ndim for k, size in enumerate(array.shape) if size > 1]
        spelled = vectors[0][0].op_type == "Mul"
        if len(along) > 1 or (spelled and [k % rank for k in along] not in ([], [axis % rank])):
            return None
    return Producer(output, channels, axis % rank, None, tuple(vectors))


@final
@dataclass
class _Walk:
    """One producer's scale on its way through the graph, node by node in graph order."""

    producer: Producer
    order: Mapping[int, int]
    values: dict[str, Labels] = field(default_factory=dict)
    consumers: list[Consumer] = field(default_factory=list)
    pinned: dict[int, str] = field(default_factory=dict)
    waiting: list[tuple[int, onnx_ir.Node]] = field(default_factory=list)

    def run(self) -> Link | str:
        labels = self.producer.labels()
        assert labels is not None
        self._reach(self.producer.output, labels)
        seen = -1
        while self.waiting:
            at, node = heapq.heappop(self.waiting)
            if at > seen:
                self._visit(node)
                seen = at
        reached = np.zeros(self.producer.channels, np.bool_)
        for consumer in self.consumers:
            reached[consumer.labels[consumer.labels >= 0]] = True
        free = reached.copy()
        free[list(self.pinned)] = False
        if not np.any(free):
            return next(iter(self.pinned.values()), "nothing reads it")
        used = [c for c in self.consumers if np.any(free[c.labels[c.labels >= 0]])]
        return Link(self.producer, used, free, self.values)

    def _reach(self, value: onnx_ir.Value, labels: Labels) -> None:
        """A value carries the scale: whoever reads it is next."""
        if np.all(labels < 0):
            return
        self.values[value.name or ""] = labels
        if value.is_graph_output():
            self._pin(labels, f"'{value.name}' is a graph output")
        for use in value.uses():
            at = self.order.get(id(use.node))
            if at is None:
                self._pin(labels, "a subgraph reads it")
            else:
                heapq.heappush(self.waiting, (at, use.node))

    def _visit(self, node: onnx_ir.Node) -> None:
        carried = {
            index: self.values[value.name or ""]
            for index, value in enumerate(node.inputs)
            if value is not None and (value.name or "") in self.values
        }
        linear = Linear(node, node) if is_op(node, "ConvTranspose") else linear_after(node)
        if (
            linear is not None
            and set(carried) == {0}
            and constant_behind(linear.weight) is not None
        ):
            reason = why_not_consumer(linear, carried[0])
            if reason:
                self._pin(carried[0], reason)
            else:
                wide = np.broadcast_to(carried[0].reshape(-1), linear.input_channels)
                self.consumers.append(Consumer(linear, wide))
            return
        found = passed(node, carried)
        if isinstance(found, str):
            for labels in carried.values():
                self._pin(labels, found)
            return
        for value, labels in zip(node.outputs, found, strict=True):
            self._reach(value, labels)

    def _pin(self, labels: Labels, reason: str) -> None:
        """These channels keep their scale."""
        for channel in np.unique(labels[labels >= 0]):
            self.pinned.setdefault(int(channel), reason)
