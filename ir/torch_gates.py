"""Values times the gradients of a loss in them: what a gate on any of their parts would do.

Import this module only where torch is wanted: it loads torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional

from octavo.ir.torch_losses import SURE, one_thread, own_classes
from octavo.ir.torch_module import differentiable
from octavo.ir.torch_values import as_torch

if TYPE_CHECKING:
    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model

    Products = dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]


def gate_products(
    model: Model, values: Sequence[str], feeds: Sequence[Feed], seed: int
) -> Iterator[Products]:
    """x·∂L/∂x of some values by name, one feed at a time; L is a sum over the samples.

    Values that the first output does not depend on are left out. L is the cross entropy, mean over
    the rows of a sample, with the class that the model is sure of, and where it is not with one
    drawn from its own softmax. An output of one number a row counts as real numbers: L is Σ ε·y/σ
    with ε ~ N(0, I) and σ the deviation of y. Raises NotDifferentiable.
    """
    output = model.graph.outputs[0].name or ""
    graph = differentiable(model, [output, *values])
    generator = torch.Generator().manual_seed(seed)
    with one_thread():
        for feed in feeds:
            given = {name: as_torch(np.asarray(array)) for name, array in feed.items()}
            found = graph.run(given)
            some = [found[name] for name in values]
            loss = _loss(found[output], generator)
            gradients = torch.autograd.grad(loss, some, allow_unused=True)
            triples = zip(values, some, gradients, strict=True)
            yield {
                name: (value * gradient).detach().numpy()
                for name, value, gradient in triples
                if gradient is not None
            }


def _loss(output: Tensor, generator: Generator) -> Tensor:
    if output.ndim >= 2 and output.shape[-1] > 1:
        rows = output.reshape(-1, output.shape[-1])
        classes = own_classes(rows, generator, SURE)
        total = functional.cross_entropy(rows, classes, reduction="sum")
        return total / (len(rows) / output.shape[0])
    noise = torch.randn(output.shape, generator=generator)
    return (output / (output.detach().std() + 1e-12) * noise).sum()
