"""A task: the inputs a model is scored on, and the score of what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from octavo.ir.artifact_io import MODEL, read_artifact

Array = NDArray[Any]
Feed = Mapping[str, Array]
Scores = dict[str, float]


@final
@dataclass(frozen=True)
class Task:
    """Inputs, and how the first outputs, in the order of the inputs, are scored.

    `headline` names the score that goals are about. `rows` says that the last axis of the output
    holds one number per class, so that two models can agree on the largest.
    """

    headline: str
    feeds: Sequence[Feed]
    score: Callable[[Iterable[Array]], Scores]
    lower_is_better: bool = False
    rows: bool = True


def session(model: Path, threads: int) -> Any:
    """A session of an ONNX file, or of an artifact folder with the options it relies on."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    file = model
    if model.is_dir():
        file = model / MODEL
        for key, value in read_artifact(model).artifact.session_options.items():
            options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def outputs(model: Path, feeds: Iterable[Feed], threads: int) -> Iterator[Array]:
    """The first output for every feed, one at a time."""
    running = session(model, threads)
    names = [value.name for value in running.get_inputs()]
    for feed in feeds:
        yield running.run(None, {name: feed[name] for name in names})[0]


def score(task: Task, model: Path, threads: int = 1) -> Scores:
    """The scores of a model file or an artifact folder."""
    return task.score(outputs(model, task.feeds, threads))


def fidelity(task: Task, reference: Path, model: Path, threads: int, feeds: int = 40) -> Scores:
    """How close the outputs are: cosine over everything, and how often the arg-max is the same."""
    used = task.feeds[:feeds]
    product = squares = own_squares = 0.0
    same = total = 0
    pairs = zip(outputs(reference, used, threads), outputs(model, used, threads), strict=True)
    for expected, actual in pairs:
        product += float(np.vdot(expected.astype(np.float64), actual))
        squares += float(np.vdot(expected.astype(np.float64), expected))
        own_squares += float(np.vdot(actual.astype(np.float64), actual))
        same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        total += expected[..., 0].size
    found = {"cosine": float(product / np.sqrt(squares * own_squares))}
    return {"same_argmax": same / total, **found} if task.rows else found


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without running its code."""
    from importlib.util import find_spec

    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        message = f"the package '{package}' is not installed; see requirements.txt"
        raise FileNotFoundError(message)
    return Path(next(iter(spec.submodule_search_locations)))
