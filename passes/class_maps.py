"""The value whose places tell where a model sees its classes, and the maps of a float model.

SynQ (arXiv 2603.18423) aligns a compressed model's maps with these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.passes.evidence import Evidence

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model

    Array = NDArray[np.generic]

_IMAGE_RANK, _TOKENS_RANK = 4, 3


@final
@dataclass(frozen=True)
class ClassMaps:
    """Maps of one class per sample: `value` holds the places, `logits` the classes, `[B, K]`."""

    value: str
    logits: str

    @staticmethod
    def of(model: Model) -> ClassMaps | None:
        """The last value with places in front of the classes: of an image, or of its tokens.

        None where the first output is no row of classes per sample, or nothing has places.
        """
        evidence = Evidence.of(model)
        reached = {evidence.logits}
        for node in reversed(list(model.graph)):
            if not evidence.logits or not any(v.name in reached for v in node.outputs):
                continue
            value = node.outputs[0]
            if value.name != evidence.logits and _has_places(value, bool(evidence.attended)):
                return ClassMaps(value.name or "", evidence.logits)
            reached |= {v.name or "" for v in node.inputs if v is not None}
        return None

    def reader(self, model: Model) -> Callable[[Feed], tuple[Array, Array]]:
        """What reads the class that a model sees in every sample, `[B]`, and the map of it."""
        from octavo.ir.torch_class_maps import class_map
        from octavo.ir.torch_module import differentiable
        from octavo.ir.torch_values import as_torch

        graph = differentiable(model, [self.value, self.logits])

        def read(feed: Feed) -> tuple[Array, Array]:
            found = graph.run({name: as_torch(feed[name]) for name in graph.inputs})
            logits = found[self.logits]
            classes = logits.detach().argmax(1)
            seen = class_map(found[self.value], logits, classes)
            return classes.numpy(), seen.detach().numpy()

        return read


def _has_places(value: onnx_ir.Value, attention: bool) -> bool:
    if value.shape is None or value.dtype is None or not value.dtype.is_floating_point():
        return False
    sizes = list(value.shape)
    if len(sizes) == _IMAGE_RANK:
        return not attention and sizes[2:] != [1, 1]
    return attention and len(sizes) == _TOKENS_RANK and sizes[1] != 1
