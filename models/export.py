"""Write a torch network as an ONNX file, with a dynamic batch."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import TYPE_CHECKING

import onnx_ir
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

OPSET = 17


def to_onnx(
    network: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    output: str,
    path: Path,
    *,
    axes: tuple[str, ...] = ("batch",),
    keep_norms: bool = False,
) -> None:
    """Export a network in inference mode through TorchScript.

    `inputs` are examples by name; `axes` names the leading dynamic dimensions of every input and
    of the output. TorchScript is used because it keeps pooling and LSTM as the one ONNX operator
    they are. `keep_norms` keeps BatchNormalization apart from the convolution before it.
    """
    mode = torch.onnx.TrainingMode
    dynamic = dict(enumerate(axes))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=[output],
            dynamic_axes=dict.fromkeys((*inputs, output), dynamic),
            opset_version=OPSET,
            dynamo=False,
            do_constant_folding=not keep_norms,
            training=mode.PRESERVE if keep_norms else mode.EVAL,
        )


def to_onnx_external(
    network: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    output: str,
    path: Path,
    axes: tuple[str, ...],
) -> None:
    """Export a big network through torch.export, its weights in `<path>.data`.

    Arguments are those of `to_onnx`. Tied weights stay one tensor.
    """
    dynamic = dict(enumerate(axes))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=tuple(dynamic for _ in inputs),
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        # What torch notes about the machine and the source text would grow the file threefold.
        node.metadata_props.clear()
    onnx_ir.save(program.model, path, external_data=f"{path.name}.data")
