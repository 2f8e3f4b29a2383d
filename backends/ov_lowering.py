"""Lower a planned model to the graph that OpenVINO runs with integer kernels.

Standard Q and DQ in front of what computes in 8 bits, float bias, no contrib operators. Codes
pass through data movement as they are: a second Q behind it would be executed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from octavo.backends.ort_lowering import check_weights, rewrite, write_lowered
from octavo.backends.ov_session import OPTIONS
from octavo.ir.facts import Portable
from octavo.ir.fake_quant import DOMAIN, params_of

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir

    from octavo.ir.artifact import Artifact
    from octavo.ir.model import Model
    from octavo.ir.target import Target


def lower(model: Model, path: Path, target: Target) -> Artifact:
    """Write the lowered model to `path`; the given model is not changed.

    Raises UsageError for an option that the target has no kernel for, VerificationFailed when
    the result is not well-formed.
    """
    check_weights(model, target)
    own = model.clone().with_fact(Portable())
    _drop_repeated(own, target)
    explicit = rewrite(own)
    return write_lowered(model, own, explicit, path, target, OPTIONS)


def _drop_repeated(own: Model, target: Target) -> None:
    """Remove what quantizes again, to the same codes, behind data movement."""
    moving = {row.op_type for row in target.rows if row.same_params}
    for fake in [n for n in own.graph if n.domain == DOMAIN and n.op_type == "FakeQuant"]:
        made = fake.inputs[0].producer() if fake.inputs[0] is not None else None
        if made is None or made.op_type not in moving or fake.outputs[0].is_graph_output():
            continue
        sources = [value.producer() if value is not None else None for value in _moved(made)]
        if all(source is not None and _alike(source, fake) for source in sources):
            for use in list(fake.outputs[0].uses()):
                use.node.replace_input_with(use.idx, fake.inputs[0])
            own.graph.remove(fake, safe=True)


def _moved(node: onnx_ir.Node) -> list[onnx_ir.Value | None]:
    return list(node.inputs) if node.op_type == "Concat" else list(node.inputs[:1])


def _alike(source: onnx_ir.Node, fake: onnx_ir.Node) -> bool:
    """Whether two activations are quantized to the same grid."""
    if source.domain != DOMAIN or source.op_type != "FakeQuant":
        return False
    one, other = params_of(source), params_of(fake)
    return (
        one.spec == other.spec
        and np.array_equal(one.scale, other.scale)
        and np.array_equal(one.zero_point, other.zero_point)
    )
