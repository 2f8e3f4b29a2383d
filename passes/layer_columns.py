"""What linear layers read: samples from calibration data, or a guess from the graph alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.calibration import first_samples
from octavo.ir.errors import CalibrationError
from octavo.passes.operand_walk import OperandWalk
from octavo.passes.sample_macs import affordable_samples, sample_macs
from octavo.passes.weight_matrix import operand

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.scale_links import Link, Producer
    from octavo.passes.scaled_layers import Layer

    Float64 = NDArray[np.float64]

# Samples of a large model hold many columns each.
_MACS = 1e11
_LEAST_SAMPLES = 8


def sample_columns(
    model: Model, ctx: PassContext, layers: Collection[Layer], samples: int, rows: int
) -> None:
    """Give every layer about `rows` columns of its operand from the first `samples` samples.

    Layers that read one value alike share them; nothing changes where there are none. Raises
    CalibrationError where a value is not finite.
    """
    if not layers or ctx.calibration is None:
        return
    macs = sample_macs(model, ctx, ctx.calibration)
    samples = affordable_samples(macs, _MACS, samples, _LEAST_SAMPLES)
    feeds = list(first_samples(ctx.calibration, samples))
    each = max(1, -(-rows // max(len(feeds), 1)))
    place = {v.name: at for at, node in enumerate(model.graph) for v in node.outputs}
    by_value: dict[str, dict[object, list[Layer]]] = {}
    for layer in sorted(layers, key=lambda of: place.get(_operand(of), -1)):
        reading = (layer.matrix.window, layer.matrix.groups, layer.matrix.turned)
        by_value.setdefault(_operand(layer), {}).setdefault(reading, []).append(layer)
    walk = OperandWalk.of(model, ctx, feeds, by_value)
    for done, (name, alike) in enumerate(by_value.items(), start=1):
        walk.reach(name)
        for some in alike.values():
            columns = _drawn(walk, name, some[0], each, ctx.seed)
            for layer in some:
                layer.columns = columns
        walk.leave(name)
        ctx.progress("read layers", done, len(by_value))


def _operand(layer: Layer) -> str:
    return operand(layer.linear.node, 1).name or ""


def _drawn(
    walk: OperandWalk, name: str, layer: Layer, each: int, seed: int
) -> NDArray[np.float32] | None:
    """So many columns per feed of what a layer reads; `None` where there are none."""
    drawn = []
    for at in range(len(walk.walk.feeds)):
        found = layer.matrix.columns(walk.walk.read(at, name), each, seed + at)
        if not np.all(np.isfinite(found)):
            raise _not_finite(name, layer.linear.node.name or "", at + 1)
        drawn.append(found)
    columns = np.concatenate(drawn, axis=1)
    return columns if columns.shape[1] else None


def estimate_power(links: Sequence[Link], layers: Mapping[int, Layer]) -> None:
    """Guess the mean square of every channel from what its producer does to unit inputs."""
    for layer in layers.values():
        layer.power = np.ones(layer.fed.size)
    for link in links:
        power = _power(link.producer, layers)
        for consumer in link.consumers:
            layer = layers[id(consumer.linear.node)]
            assert layer.power is not None
            layer.power = layer.power * link.spread(power, consumer.labels)


def _power(producer: Producer, layers: Mapping[int, Layer]) -> Float64:
    if producer.linear is None:
        vectors = [producer.vector(at) for at in range(len(producer.vectors))]
        return np.asarray(np.sum(np.square(vectors), axis=0))
    layer = layers[id(producer.linear.node)]
    rows = np.square(layer.rows, dtype=np.float64).sum(axis=2)
    bias = producer.linear.bias()
    assert bias is not None
    return np.asarray(rows.reshape(bias.size, -1).mean(axis=1) + bias**2)


def _not_finite(value: str, node: str, feed: int) -> CalibrationError:
    return CalibrationError(
        f"the value '{value}' that '{node}' reads is not finite on the calibration data",
        where=f"feed {feed}",
        why="the float model overflows or divides by zero on this input",
        hint="check --preprocess and the data, or leave the sample out",
    )
