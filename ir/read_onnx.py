"""Read ONNX: check the file, normalise the graph, raise the opset, infer shapes."""

from __future__ import annotations

import hashlib
import mmap
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.ir.errors import ModelError, OctavoError, UsageError
from octavo.ir.finite import check_finite
from octavo.ir.infer import OPSET, check_rules, convert, infer_shapes
from octavo.ir.model import Model, Source, weight_bytes
from octavo.ir.normalise import normalise
from octavo.ir.safety import Inspection, check_opset
from octavo.ir.sparse import densify

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx
    from onnx_ir import TensorProtocol


# What serialized engines begin with, within so many bytes.
_ENGINE_MARKS, _HEAD_BYTES = (b"ftrt", b"trtr"), 64


def read_onnx(path: Path) -> Model:
    """Read an ONNX file of opset 7 to 26; external data is mapped, never loaded as a whole.

    Raises ModelError, UnsafeModel, or UsageError where there is no file.
    """
    model = read_verbatim(path)
    return from_ir(model.ir, model.source)


def read_verbatim(path: Path) -> Model:
    """Read a file that `write` wrote as it is, wrong shapes and all: only safety is checked."""
    if not path.is_file():
        raise UsageError(f"there is no model file '{path}'")
    with _malformed(str(path)):
        proto = _parse(path)
        inspection = Inspection(str(path), path.parent)
        inspection.check(proto)
        source = _file_source(path, inspection)
        return Model(_deserialize(proto, str(path), path.parent), source)


def from_proto(proto: onnx.ModelProto) -> Model:
    """The model of a protobuf message, which is left as it is."""
    import onnx

    where = proto.graph.name or "ModelProto"
    with _malformed(where):
        content = proto.SerializeToString(deterministic=True)
        source = Source(where, hashlib.sha256(content).hexdigest(), len(content))
        own = onnx.ModelProto.FromString(content)
        Inspection(where, None).check(own)
        return from_ir(_deserialize(own, where, None), source)


def from_ir(model: onnx_ir.Model, source: Source | None = None) -> Model:
    """The model of an onnx-ir graph, which is taken over and changed: clone it to keep it.

    Without `source` the fingerprint of the graph identifies it.
    """
    where = source.name if source else model.graph.name or "onnx_ir.Model"
    with _malformed(where):
        if any(node.domain == "" for node in model.graph.all_nodes()):
            check_opset(model.opset_imports.get("", 0), where)
        model.opset_imports.setdefault("", OPSET)
        if source is None:
            given = Model(model, Source(where, "", 0))
            source = Source(where, given.fingerprint, weight_bytes(given))
        normalise(model, where)
        check_rules(model, where)
        convert(model, where)
        infer_shapes(model)
        check_finite(model, where)
    return Model(model, source)


@contextmanager
def _malformed(where: str) -> Iterator[None]:
    """Turn what third parties raise on malformed content into a ModelError.

    protobuf, onnx and onnx-ir raise anything from DecodeError to IndexError, so this boundary
    catches every Exception.
    """
    try:
        yield
    except OctavoError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        hint = "the file is truncated, damaged, or not an ONNX model"
        raise ModelError("the model cannot be read", where=where, why=why, hint=hint) from error


def _parse(path: Path) -> onnx.ModelProto:
    import onnx

    if not path.stat().st_size:
        raise ModelError("the file is empty", where=str(path))
    _refuse_engine(path)
    proto = onnx.ModelProto()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        proto.ParseFromString(memoryview(content))
    return proto


def _refuse_engine(path: Path) -> None:
    """Raises ModelError for what TensorRT built of a model."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if any(mark in head for mark in _ENGINE_MARKS):
        raise ModelError(
            "a TensorRT engine is no model",
            where=str(path),
            why="an engine holds kernels for one GPU and cannot be read back",
            hint="give the ONNX file that it was built from",
        )


def _file_source(path: Path, inspection: Inspection) -> Source:
    """sha256 over the bytes of the model file and then of its data files, by location."""
    digest, size = hashlib.sha256(), 0
    for file in (path, *(inspection.external[key] for key in sorted(inspection.external))):
        with file.open("rb") as content:
            hashlib.file_digest(content, lambda: digest)
        size += file.stat().st_size
    return Source(str(path), digest.hexdigest(), size)


def _deserialize(proto: onnx.ModelProto, where: str, folder: Path | None) -> onnx_ir.Model:
    densify(proto, where)
    model = onnx_ir.from_proto(proto)
    shared: dict[object, TensorProtocol] = {}
    bodies = [function.graph for function in model.functions.values()]
    for graph in (model.graph, *bodies):
        onnx_ir.external_data.set_base_dir(graph, folder or "")
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _own(value.const_value, shared)
    return model


def _own(tensor: TensorProtocol, shared: dict[object, TensorProtocol]) -> TensorProtocol:
    """A tensor that does not copy its bytes out of the protobuf again at each use.

    External tensors of the same place in the same file become one tensor.
    """
    if isinstance(tensor, onnx_ir.ExternalTensor):
        place = (tensor.path, tensor.offset, tensor.dtype, tuple(tensor.shape))
        return shared.setdefault(place, tensor)
    if tensor.dtype == onnx_ir.DataType.STRING or tensor.dtype.bitwidth < 8:
        return tensor
    array = np.ascontiguousarray(tensor.numpy()).reshape(tensor.shape.numpy())
    array.flags.writeable = False
    return onnx_ir.Tensor(
        array,
        tensor.dtype,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )
