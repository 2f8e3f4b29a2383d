"""Write a model as ONNX: the same model gives the same bytes, and never half a file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir

from octavo.ir.errors import UsageError, VerificationFailed
from octavo.ir.weightless import broken_rule, is_small, without_weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from onnx_ir import TensorProtocol

    from octavo.ir.model import Model

# protobuf ends at 2 GB; below, one file is simpler, unless the source had two already.
INLINE_BYTES = 1_500_000_000
INLINE_BYTES_OF_EXTERNAL_SOURCE = 1 << 26
_ALIGNMENT = 64
_IR_VERSIONS = {23: 11, 24: 12, 25: 13, 26: 13}
_OLD_IR_VERSION = 10
_VERSIONS = {"com.microsoft": 1, "octavo": 1}


def write(model: Model, path: Path) -> None:
    """Write a model, with its weights in `<path>.data` where they are too large for one file.

    Raises UsageError where the folder cannot be written to or a file to be written backs a
    weight of this model, VerificationFailed if the result breaks ONNX's rules. An existing
    file is replaced only when the new one is complete.
    """
    data = path.with_name(path.name + ".data")
    for tensor in _tensors(model.ir):
        if isinstance(tensor, onnx_ir.ExternalTensor) and _same(Path(tensor.path), path, data):
            message = f"'{tensor.path}' holds weights of the model that would be written over it"
            raise UsageError(message, hint="choose another output path")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            _write_into(model.ir.clone(), Path(scratch) / path.name)
            # The model goes last: whoever sees it finds its data.
            for file in sorted(Path(scratch).iterdir(), reverse=True):
                file.replace(path.with_name(file.name))
    except OSError as error:
        why = error.strerror or str(error)
        raise UsageError(f"cannot write '{path}'", why=why) from error


def serialize(model: Model) -> bytes:
    """The bytes of the one file that holds the whole model; for models far below 2 GB."""
    own = model.ir.clone()
    _prepare(own)
    _embed(own)
    return _content(own)


def ir_version(opset: int) -> int:
    """The IR version that goes with an opset: 10 up to opset 22, 13 from 25 on."""
    return _IR_VERSIONS.get(opset, _OLD_IR_VERSION)


def _write_into(own: onnx_ir.Model, path: Path) -> None:
    _prepare(own)
    tensors = {id(t): t for t in _tensors(own)}.values()
    external = any(isinstance(t, onnx_ir.ExternalTensor) for t in tensors)
    limit = INLINE_BYTES_OF_EXTERNAL_SOURCE if external else INLINE_BYTES
    if sum(t.nbytes for t in tensors) > limit:
        data = path.with_name(path.name + ".data")
        with data.open("wb") as file:
            _externalize(own, file, data.name)
    else:
        _embed(own)
    path.write_bytes(_content(own))


def _externalize(own: onnx_ir.Model, file: BinaryIO, location: str) -> None:
    """Move large initializers to a file, one at a time; a tensor used twice is stored once."""
    stored: dict[int, TensorProtocol] = {}
    for graph in own.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or is_small(tensor):
                continue
            if id(tensor) not in stored:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                offset = file.tell()
                _copy(tensor, file)
                stored[id(tensor)] = onnx_ir.ExternalTensor(
                    location,
                    offset,
                    tensor.nbytes,
                    tensor.dtype,
                    shape=onnx_ir.Shape(tensor.shape.numpy()),
                    name=value.name or "",
                    doc_string=tensor.doc_string,
                    metadata_props=dict(tensor.metadata_props),
                )
            value.const_value = stored[id(tensor)]
    _embed(own, location)


def _copy(tensor: TensorProtocol, file: BinaryIO) -> None:
    if isinstance(tensor, onnx_ir.ExternalTensor | onnx_ir.Tensor):
        tensor.tofile(file)  # without a copy in memory, for a file or an array
    else:
        file.write(tensor.tobytes())


def _embed(own: onnx_ir.Model, location: str = "") -> None:
    """Point no tensor at a file, except at `location`."""
    for graph in own.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, onnx_ir.ExternalTensor) and tensor.location != location:
                value.const_value = onnx_ir.Tensor(
                    tensor.numpy(),
                    tensor.dtype,
                    name=value.name,
                    doc_string=tensor.doc_string,
                    metadata_props=dict(tensor.metadata_props),
                )


def _prepare(own: onnx_ir.Model) -> None:
    """Set the versions that fit, drop functions that nothing calls, and check ONNX's rules."""
    called = [n.op_identifier() for n in own.graph.all_nodes()]
    for key in called:
        if key in own.functions:
            called += [n.op_identifier() for n in own.functions[key].all_nodes()]
    for key in own.functions.keys() - set(called):
        del own.functions[key]
    for domain, _, _ in called:
        if domain in _VERSIONS:
            own.opset_imports.setdefault(domain, _VERSIONS[domain])
    own.ir_version = ir_version(own.opset_imports.get("", 0))
    if why := broken_rule(without_weights(own)):
        raise VerificationFailed("the model to be written breaks ONNX's rules", why=why)


def _content(own: onnx_ir.Model) -> bytes:
    content: bytes = onnx_ir.to_proto(own).SerializeToString(deterministic=True)
    return content


def _tensors(model: onnx_ir.Model) -> Iterator[TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def _same(existing: Path, *targets: Path) -> bool:
    return any(t.exists() and existing.exists() and existing.samefile(t) for t in targets)
