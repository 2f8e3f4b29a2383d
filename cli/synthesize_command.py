"""`octavo synthesize`: calibration data made from the model alone, and how far to trust it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli import compile_options as options
from octavo.cli.option_groups import spelled_out
from octavo.cli.render import (
    AsJson,
    format_bytes,
    format_seconds,
    print_json,
    print_message,
    print_table,
)
from octavo.cli.synthetic_options import OptimisationOptions, SyntheticOptions
from octavo.ir.errors import UsageError

if TYPE_CHECKING:
    from octavo.ir.arrays_io import Array
    from octavo.ir.model import Model
    from octavo.ir.synthetic import Synthetic

Output = Annotated[Path, typer.Option("--output", "-o", help="The .npz to write.")]
Real = Annotated[
    str, typer.Option(help="Four or more real samples to compare with, as --calibration.")
]
Sheet = Annotated[bool, typer.Option("--sheet/--no-sheet", help="Write images as a PNG as well.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]


@spelled_out
def synthesize(
    model: options.ModelFile,
    output: Output,
    making: SyntheticOptions,
    optimising: OptimisationOptions,
    real: Real = "",
    preprocess: options.Preprocess = "",
    seed: Seed = 0,
    sheet: Sheet = True,
    force: Force = False,
    cache: options.UseCache = True,
    as_json: AsJson = False,
) -> None:
    """Make calibration data from a model alone.

    Images are optimised until the model's stored statistics come out and it sees a class in them;
    decoders write text; encoders get random tokens in valid frames.
    """
    from octavo.cli.compile_command import batches_of
    from octavo.cli.progress import progress_bars
    from octavo.cli.synthetic_data import Maker
    from octavo.ir.cache import Cache, default_folder
    from octavo.ir.read import read

    if output.exists() and not force:
        raise UsageError(f"{output} exists", hint="give --force to replace it")
    how = optimising.applied(making.synthesis(model))
    begin = time.perf_counter()
    with progress_bars() as progress:
        source = read(model)
        store = Cache(default_folder()) if cache else None
        maker = Maker(source, "ort-cpu", seed, store, progress)
        made = maker.make(how, batches_of(real, preprocess, source))
    seconds = time.perf_counter() - begin
    picture = _write(made, source, output, sheet=sheet)
    _show(made, output, picture, seconds, as_json)


def _write(made: Synthetic, source: Model, output: Path, *, sheet: bool) -> Path | None:
    """Write the data, and the images in it beside it; their path."""
    from octavo.cli.png import contact_sheet, write_png
    from octavo.ir.arrays_io import write_arrays

    arrays = joined(made)
    try:
        write_arrays(output, arrays, comment=f"octavo {made.origin}")
        for value in source.graph.inputs if sheet else ():
            pixels = contact_sheet(arrays[value.name or ""])
            if pixels is not None:
                picture = output.with_suffix(".png")
                write_png(picture, pixels)
                return picture
    except OSError as error:
        raise UsageError(f"{output} cannot be written", why=str(error)) from None
    return None


def joined(made: Synthetic) -> dict[str, Array]:
    """All samples of every input along the first axis; shorter texts end in zeros.

    Raises UsageError where an input does not count samples.
    """
    import numpy as np

    found: dict[str, Array] = {}
    for name, first in made.feeds[0].items():
        arrays = [np.asarray(feed[name]) for feed in made.feeds]
        if first.ndim == 0:
            message = f"input '{name}' has no samples to write"
            raise UsageError(message, hint="compile with --calibration synthetic instead")
        most = np.max([array.shape for array in arrays], axis=0)
        ends = [[(0, 0), *((0, int(d)) for d in most[1:] - array.shape[1:])] for array in arrays]
        padded = [np.pad(array, end) for array, end in zip(arrays, ends, strict=True)]
        found[name] = np.concatenate(padded)
    return found


def _show(
    made: Synthetic, output: Path, picture: Path | None, seconds: float, as_json: bool
) -> None:
    trust = made.trust
    content = {
        "origin": made.origin,
        "samples": made.samples,
        "sha256": made.sha256,
        "seconds": seconds,
        "distance": made.distance,
        "trust": None if trust is None else trust.value,
        "parts": {} if trust is None else dict(trust.parts),
        "sheet": None if picture is None else str(picture),
        "notes": list(made.notes),
    }
    if as_json:
        print_json(content)
        return
    if trust is not None:
        parts = [(name, f"{part:.3f}") for name, part in trust.parts.items()]
        print_table(("part of trust", "0 to 1"), [*parts, ("trust", f"{trust.value:.3f}")])
    print_message(
        f"{made.origin}: {made.samples} samples in {format_seconds(seconds)}; "
        f"wrote {output} ({format_bytes(output.stat().st_size)})"
    )
    if picture is not None:
        print_message(f"images:      {picture}")
    for note in made.notes:
        print_message(f"note:        {note}")
