"""The metric of an accuracy goal: labels of the data, or a function that the user names."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from octavo.ir.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed

    Run = Callable[[Feed], dict[str, NDArray[np.generic]]]

_FORM = "a function that takes run(feed) -> outputs and returns one number, higher is better"


@final
@dataclass(frozen=True)
class Metric:
    """Scores a model that is called with a feed; `text` says what the score is."""

    text: str
    score: Callable[[Run], float]
    samples: int | None = None


def labelled(batches: Batches) -> Metric:
    """Top-1 accuracy of the first output against the labels of the data.

    Raises UsageError where the data has no labels or not one whole number per sample.
    """
    labels = batches.labels
    if labels is None:
        hint = "add an array 'labels' to the calibration file, or give --eval module:function"
        raise UsageError("an accuracy goal needs labels or a metric", hint=hint)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        why = f"they are {labels.dtype}{list(labels.shape)}"
        raise UsageError("labels must be one whole number per sample", why=why)

    def score(run: Run) -> float:
        found = [_classes(run(feed)) for feed in batches]
        return float((np.concatenate(found) == labels).mean())

    return Metric(f"top-1 accuracy of {len(labels)} labelled samples", score, len(labels))


def named(text: str) -> Metric:
    """The function `module:function`, called with the model; the current folder is searched too.

    Raises UsageError where it cannot be loaded, or later where it fails or returns no number.
    """
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise UsageError(f"'{text}' names no metric", hint=f"give --eval module:function, {_FORM}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"the module of the metric '{text}' does not load", why=why) from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        raise UnknownName("metric", name, vars(module), where=module_name)
    return Metric(text, lambda run: _called(text, function, run))


def _called(text: str, function: Callable[[Run], Any], run: Run) -> float:
    try:
        value = function(run)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError(
            f"the metric '{text}' fails", why=why, hint=f"it must be {_FORM}"
        ) from error
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        shape = getattr(value, "shape", None)
        of_shape = "" if shape is None else f" of shape {list(shape)}"
        why = f"it returns {type(value).__name__}{of_shape}"
        raise UsageError(
            f"the metric '{text}' gives no single number", why=why, hint=f"it must be {_FORM}"
        )
    number = float(value)
    if not math.isfinite(number):
        raise UsageError(f"the metric '{text}' returns {number}", hint=f"it must be {_FORM}")
    return number


def _classes(outputs: dict[str, NDArray[np.generic]]) -> NDArray[np.generic]:
    array = next(iter(outputs.values()))
    if array.ndim != 2 or array.shape[1] < 2:
        why = f"the first output has the shape {list(array.shape)}"
        hint = "give --eval module:function"
        raise UsageError("top-1 accuracy needs one row of classes per sample", why=why, hint=hint)
    found: NDArray[np.generic] = array.argmax(-1)
    return found
