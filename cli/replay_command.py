"""`octavo replay`: run a pass that broke again, from the folder that was left behind."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.render import print_message, print_warning

if TYPE_CHECKING:
    from octavo.passes.base import PassContext
    from octavo.passes.reproducer import Reproduction


def replay(
    folder: Annotated[Path, typer.Argument(help="The folder that the error message named.")],
    dump_ir: Annotated[
        Path | None, typer.Option(help="Write every changed model there, as ONNX text.")
    ] = None,
) -> None:
    """Run a pass that broke again.

    The error of the reproducer folder shows again, unless it is gone.
    """
    from octavo.ir.versions import versions
    from octavo.passes.instruments import DumpText
    from octavo.passes.pipeline import Pipeline
    from octavo.passes.reproducer import read_reproduction

    found = read_reproduction(folder)
    now = versions()
    for name in sorted(found.versions.keys() | now.keys()):
        was, is_ = found.versions.get(name, "none"), now.get(name, "none")
        if was != is_:
            print_warning(f"the folder was written with {name} {was}, this is {is_}")
    print_message(f"replaying {found.pipeline} on {found.model.source.name}, seed {found.seed}")
    instruments = [DumpText(dump_ir)] if dump_ir is not None else []
    with _context(found) as ctx:
        Pipeline.parse(found.pipeline).run(found.model, ctx, instruments)
    print_message(f"no error now; it was: {found.error.strip().splitlines()[-1]}")


@contextmanager
def _context(found: Reproduction) -> Iterator[PassContext]:
    """The services of the compilation, without its cache and its measured latencies."""
    from octavo.cli.target import backend_of
    from octavo.ir.cost import AnalyticCost
    from octavo.passes.base import PassContext

    backend = backend_of(found.target)
    with (
        tempfile.TemporaryDirectory(prefix="octavo-") as workdir,
        ThreadPoolExecutor(2) as executor,
    ):
        yield PassContext(
            target=backend.target,
            cost=AnalyticCost(backend.target, _elements(found)),
            evaluator=backend.evaluator(),
            executor=executor,
            workdir=Path(workdir),
            calibration=found.calibration,
            seed=found.seed,
        )


def _elements(found: Reproduction) -> Mapping[str, int]:
    """Elements per value for the first feed; none for a model whose shapes contradict it."""
    from onnx.shape_inference import InferenceError

    from octavo.backends.bench import random_feed
    from octavo.ir.shapes import concrete_elements

    feed = next(iter(found.calibration or ()), None) or random_feed(found.model, seed=found.seed)
    try:
        return concrete_elements(found.model, feed)
    except InferenceError as error:
        print_warning(f"estimates know no shapes: {error}")
        return {}
