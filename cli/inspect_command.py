"""`octavo inspect`: a model node by node, an artifact layer by layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.pass_log import inspect_log
from octavo.cli.render import (
    AsJson,
    format_bytes,
    format_seconds,
    print_json,
    print_message,
    print_table,
)

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.artifact import AuditRow, PlannedNode
    from octavo.ir.artifact_io import SavedArtifact
    from octavo.ir.model import Model


def inspect(
    path: Annotated[Path, typer.Argument(help="A model file or an artifact folder.")],
    passes: Annotated[
        bool, typer.Option("--passes", help="Show what each pass did to an artifact.")
    ] = False,
    pass_number: Annotated[
        int | None, typer.Option("--pass", min=1, help="Show the changes and remarks of one pass.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model node by node, or an artifact layer by layer."""
    from octavo.ir.artifact_io import PASS_LOG, is_artifact, read_artifact

    if passes or pass_number is not None:
        inspect_log(path / PASS_LOG, pass_number, as_json)
    elif is_artifact(path):
        _inspect_artifact(read_artifact(path), as_json)
    else:
        from octavo.ir.read import read

        _inspect_model(read(path), as_json)


def _inspect_model(model: Model, as_json: bool) -> None:
    from octavo.ir.model import weight_bytes

    rows = [_node_row(node) for node in model.graph]
    roles = (("inputs", model.graph.inputs), ("outputs", model.graph.outputs))
    ports = {role: {v.name: _tensor(v) for v in values} for role, values in roles}
    size, opsets = weight_bytes(model), model.ir.opset_imports
    if as_json:
        content = {"model": asdict(model.source), "opset_imports": opsets, "weight_bytes": size}
        print_json({**content, **ports, "nodes": rows})
        return
    for role, values in ports.items():
        print_message(
            f"{role}: " + ", ".join(f"{name} {tensor}" for name, tensor in values.items())
        )
    shown = [(*tuple(row.values())[:-1], format_bytes(row["weight_bytes"] or None)) for row in rows]
    print_table(("node", "operator", "output", "weights", "bytes"), shown)
    versions = ", ".join(f"{domain or 'ai.onnx'} {v}" for domain, v in opsets.items())
    print_message(f"{len(rows)} nodes, {format_bytes(size)} of weights, read as opset {versions}")


def _node_row(node: onnx_ir.Node) -> dict[str, Any]:
    weights = [v.const_value for v in node.inputs if v is not None and v.const_value is not None]
    return {
        "node": node.name,
        "operator": f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
        "output": ", ".join(_tensor(v) for v in node.outputs),
        "weights": ", ".join(f"{w.dtype.name} {w.shape}" for w in weights),
        "weight_bytes": sum(w.nbytes for w in weights),
    }


def _tensor(value: onnx_ir.Value) -> str:
    dtype = value.dtype.name if value.dtype is not None else "?"
    return f"{dtype} {value.shape if value.shape is not None else '?'}"


def _inspect_artifact(saved: SavedArtifact, as_json: bool) -> None:
    from octavo.ir.artifact import with_absorbed

    manifest, audit = saved.manifest, saved.audit
    audited = {row.node: row for row in audit.rows}
    nodes = with_absorbed(saved.artifact.planned)
    rows = [_layer_row(node, audited.get(node.node)) for node in nodes]
    if as_json:
        proof = {"findings": audit.findings, "environment": audit.environment}
        plan = {"plan": saved.plan_source, "layers": rows}
        print_json({"manifest": manifest.to_json(), **proof, **plan})
        return
    columns = ("layer", "operator", "option", "kernel", "bytes", "source", "time", "remark")
    print_table(columns, [_layer_cells(row) for row in rows])
    print_message(
        f"{manifest.source.name} {format_bytes(manifest.source.bytes)} → "
        f"{format_bytes(saved.artifact.bytes)} for {manifest.target}, plan: {saved.plan_source}; "
        f"kernels and times: {audit.environment}"
    )
    for finding in audit.findings:
        print_message(f"finding: {finding}")


def _layer_row(node: PlannedNode, row: AuditRow | None) -> dict[str, Any]:
    audited = {} if row is None else {"kernel": row.kernel, "ok": row.ok, "remark": row.reason}
    seconds = row.seconds if row else None
    return {**asdict(node), **audited, "kernel_seconds": seconds}


def _layer_cells(row: dict[str, Any]) -> tuple[object, ...]:
    kernel = row.get("kernel") or (f"in {row['absorbed_by']}" if row["absorbed_by"] else "")
    return (
        row["node"],
        row["op_type"],
        row["option"],
        kernel if row.get("ok", True) else f"{kernel} (not as planned)",
        format_bytes(row["weight_bytes"] or None),
        format_bytes(row["source_bytes"] or None),
        format_seconds(row["kernel_seconds"]),
        row.get("remark") or row["reason"],
    )
