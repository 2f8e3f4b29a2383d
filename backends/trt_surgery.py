"""Final surgery on a lowered file with onnx-graphsurgeon, the tool that TensorRT's users know.

Joins casts that follow one another, drops nodes that hand on what they read, and sorts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from octavo.ir.write import INLINE_BYTES

if TYPE_CHECKING:
    from pathlib import Path

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


def operate(path: Path) -> None:
    """Rewrite a file in place.

    A graph with bodies (If, Loop, Scan) stays as it is: graphsurgeon would copy the weights that
    they share with it.
    """
    proto = onnx.load(path)
    if any(a.HasField("g") or a.graphs for node in proto.graph.node for a in node.attribute):
        return
    # It warns of tensors of float8, which it hands on as they are.
    with G_LOGGER.suppress(G_LOGGER.ERROR):
        graph = gs.import_onnx(proto)
    for node in graph.nodes:
        if node.op == "Cast":
            _join(node)
    for node in [node for node in graph.nodes if node.op == "Identity"]:
        _bypass(node, graph)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    done = gs.export_onnx(graph, do_type_check=False)
    done.ir_version, done.producer_name = proto.ir_version, proto.producer_name
    done.producer_version, done.doc_string = proto.producer_version, proto.doc_string
    done.ClearField("metadata_props")
    done.metadata_props.extend(proto.metadata_props)
    _save(done, path)


def _join(cast: gs.Node) -> None:
    """`Cast(float32) → Cast(float16)` of a number that is no float reads the number itself."""
    source = cast.inputs[0]
    before = source.inputs[0] if source.inputs else None
    if before is None or before.op != "Cast" or len(source.outputs) != 1:
        return
    if before.attrs.get("to") in _FLOATS:
        cast.inputs[0] = before.inputs[0]


def _bypass(node: gs.Node, graph: gs.Graph) -> None:
    output, value = node.outputs[0], node.inputs[0]
    if output in graph.outputs:
        return
    for reader in list(output.outputs):
        reader.inputs = [value if given is output else given for given in reader.inputs]


def _save(proto: onnx.ModelProto, path: Path) -> None:
    data = path.with_name(f"{path.name}.data")
    large = proto.ByteSize() > INLINE_BYTES
    data.unlink(missing_ok=True)
    if large:
        onnx.save(proto, path, save_as_external_data=True, location=data.name)
    else:
        path.write_bytes(proto.SerializeToString(deterministic=True))
