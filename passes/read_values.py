"""Values inside a model for one feed after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.ir.extract import extract

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np
    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.evaluate import Evaluator
    from octavo.ir.model import Model


def value_reader(
    model: Model, evaluator: Evaluator, names: Iterable[str]
) -> Callable[[Feed], dict[str, NDArray[np.generic]]]:
    """A function that gives the named values of a feed; graph inputs are taken from it.

    Only what the values depend on runs. Raises UnknownName for a value the model lacks.
    """
    wanted = sorted(set(names))
    inputs = {value.name or "" for value in model.graph.inputs}
    computed = [name for name in wanted if name not in inputs]
    part = extract(model, (), computed) if computed else None
    run = evaluator.load(part) if part is not None else None
    needed = [value.name or "" for value in part.graph.inputs] if part is not None else []

    def read(feed: Feed) -> dict[str, NDArray[np.generic]]:
        found = {name: feed[name] for name in wanted if name in inputs}
        return found if run is None else found | run({name: feed[name] for name in needed})

    return read
