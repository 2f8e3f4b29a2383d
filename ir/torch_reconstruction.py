"""Learn a part of a graph so that its outputs stay those of the float part.

AdaRound (arXiv 2004.10568) of blocks as in BRECQ (arXiv 2102.05426), FlexRound (2306.00317), on
inputs that are float, compressed, or a mixture of both as in QDrop (arXiv 2203.05740).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import torch
from torch import Tensor

from octavo.ir.torch_fit import Fit, Outcome
from octavo.ir.torch_student import Rates

if TYPE_CHECKING:
    from octavo.ir.torch_fit import Samples
    from octavo.ir.torch_rounding import RoundingMethod
    from octavo.ir.torch_student import Student

Prefix = Literal["quantized", "float", "mixed"]
# A regulariser that is absent first and sharpens later: AdaRound, section 3.
_WARM_UP, _SOFTEST, _SHARPEST = 0.2, 20.0, 2.0
_TINY = 1e-12
_CHECKED = 32
_MIXED = 0.5


@final
@dataclass(frozen=True)
class Schedule:
    """How every part is learned; rates are those of Adam, `penalty` weighs unfinished codes."""

    method: RoundingMethod
    prefix: Prefix
    steps: int
    batch: int
    codes_rate: float
    scales_rate: float
    vectors_rate: float
    penalty: float


@final
@dataclass(frozen=True)
class Reconstructed:
    """Relative error ‖y - y'‖² / ‖y‖² of the outputs on held-out samples, and the training."""

    before: float
    after: float
    outcome: Outcome

    @property
    def better(self) -> bool:
        """Whether what was learned is worth keeping."""
        return self.after < self.before


def target_name(name: str) -> str:
    """The key of a batch that holds what an output should be."""
    return f"octavo.target.{name}"


def float_name(name: str) -> str:
    """The key of a batch that holds what the float model feeds an input."""
    return f"octavo.float.{name}"


def reconstruct(
    student: Student, train: Samples, check: Samples, plan: Schedule, seconds: float, seed: int
) -> Reconstructed:
    """Train a student on the targets in `train`; errors are those on `check`."""
    power = _power(check, student)
    before = _error(student, check, power)
    generator = torch.Generator().manual_seed(seed + 1)
    known = _power(train, student)
    unit = max(_error(student, train, known), _TINY)

    def loss(progress: float, batch: dict[str, Tensor]) -> Tensor:
        outputs = student.run(_mixed(batch, generator))
        errors = [
            (output - batch[target_name(name)]).square().mean() / (known[name] * unit)
            for name, output in outputs.items()
        ]
        error = torch.stack(errors).sum()
        if progress < _WARM_UP:
            return error
        share = (progress - _WARM_UP) / (1 - _WARM_UP)
        penalty = student.regulariser(_SOFTEST + (_SHARPEST - _SOFTEST) * share)
        return error if penalty is None else error + plan.penalty * penalty

    fit = Fit(plan.steps, plan.batch, seconds, seed)
    rates = Rates(plan.codes_rate, plan.scales_rate, plan.vectors_rate, 0.0)
    outcome = fit.run(student, train, rates, loss)
    return Reconstructed(before, _error(student, check, power), outcome)


def _mixed(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Every element of an input from one of both models by chance, where the batch has both."""
    found = dict(batch)
    for name, value in batch.items():
        other = batch.get(float_name(name))
        if other is not None:
            chosen = torch.rand(value.shape, generator=generator) < _MIXED
            found[name] = torch.where(chosen, value, other)
    return found


def _power(samples: Samples, student: Student) -> dict[str, float]:
    """Mean square of every output's target."""
    found = {}
    for name in student.graph.outputs:
        targets = [batch[target_name(name)] for batch in samples.all(_CHECKED)]
        total = sum(float(t.double().square().sum()) for t in targets)
        found[name] = max(total / max(sum(t.numel() for t in targets), 1), _TINY)
    return found


@torch.no_grad()
def _error(student: Student, samples: Samples, power: dict[str, float]) -> float:
    """Relative error of the outputs, summed over them, with the weights that will be emitted."""
    total, count = dict.fromkeys(power, 0.0), dict.fromkeys(power, 0)
    for batch in samples.all(_CHECKED):
        for name, output in student.run(batch, hard=True).items():
            difference = (output - batch[target_name(name)]).double()
            total[name] += float(difference.square().sum())
            count[name] += difference.numel()
    return sum(total[n] / max(count[n], 1) / power[n] for n in power)
