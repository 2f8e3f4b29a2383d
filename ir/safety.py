"""Check a model file before anything in it is believed: counts, sizes, names and paths.

Everything here looks at the parsed protobuf only. External data is neither opened nor mapped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, final

import onnx_ir

from octavo.ir.errors import ModelError, UnsafeModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import onnx

OLDEST_OPSET, NEWEST_OPSET = 7, 26
OLDEST_IR, NEWEST_IR = 3, 13
MAX_NODES = 500_000
MAX_DEPTH = 16
MAX_RANK = 64
_EXTERNAL = 1
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum", "basepath"}
_DTYPES = frozenset(d for d in onnx_ir.DataType if d)
_TYPED_FIELDS = (
    "float_data",
    "int32_data",
    "int64_data",
    "double_data",
    "uint64_data",
    "string_data",
)


@final
@dataclass
class Inspection:
    """One walk over a model: `folder` is where its external data must lie, if it may have any.

    `external` collects the files that the walk has met, by their location in the model.
    """

    where: str
    folder: Path | None
    external: dict[str, Path] = field(default_factory=dict)
    nodes: int = 0

    def check(self, proto: onnx.ModelProto) -> None:
        """Raise ModelError or UnsafeModel for anything a well-formed, harmless model lacks."""
        self._versions(proto)
        self._graph(proto.graph, frozenset(), 1)
        for function in proto.functions:
            names = self._distinct([*function.input], f"function '{function.name}'")
            self._nodes(function.node, names, function.output, frozenset(), 1)

    def tensor(self, tensor: onnx.TensorProto) -> None:
        """Check that a tensor holds exactly what its dtype and dims declare."""
        declared = self._declared_bytes(tensor)
        if tensor.data_location == _EXTERNAL:
            self._external_data(tensor, declared)
            return
        held = _held_bytes(tensor)
        if held != declared:
            unit = "strings" if tensor.data_type == onnx_ir.DataType.STRING else "bytes"
            message = f"tensor '{tensor.name}' declares {declared} {unit} and holds {held}"
            raise ModelError(message, where=self.where, hint="the file is damaged: export it again")

    def _versions(self, proto: onnx.ModelProto) -> None:
        if not proto.HasField("graph"):
            raise ModelError("the file holds no graph", where=self.where, why="not an ONNX model")
        if not OLDEST_IR <= proto.ir_version <= NEWEST_IR:
            message = f"IR version {proto.ir_version} is not supported"
            why = f"octavo reads IR versions {OLDEST_IR} to {NEWEST_IR}"
            raise ModelError(message, where=self.where, why=why)
        versions = {o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")}
        for version in versions:
            check_opset(version, self.where)
        if len(versions) > 1:
            message = f"the model imports {len(versions)} versions of the ONNX operators"
            raise ModelError(message, where=self.where)

    def _graph(self, graph: onnx.GraphProto, outer: frozenset[str], depth: int) -> None:
        if depth > MAX_DEPTH:
            message = f"subgraphs are nested more than {MAX_DEPTH} deep"
            raise UnsafeModel(message, where=self.where)
        inputs = self._distinct((v.name for v in graph.input), f"graph '{graph.name}'")
        for sparse in graph.sparse_initializer:
            self.tensor(sparse.values)
            self.tensor(sparse.indices)
        for tensor in graph.initializer:
            self.tensor(tensor)
        constants = [t.name for t in graph.initializer]
        constants += [s.values.name for s in graph.sparse_initializer]
        names = inputs | self._distinct(constants, f"graph '{graph.name}'")
        outputs = [v.name for v in graph.output]
        self._nodes(graph.node, names, outputs, outer, depth)

    def _nodes(
        self,
        nodes: Iterable[onnx.NodeProto],
        names: set[str],
        outputs: Iterable[str],
        outer: frozenset[str],
        depth: int,
    ) -> None:
        """Check single assignment, that every value read exists, and what attributes hold."""
        for node in nodes:
            self.nodes += 1
            for name in filter(None, node.output):
                if name in names:
                    message = f"value '{name}' is assigned twice"
                    raise ModelError(message, where=f"{self.where}, node '{node.name}'")
                names.add(name)
        if self.nodes > MAX_NODES:
            message = f"the model has more than {MAX_NODES} nodes"
            raise UnsafeModel(message, where=self.where)
        visible = outer | names
        for node in nodes:
            missing = next((n for n in node.input if n and n not in visible), None)
            if missing is not None:
                message = f"node '{node.name}' reads '{missing}', which nothing computes"
                raise ModelError(message, where=self.where)
            for attribute in node.attribute:
                self._attribute(attribute, visible, depth)
        missing = next((n for n in outputs if n not in names), None)
        if missing is not None:
            message = f"output '{missing}' is not computed in its graph"
            raise ModelError(message, where=self.where)

    def _attribute(
        self, attribute: onnx.AttributeProto, visible: frozenset[str], depth: int
    ) -> None:
        for tensor in _attribute_tensors(attribute):
            self.tensor(tensor)
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            self._graph(graph, visible, depth + 1)

    def _distinct(self, names: Iterable[str], owner: str) -> set[str]:
        seen: set[str] = set()
        for name in names:
            if not name or name in seen:
                what = f"declares '{name}' twice" if name else "has an input without a name"
                raise ModelError(f"{owner} {what}", where=self.where)
            seen.add(name)
        return seen

    def _declared_bytes(self, tensor: onnx.TensorProto) -> int:
        """Bytes of the tensor by its declaration; the number of strings for a string tensor."""
        what = f"tensor '{tensor.name}'"
        if tensor.data_type not in _DTYPES:
            message = f"{what} has the unknown data type {tensor.data_type}"
            raise ModelError(message, where=self.where)
        if len(tensor.dims) > MAX_RANK or any(d < 0 for d in tensor.dims):
            message = f"{what} has impossible dims {list(tensor.dims)[:MAX_RANK]}"
            raise ModelError(message, where=self.where)
        dtype = onnx_ir.DataType(tensor.data_type)
        bits = 8 if dtype == onnx_ir.DataType.STRING else dtype.bitwidth
        count: int = math.prod(tensor.dims)
        return -(-count * bits // 8)

    def _external_data(self, tensor: onnx.TensorProto, declared: int) -> None:
        entries = {e.key: e.value for e in tensor.external_data}
        if unknown := sorted(entries.keys() - _EXTERNAL_KEYS):
            message = f"external data of tensor '{tensor.name}' has the unknown key '{unknown[0]}'"
            raise ModelError(message, where=self.where)
        offset, length = (_count(entries.get(k), k, self.where) for k in ("offset", "length"))
        if length is not None and length != declared:
            message = f"tensor '{tensor.name}' declares {declared} bytes and {length} are stored"
            raise ModelError(message, where=self.where)
        location = entries.get("location", "")
        if location not in self.external:
            self.external[location] = external_file(location, self.folder, self.where)
        held = self.external[location].stat().st_size
        if (offset or 0) + declared > held:
            message = f"tensor '{tensor.name}' ends beyond the external data file '{location}'"
            why = f"it needs {(offset or 0) + declared} bytes and the file has {held}"
            hint = "the file is truncated: copy or export it again"
            raise ModelError(message, where=self.where, why=why, hint=hint)


def check_opset(version: int, where: str) -> None:
    """Refuse versions of the ONNX operators that octavo does not read."""
    if not OLDEST_OPSET <= version <= NEWEST_OPSET:
        kind = "new" if version > NEWEST_OPSET else "old"
        why = f"octavo reads opsets {OLDEST_OPSET} to {NEWEST_OPSET}"
        hint = f"export it with an opset of at most {NEWEST_OPSET}, 21 is best"
        raise ModelError(f"opset {version} is too {kind}", where=where, why=why, hint=hint)


def external_file(location: str, folder: Path | None, where: str) -> Path:
    """The file of an external data location, after checking that it lies in the folder."""
    if folder is None:
        message = f"the weights are in the file '{location}', and there is no folder to look in"
        raise ModelError(message, where=where, hint="read the model by its path")
    parts = PurePosixPath(location)
    if not location or parts.is_absolute() or ".." in parts.parts or "\\" in location:
        raise _escapes(location, where, "it must be a plain relative path")
    if PureWindowsPath(location).drive or "\0" in location:
        raise _escapes(location, where, "it must be a plain relative path")
    path = folder / location
    if path.resolve() != folder.resolve() / location:
        raise _escapes(location, where, "it goes through a symbolic link")
    if not path.is_file():
        message = f"the external data file '{location}' does not exist"
        raise ModelError(message, where=where, hint="put it beside the model")
    if path.stat().st_nlink > 1:
        raise _escapes(location, where, "the file has several hard links")
    return path


def _escapes(location: str, where: str, why: str) -> UnsafeModel:
    message = f"external data '{location}' may lie outside the model's folder"
    hint = "if you trust it, copy the data file into the model's folder"
    return UnsafeModel(message, where=where, why=why, hint=hint)


def _count(text: str | None, key: str, where: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        message = f"the {key} '{text[:40]}' of external data is not a number of bytes"
        raise ModelError(message, where=where)
    return int(text)


def _held_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes held in the file, in the encoding that `_declared_bytes` counts; -1 if two fields."""
    filled = [name for name in _TYPED_FIELDS if len(getattr(tensor, name))]
    if tensor.HasField("raw_data"):
        strings = tensor.data_type == onnx_ir.DataType.STRING
        return -1 if filled or strings else len(tensor.raw_data)
    if len(filled) > 1:
        return -1
    return _typed_bytes(tensor, filled[0]) if filled else 0


