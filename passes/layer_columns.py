"""What linear layers read: samples from calibration data, or a guess from the graph alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.calibration import first_samples
from octavo.ir.errors import CalibrationError
from octavo.passes.read_values import value_reader
from octavo.passes.weight_matrix import operand

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.scale_links import Link, Producer
    from octavo.passes.scaled_layers import Layer

    Float64 = NDArray[np.float64]


def sample_columns(
    model: Model, ctx: PassContext, layers: Collection[Layer], samples: int, rows: int
) -> None:
    """Give every layer about `rows` columns of its operand from the first `samples` samples.

    Layers that read one value alike share them; nothing changes where there are none. Raises
    CalibrationError where a value is not finite.
    """
    if not layers or ctx.calibration is None:
        return
    feeds = list(first_samples(ctx.calibration, samples))
    each = max(1, -(-rows // max(len(feeds), 1)))
    by_reading: dict[tuple[str, object], list[Layer]] = {}
    for layer in layers:
        name = operand(layer.linear.node, 1).name or ""
        reading = (layer.matrix.window, layer.matrix.groups, layer.matrix.turned)
        by_reading.setdefault((name, reading), []).append(layer)
    read = value_reader(model, ctx.evaluator, {name for name, _ in by_reading})
    drawn: dict[tuple[str, object], list[NDArray[np.float32]]] = {key: [] for key in by_reading}
    for at, feed in enumerate(feeds):
        arrays = read(feed)
        for key, some in by_reading.items():
            found = some[0].matrix.columns(arrays[key[0]], each, ctx.seed + at)
            if not np.all(np.isfinite(found)):
                raise _not_finite(key[0], some[0].linear.node.name or "", at + 1)
            drawn[key].append(found)
        ctx.progress("read layers", at + 1, len(feeds))
    for key, some in by_reading.items():
        if sum(found.shape[1] for found in drawn[key]):
            columns = np.concatenate(drawn[key], axis=1)
            for layer in some:
                layer.columns = columns


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
