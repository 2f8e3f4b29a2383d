"""What an option costs by a table of measured latencies, at the shapes of one feed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, final

from octavo.ir.cost import CALL_SECONDS, AnalyticCost
from octavo.ir.facts import FLOAT, Option
from octavo.ir.shapes import concrete_shapes, elements
from octavo.ir.signature import option_key, signature

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.calibration import Feed
    from octavo.ir.facts import Method
    from octavo.ir.latency_table import LatencyTable
    from octavo.ir.model import Model
    from octavo.ir.shapes import Shape
    from octavo.ir.target import Target

_BLOCKS = re.compile(r"(weight-only:\w+/block)(\d+)(@\d+)")


@final
@dataclass(frozen=True)
class TableCost:
    """Seconds from a latency table; what it lacks is the analytic estimate times `scale`.

    Build it with `of`. `shapes` gives the sizes of values by name; `known` of `total` nodes are
    in the table.
    """

    table: LatencyTable
    analytic: AnalyticCost
    shapes: Mapping[str, Shape]
    scale: float
    known: int
    total: int

    @staticmethod
    def of(model: Model, table: LatencyTable, target: Target, feed: Feed) -> TableCost:
        """The cost of a canonicalized model that runs `feed`; estimates scale to the median."""
        shapes = concrete_shapes(model, feed)
        analytic = AnalyticCost(target, {name: elements(s) for name, s in shapes.items()})
        nodes = list(model.graph)
        rows = [table.rows.get(signature(node, shapes), {}) for node in nodes]
        ratios = [
            row["float"] / estimate
            for node, row in zip(nodes, rows, strict=True)
            if row.get("float") and (estimate := analytic.seconds(node, "float"))
        ]
        known = sum("float" in row for row in rows)
        scale = median(ratios) if ratios else 1.0
        return TableCost(table, analytic, shapes, scale, known, len(nodes))

    @property
    def source(self) -> str:
        if not self.known:
            return "analytic: no node of the model is in the profile"
        text = f"measured on {self.table.environment}"
        missing = self.total - self.known
        return f"{text}, {missing} of {self.total} nodes estimated" if missing else text

    def option_seconds(self, node: onnx_ir.Node, option: Option) -> float | None:
        """Seconds of a node under an option, `None` where the target has no kernel for it."""
        row = self.table.rows.get(signature(node, self.shapes), {})
        known = row.get(option_key(option))
        if known is None and option.method == "weight-only":
            known = _nearest(row, option_key(option))
        if known is not None:
            return known
        estimate = self.analytic.option_seconds(node, option)
        if estimate is None:
            return None
        # The node's own float seconds tell more than the median of all nodes.
        own = self.analytic.option_seconds(node, FLOAT)
        return estimate * (row["float"] / own if own and "float" in row else self.scale)

    def seconds(self, node: onnx_ir.Node, method: Method) -> float | None:
        return self.option_seconds(node, Option(method))

    def boundary_seconds(self, value: onnx_ir.Value) -> float:
        rates = self.table
        per_byte = (rates.quantize_seconds_per_byte + rates.dequantize_seconds_per_byte) / 2
        return CALL_SECONDS + 4 * self.analytic.elements(value) * per_byte

    def macs(self, node: onnx_ir.Node) -> int:
        return self.analytic.macs(node)

    def elements(self, value: onnx_ir.Value) -> int:
        return self.analytic.elements(value)


def _nearest(row: Mapping[str, float], key: str) -> float | None:
    """Seconds of the weight-only kernel that differs least: same width, nearest block size.

    A key without a block (only the method is known) takes the first such kernel.
    """
    wanted = _BLOCKS.fullmatch(key)
    found = [m for m in map(_BLOCKS.fullmatch, row) if m is not None]
    if wanted is None:
        return row[found[0][0]] if found else None
    alike = [m for m in found if (m[1], m[3]) == (wanted[1], wanted[3])]
    if not alike:
        return None
    return row[min(alike, key=lambda m: abs(int(m[2]) - int(wanted[2])))[0]]