def _typed_bytes(tensor: onnx.TensorProto, name: str) -> int:
    """Bytes that the entries of a typed field stand for; -1 for a field of another dtype."""
    count, dtype = len(getattr(tensor, name)), onnx_ir.DataType(tensor.data_type)
    kinds = onnx_ir.DataType
    match name:
        case "string_data":
            return count if dtype == kinds.STRING else -1
        case "float_data":
            return count * 4 if dtype in (kinds.FLOAT, kinds.COMPLEX64) else -1
        case "double_data":
            return count * 8 if dtype in (kinds.DOUBLE, kinds.COMPLEX128) else -1
        case "int64_data":
            return count * 8 if dtype == kinds.INT64 else -1
        case "uint64_data":
            width = {kinds.UINT64: 8, kinds.UINT32: 4}.get(dtype, -1)
            return count * width if width > 0 else -1
    return _int32_bytes(count, dtype)


def _int32_bytes(count: int, dtype: onnx_ir.DataType) -> int:
    wide = ("FLOAT", "INT64", "UINT64", "UINT32", "DOUBLE", "COMPLEX64", "COMPLEX128", "STRING")
    if dtype.name in wide:
        return -1
    bits = dtype.bitwidth
    # Types of 2 and 4 bits are packed into bytes, one per entry; 6 bit values are not packed.
    return -(-count * bits // 8) if bits == 6 else count * max(bits, 8) // 8


def _attribute_tensors(attribute: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for tensor in (*sparse, *attribute.sparse_tensors):
        yield tensor.values
        yield tensor.indices
