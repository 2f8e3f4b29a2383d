"""The options of every command that may make its calibration data itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

import typer

if TYPE_CHECKING:
    from octavo.passes.synthesis import Synthesis


class Prior(StrEnum):
    """How frequent a random token is."""

    RANKED = "ranked"
    UNIFORM = "uniform"
    NORM = "norm"


@final
@dataclass(frozen=True)
class SyntheticOptions:
    """What is known of inputs that nobody collected; one option of the command line each."""

    given_input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="How an input that is made up is distributed: x=normal(0,1), x=uniform(0,255) "
            "or x=ids(0,30521); repeatable.",
        ),
    ] = None
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="The tokenizer.json or vocab.txt of a text model; that beside it."),
    ] = None
    synthesis_seconds: Annotated[
        float, typer.Option(min=1.0, help="Seconds that making up data may take.")
    ] = 300.0

    def synthesis(self, model: Path) -> Synthesis:
        """What these options ask for."""
        from octavo.ir.vocabulary import read_vocabulary
        from octavo.passes.input_laws import parse_laws
        from octavo.passes.synthesis import Synthesis

        path = self.tokenizer or _beside(model)
        return Synthesis(
            laws=parse_laws(self.given_input or ()),
            vocabulary=read_vocabulary(path) if path is not None else None,
            seconds=self.synthesis_seconds,
        )


@final
@dataclass(frozen=True)
class OptimisationOptions:
    """How data is made and how much of it; one option of the command line each."""

    samples: Annotated[int, typer.Option(min=1, help="Samples to make.")] = 64
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimisation.")] = 60
    length: Annotated[int, typer.Option(min=1, help="Tokens of the longest text.")] = 128
    prior: Annotated[
        Prior, typer.Option(help="How frequent a random token is: by its number, all alike, norm.")
    ] = Prior.RANKED
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Shape of an input, as NAME=1x3x224x224; repeatable."),
    ] = None
    labels: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of seeing a class in every image.")
    ] = None
    variation: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of the total variation of images.")
    ] = None
    entropy: Annotated[
        float | None,
        typer.Option(min=0.0, help="Weight of diverse patches, where no BatchNorm is."),
    ] = None
    low_pass: Annotated[
        float, typer.Option(min=0.0, help="Share of an image's width whose frequencies are kept.")
    ] = 0.0

    def applied(self, how: Synthesis) -> Synthesis:
        """A synthesis with these options."""
        from octavo.cli.bench_command import parse_shapes

        return replace(
            how,
            samples=self.samples,
            steps=self.steps,
            length=self.length,
            prior=self.prior.value,
            shapes=parse_shapes(self.shape or ()),
            labels=how.labels if self.labels is None else self.labels,
            variation=how.variation if self.variation is None else self.variation,
            entropy=how.entropy if self.entropy is None else self.entropy,
            low_pass=self.low_pass,
        )


def _beside(model: Path) -> Path | None:
    found = (model.parent / name for name in ("tokenizer.json", "vocab.txt"))
    return next((path for path in found if path.is_file()), None)
