"""Curvature of a loss in the weights: the Fisher diagonal and the trace of the Hessian.

Fisher: F = mean over samples of g·gᵀ with g the gradient of one sample's loss; its diagonal is
the mean of g², which the square of a batch's gradient is not. Hessian: Hutchinson's estimate
tr(H) = E[vᵀ·H·v] with v of random signs (HAWQ-V2, arXiv 1911.03852, equation 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from octavo.ir.calibration import samples_of
from octavo.ir.errors import UnknownName, UsageError
from octavo.ir.torch_losses import SURE, own_classes
from octavo.ir.torch_values import as_torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.torch_module import TorchGraph

Likelihood = Literal["labels", "own", "sampled", "gauss-newton"]
Loss = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


@final
@dataclass(frozen=True, eq=False)
class Fisher:
    """The Fisher diagonal of one weight, in its shape; `trace` is its sum.

    `error` is the standard error of the trace over `samples`, NaN for a single one.
    """

    diagonal: NDArray[np.float32]
    trace: float
    error: float
    samples: int


@final
@dataclass(frozen=True)
class HessianTrace:
    """The trace of one weight's block of the Hessian, and its standard error over the draws."""

    trace: float
    error: float


def fisher_diagonal(
    graph: TorchGraph,
    feeds: Iterable[Feed],
    weights: Sequence[str],
    *,
    likelihood: Likelihood,
    labels: NDArray[np.generic] | None = None,
    seed: int = 0,
) -> dict[str, Fisher]:
    """The Fisher diagonal of each weight over all samples of the feeds, by name.

    Feeds are iterated twice at most. `labels`: cross entropy with one row of labels per sample,
    [samples] or [samples, positions].
    `sampled`: labels drawn from the model's own softmax, which gives the true Fisher. `own`: drawn
    only where the model is not sure of a class (SynQ's rule). All of these take the first output as
    logits with the classes in the last axis. `gauss-newton`: g = Jᵀ·ε with
    ε ~ N(0, I) over all outputs, each divided by its deviation over the feeds.

    A sample is one entry of the first axis where the graph is `batched`, else a whole feed.
    Raises UnknownName for a weight that is no parameter and UsageError for missing labels.
    """
    parameters = _parameters(graph, weights)
    if likelihood == "labels" and labels is None:
        raise UsageError("the calibration data has no labels", hint="sampled needs none")
    labels = labels if likelihood == "labels" else None
    generator = torch.Generator().manual_seed(seed)
    deviations = _deviations(graph, feeds) if likelihood == "gauss-newton" else {}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    traces: dict[str, list[float]] = {name: [] for name in parameters}
    for sample, label in _samples(graph, feeds, labels):
        outputs = graph.run(sample)
        if likelihood == "gauss-newton":
            loss = _projection(outputs, deviations, generator)
        else:
            sure = SURE if likelihood == "own" else math.inf
            loss = _cross_entropy(outputs[graph.outputs[0]], label, generator, sure)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                sums[name].addcmul_(gradient, gradient)
            traces[name].append(0.0 if gradient is None else float(gradient.square().sum()))
    return {
        name: Fisher(
            (total / len(traces[name])).numpy().astype(np.float32),
            *_mean_and_error(traces[name]),
            len(traces[name]),
        )
        for name, total in sums.items()
    }


def hutchinson_trace(
    graph: TorchGraph,
    feeds: Iterable[Feed],
    weights: Sequence[str],
    loss: Loss,
    *,
    draws: int,
    seed: int = 0,
) -> dict[str, HessianTrace]:
    """tr(H) of each weight's own block, H the Hessian of the mean of `loss` over the feeds.

    `loss(outputs, feed)` gives a scalar; a feed may hold more than the inputs, labels say. One
    draw of signs serves all weights at once: the cross terms it adds have mean zero.
    Raises UnknownName for a weight that is no parameter.
    """
    parameters = _parameters(graph, weights)
    found = {name: [0.0] * draws for name in parameters}
    leaves = list(parameters.values())
    count = 0
    for feed in feeds:
        count += 1
        tensors = {name: as_torch(array) for name, array in feed.items()}
        value = loss(graph.run(tensors), tensors)
        first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        curved = [k for k, g in enumerate(first) if g is not None and g.requires_grad]
        for draw in range(draws if curved else 0):
            signs = _signs(leaves, seed, draw)
            product = torch.autograd.grad(
                [g for g in first if g is not None and g.requires_grad],
                leaves,
                [signs[k] for k in curved],
                retain_graph=True,
                allow_unused=True,
            )
            for name, sign, row in zip(parameters, signs, product, strict=True):
                if row is not None:
                    found[name][draw] += float((sign * row).sum())
    means = {name: [value / count for value in values] for name, values in found.items()}
    return {name: HessianTrace(*_mean_and_error(values)) for name, values in means.items()}


def _parameters(graph: TorchGraph, weights: Sequence[str]) -> dict[str, Tensor]:
    for name in weights:
        if name not in graph.parameters:
            raise UnknownName("weight", name, graph.parameters)
    return {name: graph.parameters[name] for name in weights}


def _samples(
    graph: TorchGraph, feeds: Iterable[Feed], labels: NDArray[np.generic] | None
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Inputs and labels of one sample at a time."""
    rows = None if labels is None else as_torch(labels).to(torch.int64)
    start = 0
    for feed in feeds:
        tensors = {name: as_torch(feed[name]) for name in graph.inputs}
        count = samples_of(feed)
        step = 1 if graph.batched else count
        for row in range(0, count, step):
            one = {name: t[row : row + 1] if step < count else t for name, t in tensors.items()}
            at = slice(start + row, start + row + step)
            yield one, None if rows is None else rows[at]
        start += count


def _cross_entropy(
    logits: Tensor, label: Tensor | None, generator: torch.Generator, sure: float
) -> Tensor:
    """-log p of the labels, or of the model's own; summed over the positions of a sample."""
    rows = logits.reshape(-1, logits.shape[-1])
    if label is None:
        label = own_classes(rows, generator, sure)
    return functional.cross_entropy(rows, label.reshape(-1), reduction="sum")


def _projection(
    outputs: Mapping[str, Tensor], deviations: Mapping[str, float], generator: torch.Generator
) -> Tensor:
    """Σ ε·f / deviation, the gradient of which is Jᵀ·ε."""
    total = torch.zeros(())
    for name, deviation in deviations.items():
        noise = torch.randn(outputs[name].shape, generator=generator, dtype=outputs[name].dtype)
        total = total + (noise * outputs[name]).sum() / deviation
    return total


def _deviations(graph: TorchGraph, feeds: Iterable[Feed]) -> dict[str, float]:
    """Standard deviation of each float output over all elements of all feeds; 1 if constant."""
    moments: dict[str, NDArray[np.float64]] = {}
    with torch.no_grad():
        for feed in feeds:
            found = graph.run({name: as_torch(feed[name]) for name in graph.inputs})
            for name, output in found.items():
                if output.is_floating_point():
                    x = output.double()
                    sums = np.array([x.numel(), float(x.sum()), float((x * x).sum())])
                    moments[name] = moments.get(name, np.zeros(3)) + sums
    spread = {k: m[2] / m[0] - (m[1] / m[0]) ** 2 for k, m in moments.items()}
    return {name: math.sqrt(v) if v > 0 else 1.0 for name, v in spread.items()}


def _signs(leaves: Sequence[Tensor], seed: int, draw: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
    return [
        torch.randint(0, 2, leaf.shape, generator=generator).to(leaf.dtype) * 2 - 1
        for leaf in leaves
    ]


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), error
