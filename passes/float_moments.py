"""Moments of what weights multiply in the float model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.moments import Moments
from octavo.ir.reference import Reference
from octavo.passes.collect_moments import collected
from octavo.passes.sequential_moments import Sighted
from octavo.passes.weight_matrix import WeightMatrix, why_no_matrix

if TYPE_CHECKING:
    from collections.abc import Iterable

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.weight_quantizers import WeightQuantizer


def float_moments(
    model: Model, ctx: PassContext, quantizers: Iterable[WeightQuantizer], samples: int
) -> Moments | None:
    """The moments that the model carries, else those of `samples` calibration samples.

    `None` where there are neither.
    """
    known = model.find(Moments)
    if known is not None or ctx.calibration is None:
        return known
    readers = (reader for quantizer in quantizers for reader in quantizer.readers)
    wanted = [(node.name or "", index) for node, index in readers]
    reference = model.find(Reference)
    source = reference.model if reference is not None else model
    return collected(source, ctx, wanted, ctx.calibration, samples=samples)


def float_sight(quantizer: WeightQuantizer, moments: Moments) -> Sighted | None:
    """The mean over readers of a tied weight, which multiply as many numbers each."""
    found = [
        (WeightMatrix.of(node, index), moment.matrix())
        for node, index in quantizer.readers
        if not why_no_matrix(node, index)
        for moment in [moments.of(node.name or "", index)]
        if moment is not None
    ]
    if not found:
        return None
    alike = [second for matrix, second in found if second.shape == found[0][1].shape]
    second = alike[0] if len(alike) == 1 else np.mean(alike, axis=0, dtype=np.float32)
    return Sighted(found[0][0], np.asarray(second, np.float32))
