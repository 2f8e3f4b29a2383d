"""Read PyTorch programs: `.pt2` files, exported programs, graph modules and modules.

All of them go through `torch.onnx.export(dynamo=True)`, whose result already is an onnx-ir graph,
and from there the same way as a file. The graph is exported without optimization, so that
BatchNormalization is still visible to the passes that keep its parameters.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

from octavo.ir.errors import ModelError, UsageError
from octavo.ir.model import Source

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch.export import ExportedProgram

    from octavo.ir.model import Model

OPSET = 21
BATCH = "batch"
_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)', overload='(\w+)'")
# Of torch's notes on the export, the path of the module a node comes from is kept.
_SCOPES = "pkg.torch.onnx.name_scopes"


def read_torch(
    source: str | Path | ExportedProgram | torch.nn.Module,
    inputs: tuple[Any, ...] | torch.Tensor | None = None,
) -> Model:
    """Read a PyTorch program.

    A module (or graph module) needs example `inputs`, one per argument of `forward`. It is
    exported in inference mode, whatever mode it is in, and is left as it was; dimension 0 of every
    input tensor becomes the dynamic dimension `batch` where the module allows it, and a warning
    says why where it does not. Weights are copied: later training does not reach the Model.

    Raises UsageError without torch or inputs, UnsafeModel for a `.pt2` file whose loading could
    run code, ModelError where the export fails.
    """
    torch = _import_torch()
    if isinstance(source, (str, Path)):
        return _read_file(Path(source), inputs)
    if isinstance(source, torch.export.ExportedProgram):
        _refuse_inputs(inputs)
        return _from_program(source, "an ExportedProgram")
    if not isinstance(source, torch.nn.Module):
        message = f"a {type(source).__name__} is no PyTorch program"
        raise UsageError(message, hint="pass a .pt2 path, an ExportedProgram or an nn.Module")
    if inputs is None:
        raise UsageError(
            f"{type(source).__name__} cannot be read without example inputs",
            why="torch records a module by running it once",
            hint="octavo.read(module, inputs=(tensor, …)), one per argument of forward",
        )
    return _read_module(source, inputs if isinstance(inputs, tuple) else (inputs,))


def _import_torch() -> Any:
    try:
        import torch
        import torch.export
        import torch.onnx
    except ImportError as error:
        raise UsageError(
            "PyTorch programs cannot be read without torch",
            why=str(error),
            hint="pip install 'octavo[torch]'",
        ) from error
    return torch


def _refuse_inputs(inputs: object) -> None:
    if inputs is not None:
        message = "an exported program fixes its own inputs"
        raise UsageError(message, hint="leave out inputs, or read the module itself")


def _read_file(path: Path, inputs: object) -> Model:
    from octavo.ir.read_pt2 import load_pt2

    _refuse_inputs(inputs)
    if not path.is_file():
        raise UsageError("the file does not exist", where=str(path))
    with _silence():
        program = load_pt2(path)
    model = _from_program(program, str(path))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return replace(model, source=Source(path.name, digest, path.stat().st_size))


def _from_program(program: ExportedProgram, where: str) -> Model:
    try:
        return _normalise(_export(program, ()), where)
    except _ExportError as error:
        raise _failure(error.reason, where) from error.reason


def _read_module(module: torch.nn.Module, inputs: tuple[Any, ...]) -> Model:
    where = type(module).__name__
    with _inference_mode(module):
        try:
            graph = _export(module, inputs, dynamic_shapes=_batched(inputs))
        except _ExportError as dynamic:
            try:
                graph = _export(module, inputs)
            except _ExportError as static:
                raise _failure(static.reason, where) from static.reason
            reason = _reason(dynamic.reason)
            warnings.warn(f"{where} is read with fixed shapes: {reason}", stacklevel=3)
    return _normalise(graph, where)


class _ExportError(Exception):
    """Whatever torch or the module's own code raised during an export."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _export(
    program: torch.nn.Module | ExportedProgram,
    inputs: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...] | None = None,
) -> onnx_ir.Model:
    import torch

    options: dict[str, Any] = {"optimize": False, "verbose": False, "opset_version": OPSET}
    with _silence():
        try:
            exported: Any = torch.onnx.export(
                program, inputs, dynamo=True, dynamic_shapes=dynamic_shapes, **options
            )
        except Exception as error:  # forward is the author's code and may raise anything
            raise _ExportError(error) from error
    graph: onnx_ir.Model = exported.model
    return graph


def _batched(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The dynamic shapes that name dimension 0 of every tensor, in the structure of the inputs."""
    import torch
    from torch.utils import _pytree

    def shape(leaf: object) -> dict[int, str] | None:
        return {0: BATCH} if isinstance(leaf, torch.Tensor) and leaf.ndim else None

    shapes: tuple[Any, ...] = _pytree.tree_map(shape, inputs)
    return shapes


def _normalise(graph: onnx_ir.Model, where: str) -> Model:
    from octavo.ir.read import read

    if any(node.op_type == "Dropout" for node in graph.graph):
        raise ModelError(
            "the program was exported in training mode: it still drops activations at random",
            where=where,
            hint="call module.eval() before torch.export.export",
        )
    _own_weights(graph)
    _drop_notes(graph.graph)
    model = read(graph)
    return replace(model, source=replace(model.source, name=where))


def _own_weights(graph: onnx_ir.Model) -> None:
    """Replace torch tensors, which the module may go on training, by copies; ties stay tied."""
    copies: dict[int, onnx_ir.TensorProtocol] = {}
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        if id(tensor) not in copies:
            array = np.array(tensor.numpy(), order="C")
            copies[id(tensor)] = onnx_ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)
        value.const_value = copies[id(tensor)]


def _drop_notes(graph: onnx_ir.Graph) -> None:
    """Remove what torch notes about source lines of the author, its own graph and its names."""
    nodes = list(graph.all_nodes())
    values = [*graph.inputs, *graph.initializers.values(), *(v for n in nodes for v in n.outputs)]
    of_nodes = (node.metadata_props for node in nodes)
    of_values = (value.metadata_props for value in values)
    for notes in (graph.metadata_props, *of_nodes, *of_values):
        for key in [k for k in notes if k.startswith("pkg.torch.") or k == "namespace"]:
            if key != _SCOPES:
                del notes[key]


def _failure(error: Exception, where: str) -> ModelError:
    operators = _OPERATOR.findall(f"{error}{error.__cause__}")
    if operators:
        name = ".".join(operators[0])
        return ModelError(
            f"operator {name} has no ONNX form",
            where=where,
            why="torch.onnx knows no translation or decomposition of it",
            hint="compute it with other operators, or outside the model",
        )
    return ModelError(
        "torch cannot export the program",
        where=where,
        why=_reason(error),
        hint="torch.export.export of the same module and inputs shows the whole story",
    )


def _reason(error: BaseException) -> str:
    """The innermost cause in two lines at most; torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


@contextlib.contextmanager
def _inference_mode(module: torch.nn.Module) -> Iterator[None]:
    # Flags, not module.eval(): the graph modules of torch.export refuse that call.
    before = [(part, part.training) for part in module.modules()]
    for part, _ in before:
        part.training = False
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop what torch prints, logs and warns on the way; errors still come through."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    out = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(out):
                yield
    finally:
        logging.disable(level)
