"""What an engine consists of, from its inspector: which layers compute in int8, and for whom."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from octavo.ir.artifact import Audit, AuditRow

if TYPE_CHECKING:
    from octavo.ir.artifact import PlannedNode

_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_FORMAT = "Format/Datatype"
_INT8, _FP8, _INT4, _FP4 = "Int8", "FP8", "Int4", "FP4"
_READS = {"static": _INT8, "float8": _FP8, "float4": _FP4, "weight-only": _INT4}


@final
@dataclass(frozen=True)
class Layer:
    """One layer: its kernel, the nodes of the file it stands for, the types it reads."""

    kernel: str
    nodes: frozenset[str]
    reads: tuple[str, ...]

    def computes(self, dtype: str) -> bool:
        """Whether it reads a tensor of a type, as `Int8`."""
        return any(dtype in text for text in self.reads)


def read_layers(information: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The layers of `get_engine_information(JSON)`, built with detailed verbosity."""
    return tuple(_layer(found) for found in information["Layers"] if isinstance(found, Mapping))


def _layer(found: Mapping[str, Any]) -> Layer:
    name = str(found.get("Name", ""))
    origins = _ORIGIN.findall(str(found.get("Metadata", "")))
    reads = tuple(str(tensor.get(_FORMAT, "")) for tensor in found.get("Inputs", ()))
    kernel = str(found.get("TacticName") or found.get("LayerType", ""))
    return Layer(kernel, frozenset([*origins, *name.split(" + ")]), reads)


def audit_of(layers: Sequence[Layer], planned: Sequence[PlannedNode], environment: str) -> Audit:
    """One row per planned node: the layer that stands for it, and whether it has the type."""
    rows = {node.node: _row(layers, node) for node in planned if not node.absorbed_by}
    return Audit(
        tuple(rows[n.node] if not n.absorbed_by else _absorbed(n, rows) for n in planned),
        (),
        dict(sorted(Counter(layer.kernel for layer in layers).items())),
        environment,
    )


def _row(layers: Sequence[Layer], node: PlannedNode) -> AuditRow:
    own = [layer for layer in layers if node.node in layer.nodes]
    wanted = _READS.get(node.option.partition(":")[0], "")
    reason = ""
    if wanted and not own:
        reason = "no layer of the engine names it"
    elif wanted and not any(layer.computes(wanted) for layer in own):
        types = ", ".join(dict.fromkeys(text for layer in own for text in layer.reads))
        reason = f"its layer reads {types or 'nothing that has a type'}"
    kernel = own[0].kernel if own else "merged"
    return AuditRow(node.node, node.op_type, node.option, kernel, not reason, reason or node.reason)


def _absorbed(node: PlannedNode, rows: Mapping[str, AuditRow]) -> AuditRow:
    head = rows[node.absorbed_by]
    return AuditRow(node.node, node.op_type, node.option, head.kernel, head.ok, node.reason)
