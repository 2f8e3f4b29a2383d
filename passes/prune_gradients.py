"""Importance of units by gradients: what the loss says of a gate on each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.needs_torch import need_torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Generator, Tensor

    from octavo.ir.axis_groups import AxisGroup
    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.prune_readers import Reader

    Float64 = NDArray[np.float64]


def gate_fisher(
    model: Model,
    feeds: Sequence[Feed],
    groups: Mapping[str, tuple[AxisGroup, Sequence[Reader]]],
    seed: int,
) -> dict[str, Float64]:
    """½·E[(Σ x·∂L/∂x)²] per unit: the expected loss when its gate goes from 1 to 0, to 2nd order.

    x is what readers multiply. L is the cross entropy with classes drawn from the model's own
    softmax, which makes this the true Fisher of the gates; for other outputs, ½‖y + ε‖² about y
    with ε ~ N(0, I) and y scaled to unit deviation (K-prune, Park et al. 2024, arXiv 2308.03449,
    equation 5, whose KL against itself has no gradient before something is pruned).
    """
    need_torch("taylor")
    import torch

    from octavo.ir.torch_module import differentiable
    from octavo.ir.torch_values import as_torch

    output = model.graph.outputs[0].name or ""
    places = {name: _places(model, group, readers) for name, (group, readers) in groups.items()}
    operands = list(dict.fromkeys(value for found in places.values() for value, _ in found))
    graph = differentiable(model, [output, *operands])
    generator = torch.Generator().manual_seed(seed)
    total = {name: np.zeros(group.units) for name, (group, _) in groups.items()}
    count = 0
    for feed in feeds:
        given = {name: as_torch(np.asarray(array)) for name, array in feed.items()}
        found = graph.run(given)
        loss = _loss(found[output], generator)
        values = [found[name] for name in operands]
        gradients = torch.autograd.grad(loss, values, allow_unused=True)
        samples = values[0].shape[0] if values else 1
        count += samples
        with torch.no_grad():
            products = {
                name: (value * gradient).numpy()
                for name, value, gradient in zip(operands, values, gradients, strict=True)
                if gradient is not None
            }
        for name, (group, _) in groups.items():
            total[name] += _squares(products, places[name], group, samples)
    return {name: 0.5 * found / max(count, 1) for name, found in total.items()}


def _places(model: Model, group: AxisGroup, readers: Sequence[Reader]) -> list[tuple[str, int]]:
    """Operands of readers with the axis that the units divide; an operand counts once."""
    found = {}
    for reader in readers:
        name = reader.operand
        axes = [axis for value, axis in group.labels if value == name]
        if axes:
            found[name] = axes[0]
    return list(found.items())


def _loss(output: Tensor, generator: Generator) -> Tensor:
    import torch
    from torch.nn import functional

    if output.ndim >= 2 and output.shape[-1] > 1:
        rows = output.reshape(-1, output.shape[-1])
        drawn = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator)[:, 0]
        per_row = functional.cross_entropy(rows, drawn, reduction="none")
        return per_row.sum() / (len(rows) / output.shape[0])
    noise = torch.randn(output.shape, generator=generator)
    scale = output.detach().std() + 1e-12
    return (output / scale * noise).sum()


def _squares(
    products: Mapping[str, NDArray[np.float32]],
    places: Sequence[tuple[str, int]],
    group: AxisGroup,
    samples: int,
) -> Float64:
    """Σ over samples of (Σ over what belongs to a unit)²."""
    gate = np.zeros((samples, group.units))
    for name, axis in places:
        if name not in products or products[name].shape[0] != samples or axis == 0:
            continue
        labels = group.labels[name, axis]
        moved = np.moveaxis(products[name], axis, 1).reshape(samples, labels.size, -1).sum(axis=2)
        for unit in range(group.units):
            gate[:, unit] += moved[:, labels == unit].sum(axis=1)
    return np.asarray(np.square(gate).sum(axis=0))
