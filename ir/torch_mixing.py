"""Mixtures of samples as further samples: what they should give is asked of the original.

mixup (Zhang et al. 2018, arXiv 1710.09412) as data of a distillation, where any input has a
target: the model that is learned from computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from octavo.ir.torch_reconstruction import target_name
from octavo.ir.torch_values import as_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.torch_fit import Samples

    Run = Callable[[Feed], Mapping[str, NDArray[np.generic]]]


@final
@dataclass(frozen=True, eq=False)
class Mixtures:
    """Draws like `samples`, and puts λ x + (1 - λ) x' in place of every sample's `inputs`.

    λ is uniform in [0, 1], one per sample; x' is another sample of the batch. `run` gives the
    `targets` of the mixtures.
    """

    samples: Samples
    inputs: Sequence[str]
    targets: Sequence[str]
    run: Run

    @property
    def rows(self) -> bool:
        """Mixtures are made of samples."""
        return self.samples.rows

    def draw(self, generator: torch.Generator, size: int) -> dict[str, Tensor]:
        """A batch of `size` mixtures with their targets."""
        drawn = self.samples.draw(generator, size)
        count = len(next(iter(drawn.values())))
        share = torch.rand(count, generator=generator)
        other = torch.randperm(count, generator=generator)
        made = {name: _mixed(drawn[name], share, other) for name in self.inputs}
        found = self.run({name: value.numpy() for name, value in made.items()})
        return made | {target_name(name): as_torch(found[name]) for name in self.targets}


def _mixed(value: Tensor, share: Tensor, other: Tensor) -> Tensor:
    own = share.reshape(-1, *(1 for _ in value.shape[1:])).to(value.dtype)
    return own * value + (1 - own) * value[other]
