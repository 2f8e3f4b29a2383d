"""Opset conversion and shape inference by ONNX's own C++ code, on a copy without big weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir

from octavo.ir.errors import ModelError
from octavo.ir.model import PROVENANCE
from octavo.ir.normalise import DOMAINS, lift_constants, unique_names
from octavo.ir.weightless import broken_rule, graphs, without_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

OPSET = 21
_OLDEST_UNCONVERTED = 13
_OLD_COORDINATES = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
# For operators of these domains ONNX has no inference, so what the file declares has to do.
_UNINFERRED = frozenset(DOMAINS) - {"", "ai.onnx.ml"}


def convert(model: onnx_ir.Model, where: str) -> None:
    """Raise the opset to 21 where it is older, in place.

    An operator without an adapter leaves opsets from 13 on as they are; below, it is a
    ModelError that names the operator.
    """
    from onnx import version_converter

    opset = model.opset_imports[""]
    if opset >= OPSET:
        return
    _refuse_changed_meaning(model, opset, where)
    proto = without_weights(model)
    try:
        converted = version_converter.convert_version(proto, OPSET)
    except (RuntimeError, version_converter.ConvertError) as error:
        if opset >= _OLDEST_UNCONVERTED:
            return
        message = f"the model cannot be raised from opset {opset} to {OPSET}"
        hint = "export it with a newer opset"
        raise ModelError(message, where=where, why=str(error)[:300], hint=hint) from error
    _take_graph(model, onnx_ir.from_proto(converted))
    if opset < 11:
        _keep_coordinates(model)
    # Adapters insert Constant nodes, and nodes and values without names.
    lift_constants(model)
    unique_names(model)


def _refuse_changed_meaning(model: onnx_ir.Model, opset: int, where: str) -> None:
    """Refuse operators whose meaning ONNX's converter changes (found by running both).

    It knows nothing of the batch axis of Scan in opset 8, the flattening of Hardmax before 13
    and the round-up of a shrinking Resize in opset 10.
    """
    for node in model.graph.all_nodes():
        if not node.domain and (
            (node.op_type == "Scan" and opset < 9)
            or (node.op_type == "Hardmax" and opset < 13)
            or (node.op_type == "Resize" and opset < 11 and _may_shrink(node))
        ):
            message = f"{node.op_type} of opset {opset} is not supported"
            hint = f"export the model with opset {OPSET}"
            raise ModelError(message, where=f"{where}, node '{node.name}'", hint=hint)


def _may_shrink(node: onnx_ir.Node) -> bool:
    scales = node.inputs[1].const_value if node.inputs[1] is not None else None
    nearest = node.attributes.get_string("mode", "nearest") == "nearest"
    return nearest and (scales is None or bool((scales.numpy() < 1).any()))


def _keep_coordinates(model: onnx_ir.Model) -> None:
    """Say what Upsample and Resize of before opset 11 meant: the one rule they knew."""
    for node in model.graph.all_nodes():
        if node.op_type == "Resize" and not node.domain:
            for name, value in _OLD_COORDINATES.items():
                node.attributes[name] = onnx_ir.AttrString(name, value)


def check_rules(model: onnx_ir.Model, where: str) -> None:
    """Refuse what ONNX's checker refuses: unknown operators, missing inputs, wrong attributes."""
    if why := broken_rule(without_weights(model)):
        raise ModelError("the model breaks ONNX's rules", where=where, why=why)


def infer_shapes(model: onnx_ir.Model) -> None:
    """Give every value the type and shape that follow from the graph inputs, in place.

    A declared shape stays where inference has nothing to say; one that contradicts it goes.
    """
    import onnx

    proto = without_weights(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(
            proto, check_type=True, strict_mode=True, data_prop=True
        )
    except onnx.shape_inference.InferenceError:
        inferred = onnx.shape_inference.infer_shapes(_undeclared(proto), data_prop=True)
    values = {v.name: v for graph in model.graphs() for v in _values(graph)}
    for info in _value_infos(inferred.graph):
        if info.name in values:
            _merge(values[info.name], info)


def _take_graph(model: onnx_ir.Model, converted: onnx_ir.Model) -> None:
    """Put the converted graph in place of the old one, with the weights and metadata of that."""
    old, new = model.graph, converted.graph
    old_values = {v.name: v for graph in model.graphs() for v in _values(graph)}
    for value in list(new.inputs)[len(old.inputs) :]:
        new.inputs.remove(value)
        value.const_value = old_values[value.name].const_value
        new.initializers.add(value)
    for graph in converted.graphs():
        for value in _values(graph):
            known = old_values.get(value.name)
            if known is None:
                continue
            value.metadata_props.update(known.metadata_props)
            value.doc_string = known.doc_string
            value.meta.update(known.meta)
            if value.is_initializer() and known.const_value is not None:
                value.const_value = known.const_value
    _restore_nodes(old, new)
    new.metadata_props.update(old.metadata_props)
    new.doc_string = old.doc_string
    model.graph = new
    model.opset_imports.update(converted.opset_imports)


def _restore_nodes(old: onnx_ir.Graph, new: onnx_ir.Graph) -> None:
    """Metadata of the old nodes for those of the same name; provenance for the inserted ones.

    An inserted node comes from the old producer of its output, or from what its reader does.
    """
    by_name = {node.name: node for node in old.all_nodes()}
    origin = {v.name: n.metadata_props[PROVENANCE] for n in by_name.values() for v in n.outputs}
    for node in reversed(list(new.all_nodes())):
        known = by_name.get(node.name) if node.name else None
        if known is not None:
            node.metadata_props.update(known.metadata_props)
            node.doc_string = known.doc_string
            continue
        readers = (r.metadata_props.get(PROVENANCE) for v in node.outputs for r in v.consumers())
        made = (origin.get(v.name) for v in node.outputs)
        source = next(filter(None, (*made, *readers)), None)
        if source is not None:
            node.metadata_props[PROVENANCE] = source


def _undeclared(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without declared shapes, except of values that only their declaration describes."""
    import onnx

    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    for graph in graphs(bare.graph):
        known = {t.name for t in graph.initializer}
        known |= {name for n in graph.node if n.domain in _UNINFERRED for name in n.output}
        kept = [info for info in graph.value_info if info.name in known]
        del graph.value_info[:]
        graph.value_info.extend(kept)
        for output in graph.output:
            if output.name not in known:
                output.type.tensor_type.ClearField("shape")
    return bare


def _merge(value: onnx_ir.Value, info: onnx.ValueInfoProto) -> None:
    """Take inferred type and dims; a dim that is not inferred keeps its declared size or name."""
    inferred = onnx_ir.serde.deserialize_type_proto_for_type(info.type)
    shape = onnx_ir.serde.deserialize_type_proto_for_shape(info.type)
    value.type = inferred or value.type
    declared = value.shape
    if shape is None or declared is None or len(shape) != len(declared):
        value.shape = shape or declared
        return
    value.shape = onnx_ir.Shape([_dim(new, old) for new, old in zip(shape, declared, strict=True)])


def _dim(inferred: Any, declared: Any) -> Any:
    if isinstance(inferred, int) or (
        isinstance(declared, onnx_ir.SymbolicDim) and not declared.value
    ):
        return inferred
    return declared


def _values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _value_infos(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    for inner in graphs(graph):
        yield from inner.value_info
        yield from inner.output
