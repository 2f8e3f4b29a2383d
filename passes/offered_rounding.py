"""What the offers of a group round, as few trials as possible, and the damage of each offer.

Offers share trials: 4-bit codes do the same whether an integer kernel or a float one reads them.
The damage of an offer is that of its weights plus that of run-time activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, final

from octavo.ir.constants import constant_behind
from octavo.ir.mapped import reading
from octavo.ir.menu import Damage, Menu
from octavo.ir.quant import PerBlock
from octavo.passes.groups import weight_row
from octavo.passes.rounding import nearest, rounder_of

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.facts import Option, Range
    from octavo.ir.menu import Offer
    from octavo.ir.model import Model
    from octavo.ir.quant import QuantSpec
    from octavo.ir.target import Target
    from octavo.passes.activation_rounding import ActivationRounding
    from octavo.passes.rounding import Rounder

    Array = NDArray[np.generic]
    Values = dict[str, Array]


def _nothing(fed: Mapping[str, Array] | None = None) -> Values:
    return {}


@final
@dataclass(frozen=True)
class Trial:
    """One thing to change: weights by name, and activations given what the suffix is fed."""

    weights: Callable[[], Values] = _nothing
    activations: Callable[[Mapping[str, Array]], Values] = _nothing

    @property
    def rounds_weights(self) -> bool:
        return self.weights is not _nothing


def static_trial(
    name: str, found: Range, activations: ActivationRounding, grid: QuantSpec
) -> Trial:
    """A value on a grid that covers its calibrated range."""
    return Trial(activations=lambda fed: {name: activations.static(fed[name], found, grid)})


@final
@dataclass(frozen=True)
class OfferedRounding:
    """A group's nodes with their offers, and how activations and weights are rounded."""

    nodes: Sequence[onnx_ir.Node]
    offers: Sequence[Offer]
    target: Target
    activations: ActivationRounding
    group: str
    rounder: Rounder = nearest

    @cached_property
    def operands(self) -> list[onnx_ir.Value]:
        """The activations that the nodes read as operands, each once."""
        read = (n.inputs[0] for n in self.nodes if _constant(n.inputs[0]) is None)
        return list(dict.fromkeys(v for v in read if v is not None))

    @property
    def inputs(self) -> list[tuple[onnx_ir.Node, int, onnx_ir.Value]]:
        """Every weight of the nodes: its reader, the index of the input, the value read."""
        return [(node, *found) for node in self.nodes for found in self._indexed(node)]

    @property
    def constants(self) -> Values:
        """The weights of the nodes as they are, by the value that is read."""
        return {
            value.name or "": _array(value) for node in self.nodes for value in self.weights(node)
        }

    @cached_property
    def trials(self) -> Mapping[str, Trial]:
        """What has to be measured, by name."""
        found: dict[str, Trial] = {}
        for offer in self.offers:
            if specs := _specs(offer):
                found[self._weights_key(specs)] = Trial(weights=partial(self.rounded, offer))
            if (key := self._activations_key(offer)) is not None:
                found[key] = Trial(activations=self._rounder(offer))
        return found

    def damages(self, found: Mapping[str, Damage]) -> dict[str, Damage]:
        """The damage of every offer, from that of the trials."""
        return {offer.name: self._damage(offer, found) for offer in self.offers}

    def rounded(self, offer: Offer) -> Values:
        """The weights of the nodes as an offer rounds them, by the value that is read."""
        specs = _specs(offer)
        return {
            value.name or "": self._rounded(node, index, value, specs[node.name or ""])
            for node in self.nodes
            if (node.name or "") in specs
            for index, value in self._indexed(node)
        }

    def _damage(self, offer: Offer, found: Mapping[str, Damage]) -> Damage:
        specs = _specs(offer)
        keys = [self._weights_key(specs)] if specs else []
        if (key := self._activations_key(offer)) is not None:
            keys.append(key)
        parts = [found.get(key, Damage(0.0)) for key in keys]
        error = sum(part.standard_error**2 for part in parts) ** 0.5
        return Damage(sum(part.mean for part in parts), error)

    def weights(self, node: onnx_ir.Node) -> list[onnx_ir.Value]:
        """The weights of a node as it reads them."""
        return [value for _, value in self._indexed(node)]

    def _indexed(self, node: onnx_ir.Node) -> list[tuple[int, onnx_ir.Value]]:
        """The weights of a node with the index of their input."""
        row = weight_row(node, self.target)
        found = [(index, node.inputs[index]) for index in row.weights] if row is not None else []
        return [(index, value) for index, value in found if value is not None]

    def _rounded(
        self, node: onnx_ir.Node, index: int, value: onnx_ir.Value, spec: QuantSpec
    ) -> Array:
        tensor = constant_behind(value)
        assert tensor is not None
        turned = _turned(value)
        return reading(tensor, lambda a: self.rounder(node, index, a.T if turned else a, spec))

    def _weights_key(self, specs: Mapping[str, QuantSpec]) -> str:
        # The text of a spec leaves out how many of its bits are used.
        texts = (f"{spec}:{spec.used_bits or spec.bits}" for spec in specs.values())
        return f"weights {self.group} " + " ".join(texts)

    def _activations_key(self, offer: Offer) -> str | None:
        """A name for how an offer rounds activations at run time, `None` where it does not."""
        methods = {option.method for option in offer.options.values()}
        if "dynamic" in methods:
            return f"dynamic {self.group}"
        if "float8" in methods:
            return f"float8 {self.group}"
        if "weight-only" in methods:
            return f"blocks {self.group} {_block_size(offer)}"
        return None

    def _rounder(self, offer: Offer) -> Callable[[Mapping[str, Array]], Values]:
        names = [value.name or "" for value in self.operands]
        methods = {option.method for option in offer.options.values()}
        for method, rounds in (
            ("dynamic", self.activations.dynamic),
            ("float8", self.activations.float8),
        ):
            if method in methods:
                return partial(_each, rounds, names)
        size = _block_size(offer)
        return lambda fed: {n: self.activations.blocks(fed[n], size) for n in names if n in fed}


def offered_roundings(
    model: Model, target: Target, activations: ActivationRounding
) -> dict[str, OfferedRounding]:
    """One for every group of the model's menu, by name, in topological order."""
    nodes = {node.name or "": node for node in model.graph}
    menu, rounder = model.fact(Menu), rounder_of(model)
    return {
        name: OfferedRounding(
            [nodes[n] for n in group.nodes], menu.offers[name], target, activations, name, rounder
        )
        for name, group in menu.groups.items()
    }


def _specs(offer: Offer) -> dict[str, QuantSpec]:
    """The weight spec of every node that has one."""
    options: Mapping[str, Option] = offer.options
    return {name: o.weight for name, o in options.items() if o.weight is not None}


def _each(
    rounds: Callable[[Array], Array], names: Sequence[str], fed: Mapping[str, Array]
) -> Values:
    return {name: rounds(fed[name]) for name in names if name in fed}


def _block_size(offer: Offer) -> int:
    specs = _specs(offer).values()
    sizes = [s.granularity.size for s in specs if isinstance(s.granularity, PerBlock)]
    return max(sizes, default=32)


def _constant(value: onnx_ir.Value | None) -> object:
    return value.const_value if value is not None else None


def _turned(value: onnx_ir.Value) -> bool:
    return value.const_value is None


def _array(value: onnx_ir.Value) -> Array:
    tensor = constant_behind(value)
    assert tensor is not None
    array: Array = tensor.numpy()
    return array.T if _turned(value) else array
