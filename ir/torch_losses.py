"""Losses whose curvature is damage: how far outputs move from the source's, or from labels."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from octavo.ir.torch_traces import Loss

_TINY = 1e-12
# SynQ's threshold (arXiv 2603.18423): a model is sure of a class from this chance on.
SURE = 0.5


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread while the block runs: the same sums every time.

    The number of threads belongs to the process; it is put back.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def divergence(kinds: Mapping[str, Literal["logits", "probabilities", "values"]]) -> Loss:
    """The damage of the outputs against their own values: zero, with the curvature of damage.

    By kind, mean over samples: KL of the last axis in nats, mean over rows, or ‖y - y'‖² / ‖y‖².
    """

    def loss(outputs: Mapping[str, Tensor], feed: Mapping[str, Tensor]) -> Tensor:
        parts = [distance(outputs[k], outputs[k].detach(), kind) for k, kind in kinds.items()]
        return torch.stack(parts).sum()

    return loss


def own_classes(logits: Tensor, generator: torch.Generator, sure: float) -> Tensor:
    """Labels that the model gives itself, one per row of `[rows, classes]`.

    The likeliest class where its chance is `sure` at least; elsewhere one drawn by the chances,
    whose gradients have the mean and the second moment of soft labels.
    """
    chances = torch.softmax(logits.detach(), -1)
    drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
    most, likeliest = chances.max(-1)
    return torch.where(most >= sure, likeliest, drawn)


def cross_entropy(logits: str, labels: str) -> Loss:
    """-log p of the labels that a feed holds under a name, in nats, mean over rows."""

    def loss(outputs: Mapping[str, Tensor], feed: Mapping[str, Tensor]) -> Tensor:
        rows = outputs[logits]
        wanted = feed[labels].reshape(-1).to(torch.int64)
        return functional.cross_entropy(rows.reshape(-1, rows.shape[-1]), wanted)

    return loss


def distance(output: Tensor, truth: Tensor, kind: str) -> Tensor:
    """How far an output is from what it should be, by its kind; gradients flow through both."""
    if kind == "values":
        rows = output.reshape(output.shape[0] if output.dim() > 1 else 1, -1)
        wanted = truth.reshape(rows.shape)
        power = wanted.square().sum(1).clamp_min(_TINY)
        return ((rows - wanted).square().sum(1) / power).mean()
    logs, wanted = _log_chances(output, kind), _log_chances(truth, kind)
    return (wanted.exp() * (wanted - logs)).sum(-1).mean()


def _log_chances(output: Tensor, kind: str) -> Tensor:
    rows = output.reshape(-1, output.shape[-1])
    return torch.log_softmax(rows, -1) if kind == "logits" else rows.clamp_min(_TINY).log()
