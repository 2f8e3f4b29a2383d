"""The graphs inside a node: bodies of If, Loop and Scan."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir


def subgraphs(attribute: onnx_ir.Attr) -> tuple[onnx_ir.Graph, ...]:
    """The graphs an attribute holds, none for other kinds."""
    if attribute.is_ref():
        return ()
    if attribute.type.name == "GRAPH":
        return (attribute.as_graph(),)
    if attribute.type.name == "GRAPHS":
        return tuple(attribute.as_graphs())
    return ()
