"""Writing the scales of links into the constants of a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.ir.facts import Norms
from octavo.ir.mapped import reading
from octavo.passes.rewrite import Rewrite
from octavo.passes.scaled_layers import Layer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from onnx_ir import TensorProtocol

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.scale_links import Link

    Float64 = NDArray[np.float64]


def layers_of(links: Sequence[Link]) -> dict[int, Layer]:
    """The linear operators of all links, without scales, by the id of their node."""
    linears = [c.linear for link in links for c in link.consumers]
    linears += [link.producer.linear for link in links if link.producer.linear is not None]
    return {id(linear.node): Layer.of(linear) for linear in linears}


def accept(link: Link, layers: Mapping[int, Layer], scale: Float64) -> None:
    """Let the layers of a link carry another scale `[channels]` on top of theirs."""
    for consumer in link.consumers:
        layer = layers[id(consumer.linear.node)]
        layer.fed = layer.fed * link.spread(scale, consumer.labels)
    if link.producer.linear is not None:
        layer = layers[id(link.producer.linear.node)]
        layer.made = layer.made * scale


def overflow(link: Link, layers: Mapping[int, Layer], scale: Float64) -> str:
    """Which constant could not hold its numbers under the scale, "" where all can."""
    for consumer in link.consumers:
        layer = layers[id(consumer.linear.node)]
        largest = layer.largest(layer.rows, 1) * link.spread(scale, consumer.labels)
        if not _fits(largest, layer.linear.dtype):
            return f"the scaled weight of '{consumer.linear.node.name}' does not fit"
    made = [link.producer.vector(at) for at in range(len(link.producer.vectors))]
    linear = link.producer.linear
    dtype = link.producer.output.dtype
    if linear is not None:
        layer = layers[id(linear.node)]
        bias = linear.bias()
        made = [layer.largest(layer.rows, 2), *([bias] if bias is not None else [])]
    narrow = dtype.numpy() if dtype is not None else np.dtype(np.float32)
    return "" if all(_fits(v / scale, narrow) for v in made) else "its constants would not fit"


def write_scales(
    model: Model,
    ctx: PassContext,
    scales: Mapping[int, Float64],
    links: Sequence[Link],
    layers: Mapping[int, Layer],
) -> Model:
    """The model with all scales (by index of the link) and the normalizations that changed.

    `layers` carry what the scales multiply up to. The model's own graph changes.
    """
    rewrite = Rewrite(model, ctx)
    known = model.find(Norms)
    norms = dict(known.by_value) if known is not None else {}
    for at, scale in scales.items():
        link = links[at]
        _scale_vectors(rewrite, link, scale)
        for name, labels in link.values.items():
            norm = norms.get(name)
            if norm is not None and norm.gamma.size == labels.size:
                divisor = link.spread(scale, labels.reshape(-1)).astype(np.float32)
                gamma, beta = norm.gamma / divisor, norm.beta / divisor
                norms[name] = replace(norm, gamma=gamma, beta=beta)
    for layer in layers.values():
        _scale_layer(rewrite, layer)
    return model.with_fact(Norms(norms)) if known is not None else model


def _scale_vectors(rewrite: Rewrite, link: Link, scale: Float64) -> None:
    for at, (node, index) in enumerate(link.producer.vectors):
        value = node.inputs[index]
        assert value is not None
        assert value.const_value is not None
        shape, dtype = value.const_value.shape.numpy(), value.const_value.dtype.numpy()
        scaled = (link.producer.vector(at) / scale).reshape(shape).astype(dtype)
        rewrite.set_constant(node, index, scaled, "scaled")


def _scale_layer(rewrite: Rewrite, layer: Layer) -> None:
    linear = layer.linear
    if np.any(layer.made != 1):
        bias = linear.bias()
        if bias is not None and np.any(bias):
            scaled = (bias / layer.made).astype(linear.dtype)
            rewrite.set_constant(linear.last, linear.bias_index, scaled, "bias")
            linear.node.attributes.pop("beta", None)
    if np.any(layer.made != 1) or np.any(layer.fed != 1):
        _scale_weight(layer)


def _scale_weight(layer: Layer) -> None:
    """The weight is scaled whenever it is read: weights of large models stay in their file."""
    value, matrix = layer.linear.weight, layer.matrix
    assert value is not None
    assert value.const_value is not None
    tensor, fed, made = value.const_value, layer.fed, layer.made

    def scaled() -> TensorProtocol:
        rows = reading(tensor, lambda array: np.array(matrix.rows(array)))
        array = matrix.restore(layer.scaled(rows, fed, made)).astype(tensor.dtype.numpy())
        return onnx_ir.Tensor(array, name=value.name)

    value.const_value = onnx_ir.LazyTensor(
        scaled, dtype=tensor.dtype, shape=onnx_ir.Shape(tensor.shape.numpy()), name=value.name
    )


def _fits(numbers: Float64, dtype: np.dtype[np.generic]) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.all(np.isfinite(numbers.astype(dtype))))
