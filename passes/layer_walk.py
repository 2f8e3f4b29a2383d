"""Run a model from layer to layer, so that each layer sees what was done to those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.extract import extract, read_by
from octavo.passes.suffix import Flow

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from pathlib import Path

    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.evaluate import Evaluator
    from octavo.ir.model import Model

    Array = NDArray[np.generic]

# Values that live between two layers stay in memory up to this size, then go to files.
_KEPT_BYTES = 128 << 20


@final
@dataclass(frozen=True)
class Segment:
    """What a layer needs beyond the layers before it, by names of values.

    `reads` live already, `gives` are computed for this layer or later ones, `drops` are read by
    nobody afterwards. `value` is the output of the layer.
    """

    value: str
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    drops: tuple[str, ...]


def segments(model: Model, stops: Sequence[onnx_ir.Node]) -> list[Segment]:
    """One segment per stop; `stops` are nodes of the top-level graph in topological order.

    Every node runs once over all segments, constants aside.
    """
    variable = Flow(model).variable
    made_in = {id(value): -1 for value in model.graph.inputs}
    last_read: dict[int, int] = {}
    parts: list[list[onnx_ir.Node]] = []
    for index, stop in enumerate(stops):
        parts.append(list(_new_nodes(stop, variable, made_in, index)))
        for node in parts[-1]:
            last_read.update((id(v), index) for v in read_by(node) if id(v) in made_in)
        last_read.setdefault(id(stop.outputs[0]), index)
    found = []
    for index, (stop, nodes) in enumerate(zip(stops, parts, strict=True)):
        read = {id(v): v for n in nodes for v in read_by(n) if made_in.get(id(v), index) < index}
        made = [v for node in nodes for v in node.outputs]
        output = stop.outputs[0]
        gives = [v for v in made if v is output or last_read.get(id(v), -1) > index]
        drops = [v for v in (*read.values(), *gives) if last_read[id(v)] == index]
        names = [tuple(v.name or "" for v in some) for some in (read.values(), gives, drops)]
        found.append(Segment(output.name or "", *names))
    return found


def _new_nodes(
    stop: onnx_ir.Node, variable: frozenset[int], made_in: dict[int, int], index: int
) -> Iterator[onnx_ir.Node]:
    """The nodes that a stop depends on and that no segment holds, each marked as held."""
    waiting = [stop]
    while waiting:
        node = waiting.pop()
        if node.outputs and id(node.outputs[0]) in made_in:
            continue
        made_in.update((id(value), index) for value in node.outputs)
        yield node
        producers = (v.producer() for v in read_by(node) if id(v) in variable)
        waiting += [producer for producer in producers if producer is not None]


@final
@dataclass(frozen=True)
class Walk:
    """A model on its way through some feeds; `feeds` hold its inputs.

    The model may be edited between two steps: nodes of later segments, and the layer just met.
    """

    model: Model
    evaluator: Evaluator
    feeds: Sequence[Feed]
    executor: Executor
    folder: Path
    alive: dict[tuple[int, str], Array] = field(default_factory=dict)

    def step(self, segment: Segment) -> None:
        """Compute a segment for every feed; its value is then in `read`."""
        inputs = {value.name for value in self.model.graph.inputs}
        if set(segment.gives) - inputs - {name for _, name in self.alive}:
            part = extract(self.model, segment.reads, segment.gives)
            run = self.evaluator.load(part)
            needed = [value.name or "" for value in part.graph.inputs]
            fed = [{n: self.read(k, n) for n in needed} for k in range(len(self.feeds))]
            for index, made in enumerate(self.executor.map(run, fed)):
                for name in segment.gives:
                    self._keep(index, name, made[name])

    def read(self, index: int, name: str) -> Array:
        """A live value of a feed."""
        found = self.alive.get((index, name))
        return self.feeds[index][name] if found is None else found

    def change(self, segment: Segment, edit: Callable[[Array], Array]) -> None:
        """Replace what the segment's layer gave, on every feed."""
        if segment.value not in segment.drops:
            for index in range(len(self.feeds)):
                self._keep(index, segment.value, edit(self.read(index, segment.value)))

    def leave(self, segment: Segment) -> None:
        """Forget what no later segment reads."""
        for index in range(len(self.feeds)):
            for name in segment.drops:
                self.alive.pop((index, name), None)

    def _keep(self, index: int, name: str, array: Array) -> None:
        self.alive.pop((index, name), None)
        held = sum(a.nbytes for a in self.alive.values() if not isinstance(a, np.memmap))
        if held + array.nbytes > _KEPT_BYTES and array.ndim:
            path = self.folder / f"walk-{id(self)}-{len(self.alive)}-{index}.bin"
            stored = np.memmap(path, array.dtype, "w+", shape=array.shape)
            stored[...] = array
            # The file has no name from here on, and ends with the array.
            path.unlink()
            array = stored
        self.alive[index, name] = array
