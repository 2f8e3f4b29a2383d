"""What the planner decides about: groups of nodes, the options each may get, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from octavo.ir.errors import UnknownName
from octavo.ir.facts import Fact, Option


@final
@dataclass(frozen=True)
class Group:
    """Nodes that get one decision together, and why they must agree ("" for a single node).

    `name` is the name of the first node. `role` is the structural type of the group: groups of
    equal operators and shapes at the same place of a repeated block share it.
    """

    name: str
    nodes: tuple[str, ...]
    reason: str = ""
    role: str = ""


@final
@dataclass(frozen=True)
class LowRank:
    """A layer as two: the `form` of `passes/low_rank_layer.py`, and the rank between them."""

    form: str
    rank: int


@final
@dataclass(frozen=True)
class Offer:
    """One way to compress a group, with what it costs.

    `options` hold the option of every node, `name` is the text they share. `bytes` are those of
    the group's constants in the emitted file, with scales, zero points and unpacking nodes;
    `seconds` those of its kernels; `bops` its multiply-accumulates times weight bits times
    activation bits; `integer` says that activations are read and written as codes.

    Where structure is offered, `needs` names the offers that other groups take with it: the
    widths that its costs are those of. `ranks` are the nodes that become two of lower rank.
    """

    name: str
    options: Mapping[str, Option]
    bytes: int
    seconds: float
    bops: float = 0.0
    integer: bool = False
    needs: Mapping[str, str] = field(default_factory=dict)
    ranks: Mapping[str, LowRank] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Menu(Fact):
    """Decision groups in topological order, and the offers of each, float first.

    `fixed_bytes` are those of the emitted file that no decision changes; `cost_source` says
    where the seconds come from. A group without nodes is a width: how many units of an axis
    group stay, all of them first. `fixed_seconds` are then those of nodes that no decision
    changes, `None` where they are to be found.
    """

    groups: Mapping[str, Group]
    offers: Mapping[str, tuple[Offer, ...]]
    fixed_bytes: int
    cost_source: str
    fixed_seconds: float | None = None

    @property
    def widths(self) -> tuple[str, ...]:
        """The groups that are widths."""
        return tuple(name for name, group in self.groups.items() if not group.nodes)

    def group_of(self) -> dict[str, str]:
        """The group of every node that has one, by node name."""
        return {node: group.name for group in self.groups.values() for node in group.nodes}


@final
@dataclass(frozen=True)
class Units(Fact):
    """The units that go with every offer of a width, by width and offer, and their axis group."""

    removed: Mapping[str, Mapping[str, tuple[int, ...]]]
    axis_group: Mapping[str, str]


@final
@dataclass(frozen=True)
class Damage:
    """What an option does to the outputs: a mean over samples with its standard error."""

    mean: float
    standard_error: float = 0.0


@final
@dataclass(frozen=True)
class Sensitivity(Fact):
    """Damage of every offer, by group and offer name, and of every activation quantizer.

    The damage of a plan is the sum over its groups of `by_group`, which concerns weights and
    activations that are quantized at run time, and over its static quantizers of `by_value`.
    `estimator` names how it was found ("measured", "fisher", …), `metric` what it is ("KL of the
    outputs", …), `seconds` what finding it cost, `samples` how many samples it rests on.
    """

    by_group: Mapping[str, Mapping[str, Damage]]
    by_value: Mapping[str, Damage]
    estimator: str
    metric: str
    samples: int = 0
    seconds: float = 0.0

    def damage(self, group: str, offer: str) -> Damage:
        """The damage of one offer; UnknownName for a group or offer that was not estimated."""
        offers = self.by_group.get(group)
        if offers is None:
            raise UnknownName("decision group", group, self.by_group)
        if offer not in offers:
            raise UnknownName("offer", offer, offers, where=group)
        return offers[offer]


@final
@dataclass(frozen=True)
class Solution(Fact):
    """How a plan was found, and what it is predicted to cost.

    `limits` are the budgets it keeps to and `totals` what it uses, by resource ("bytes",
    "seconds", "memory", "bops", "damage"); `float_seconds` are those predicted of the source;
    `gap` is the proven relative distance from the optimum; `alternatives` are further plans, best
    first: their totals and options by group.
    """

    status: str
    objective: str
    gap: float
    seconds: float
    solver: str
    limits: Mapping[str, float]
    totals: Mapping[str, float]
    options: Mapping[str, str]
    dominated: int = 0
    float_seconds: float = 0.0
    alternatives: tuple[tuple[Mapping[str, float], Mapping[str, str]], ...] = ()
    curve: tuple[Mapping[str, float], ...] = field(default=())
