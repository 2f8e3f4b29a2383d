"""How far one set of outputs is from the source's: KL divergence or normalised squared error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.ir.extract import values_by_name
from octavo.ir.menu import Damage

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model

Metric = Literal["auto", "kl", "error"]
Kind = Literal["logits", "probabilities", "values"]
_TINY = 1e-12
_ELEMENTS = 1 << 20
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast", "Transpose")


@final
@dataclass(frozen=True)
class OutputDamage:
    """Damage per sample of the float outputs of a model, by how each is compared.

    Logits and probabilities: KL(source ‖ compressed) of the last axis, in nats, mean over rows.
    Other values: ‖y - y'‖² / ‖y‖². A model with several outputs counts their sum.
    """

    kinds: Mapping[str, Kind]

    @staticmethod
    def of(model: Model, metric: Metric = "auto") -> OutputDamage:
        """What fits the model: an output that a linear node or a Softmax computes is classes."""
        floats = [v for v in model.graph.outputs if v.dtype is None or v.dtype.is_floating_point()]
        kinds: dict[str, Kind] = {v.name or "": _kind(v, metric) for v in floats}
        return OutputDamage(kinds)

    @property
    def text(self) -> str:
        """What the number is, for people."""
        texts = ("normalised squared error" if k == "values" else "KL" for k in self.kinds.values())
        return " + ".join(dict.fromkeys(texts)) + " of the outputs"

    def per_sample(self, expected: Feed, actual: Feed, samples: int) -> NDArray[np.float64]:
        """Damage of every sample, shape `[samples]`; outputs that `actual` lacks count nothing.

        An output whose first axis does not count samples gives all of them its one number.
        """
        total = np.zeros(samples)
        for name, kind in self.kinds.items():
            if name in actual and expected[name].size:
                total += _SCORES[kind](_rows(expected[name], samples), _rows(actual[name], samples))
        return total


def summary(per_sample: NDArray[np.float64]) -> Damage:
    """Mean and standard error over samples."""
    count = per_sample.size
    error = float(per_sample.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0
    return Damage(float(per_sample.mean()) if count else 0.0, error)


def output_names(model: Model) -> list[str]:
    """Names of the graph outputs."""
    return [value.name or "" for value in model.graph.outputs]


def float_outputs(model: Model, damage: OutputDamage) -> list[str]:
    """The outputs that damage is measured on, in graph order."""
    known = values_by_name(model)
    return [name for name in output_names(model) if name in damage.kinds and name in known]


def _rows(array: NDArray[np.generic], samples: int) -> NDArray[np.generic]:
    """`[samples, rows, last]`, or `[1, rows, last]` where the first axis counts something else."""
    last = array.shape[-1] if array.ndim else 1
    own = array.ndim > 1 and array.shape[0] == samples
    middle = array.shape[1:-1] if own else array.shape[:-1]
    return array.reshape(samples if own else 1, math.prod(middle), last)


def _parts(
    p: NDArray[np.generic], q: NDArray[np.generic]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Some rows of both at a time, in float64: the logits of a vocabulary are large."""
    count = max(1, _ELEMENTS // max(1, p.shape[0] * p.shape[2]))
    for start in range(0, p.shape[1], count):
        part = (slice(None), slice(start, start + count))
        yield p[part].astype(np.float64), q[part].astype(np.float64)


def _divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL of every row, summed over rows."""
    rows = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    found: NDArray[np.float64] = np.maximum(rows, 0.0).sum(axis=-1)
    return found


def _of_logits(p: NDArray[np.generic], q: NDArray[np.generic]) -> NDArray[np.float64]:
    parts = (_divergence(_log_softmax(a), _log_softmax(b)) for a, b in _parts(p, q))
    return np.asarray(sum(parts) / p.shape[1])


def _of_probabilities(p: NDArray[np.generic], q: NDArray[np.generic]) -> NDArray[np.float64]:
    parts = (_divergence(_log(a), _log(b)) for a, b in _parts(p, q))
    return np.asarray(sum(parts) / p.shape[1])


def _of_values(p: NDArray[np.generic], q: NDArray[np.generic]) -> NDArray[np.float64]:
    error, power = np.zeros(p.shape[0]), np.zeros(p.shape[0])
    for a, b in _parts(p, q):
        error += np.square(a - b).sum(axis=(1, 2))
        power += np.square(a).sum(axis=(1, 2))
    found: NDArray[np.float64] = error / np.maximum(power, _TINY)
    return found


def _log(chances: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.log(np.maximum(chances, _TINY)))


_SCORES = {"logits": _of_logits, "probabilities": _of_probabilities, "values": _of_values}


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def _kind(value: onnx_ir.Value, metric: Metric) -> Kind:
    shape = value.shape
    classes = shape is not None and len(shape) >= 2 and shape[-1] != 1
    if metric == "error" or not classes:
        return "values"
    node = value.producer()
    while node is not None and node.op_type in _VIEWS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is not None and node.op_type == "Softmax":
        return "probabilities"
    linear = node is not None and (node.op_type in ("MatMul", "Gemm") or _is_bias(node))
    return "logits" if linear or metric == "kl" else "values"


def _is_bias(node: onnx_ir.Node) -> bool:
    makers = [v.producer() if v is not None else None for v in node.inputs]
    constants = [v for v in node.inputs if v is not None and v.const_value is not None]
    linear = [m for m in makers if m is not None and m.op_type in ("MatMul", "Gemm")]
    return node.op_type == "Add" and bool(constants) and bool(linear)
