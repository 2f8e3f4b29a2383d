"""The fastest mixture of integer and float nodes, exactly, as a minimum cut.

Every node pays its own seconds on the side it lies on; every value that crosses pays one
quantization or one dequantization, once, however many readers it has on the other side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import networkx as nx

# Costs become whole picoseconds, so that the cut is exact and deterministic.
_PICOSECONDS = 1e12
_SOURCE, _SINK = "integer side", "float side"


@final
@dataclass(frozen=True)
class Item:
    """A node that may be integer: seconds either way (`None`: must be float)."""

    name: str
    integer_seconds: float | None
    float_seconds: float


@final
@dataclass(frozen=True)
class Edge:
    """A value: who makes it, who reads it, and the seconds to cross in either direction.

    `producer` or a reader that is no item (graph input, output, float-only node) is `None`.
    """

    value: str
    producer: str | None
    readers: tuple[str | None, ...]
    quantize_seconds: float
    dequantize_seconds: float


def integer_side(items: Iterable[Item], edges: Iterable[Edge]) -> set[str]:
    """Names of the items that are integer in the mixture with the fewest seconds."""
    graph = nx.DiGraph()
    graph.add_nodes_from((_SOURCE, _SINK))
    for item in items:
        node = ("item", item.name)
        graph.add_edge(_SOURCE, node, capacity=_whole(item.float_seconds))
        if item.integer_seconds is None:
            graph.add_edge(node, _SINK)
        else:
            graph.add_edge(node, _SINK, capacity=_whole(item.integer_seconds))
    for edge in edges:
        _add_edge(graph, edge)
    _, (integer, _) = nx.minimum_cut(graph, _SOURCE, _SINK)
    return {node[1] for node in integer if isinstance(node, tuple) and node[0] == "item"}


def _add_edge(graph: nx.DiGraph, edge: Edge) -> None:
    producer = ("item", edge.producer) if edge.producer is not None else _SINK
    quantized, float_read = ("quantized", edge.value), ("float", edge.value)
    for reader in edge.readers:
        node = ("item", reader) if reader is not None else _SINK
        graph.add_edge(float_read, node)
        if reader is not None:
            graph.add_edge(node, quantized)
    if producer != _SINK:
        graph.add_edge(producer, float_read, capacity=_whole(edge.dequantize_seconds))
    if any(reader is not None for reader in edge.readers):
        graph.add_edge(quantized, producer, capacity=_whole(edge.quantize_seconds))


def _whole(seconds: float) -> int:
    return round(seconds * _PICOSECONDS)
