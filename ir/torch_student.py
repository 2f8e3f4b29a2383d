"""A compressed graph, or a part of one, with everything about it that may be learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from octavo.ir.torch_module import TorchGraph
    from octavo.ir.torch_rounding import LearnedWeight

_TINY = 1e-8


@final
@dataclass(frozen=True, eq=False)
class Rates:
    """Step sizes of Adam: of codes in the method's own variables, of all else relative."""

    codes: float
    scales: float
    vectors: float
    activations: float
    matrices: float = 0.0

    def times(self, factor: float) -> Rates:
        """All of them smaller or larger."""
        scaled = (self.codes, self.scales, self.vectors, self.activations, self.matrices)
        return Rates(*(factor * rate for rate in scaled))


@final
class Student:
    """Runs a graph whose quantized weights are inputs, with variables in their place.

    `weights` by the input they are fed as; `vectors` and `matrices` are initializers that move by a
    share of their own size, the latter weights that nothing quantizes, whose zeros stay;
    `activations` give the
    initializer of every scale that may move, and the group whose scales move by one factor.
    """

    def __init__(
        self,
        graph: TorchGraph,
        weights: Mapping[str, LearnedWeight],
        vectors: tuple[str, ...],
        activations: Mapping[str, str],
        matrices: tuple[str, ...] = (),
    ) -> None:
        self.graph, self.weights, self.activations = graph, weights, activations
        self.matrices = frozenset(matrices)
        moving = (*vectors, *matrices)
        self.base = {name: graph.parameters[name].detach() for name in (*moving, *activations)}
        self.moves = {name: torch.zeros_like(self.base[name]) for name in moving}
        self.factors = {group: torch.zeros(()) for group in sorted(set(activations.values()))}
        for variable in (*self.moves.values(), *self.factors.values()):
            variable.requires_grad_()

    def run(self, feed: Mapping[str, Tensor], *, hard: bool = False) -> dict[str, Tensor]:
        """The outputs by name; `hard` with the weights that will be emitted."""
        fed = {name: w.hard() if hard else w.soft() for name, w in self.weights.items()}
        return self.graph.run({**feed, **fed}, self.overrides())

    def overrides(self) -> dict[str, Tensor]:
        """Initializers as they are now."""
        found = {name: self._moved(name) for name in self.moves}
        for name, group in self.activations.items():
            found[name] = self.base[name] * self.factors[group].exp()
        return found

    def groups(self, rates: Rates) -> list[dict[str, object]]:
        """The variables as Adam takes them."""
        weights = self.weights.values()
        rated = (
            ([v for w in weights for v in w.code_variables()], rates.codes),
            ([w.stretch for w in weights], rates.scales),
            ([v for n, v in self.moves.items() if n not in self.matrices], rates.vectors),
            ([v for n, v in self.moves.items() if n in self.matrices], rates.matrices),
            (list(self.factors.values()), rates.activations),
        )
        return [{"params": found, "lr": rate} for found, rate in rated if found and rate]

    def regulariser(self, beta: float) -> Tensor | None:
        """Mean penalty on codes that are not whole, over all weights."""
        found = [(w.regulariser(beta), w.count) for w in self.weights.values()]
        parts = [penalty * size for penalty, size in found if penalty is not None]
        return torch.stack(parts).sum() / sum(size for _, size in found) if parts else None

    def snapshot(self) -> list[Tensor]:
        """Copies of all variables."""
        return [variable.detach().clone() for variable in self._variables()]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Set all variables to what they were."""
        for variable, before in zip(self._variables(), snapshot, strict=True):
            variable.copy_(before)

    @torch.no_grad()
    def initializers(self) -> dict[str, NDArray[np.float32]]:
        """The initializers that moved."""
        return {name: value.numpy() for name, value in self.overrides().items()}

    def _moved(self, name: str) -> Tensor:
        base = self.base[name]
        move = self.moves[name] * base.square().mean().sqrt().clamp_min(_TINY)
        return base + (move * (base != 0) if name in self.matrices else move)

    def _variables(self) -> Iterator[Tensor]:
        for weight in self.weights.values():
            yield from weight.code_variables()
            yield weight.stretch
        yield from self.moves.values()
        yield from self.factors.values()
