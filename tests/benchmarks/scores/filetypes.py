"""Recognising the type of files of this machine; their endings serve as labels.

The score depends on what is installed here: compare models of one run only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from task import Array, Scores, Task

_PER_TYPE, _CANDIDATES, _SMALLEST_BYTES = 20, 160, 200
_LABELS = Path(__file__).with_suffix(".txt")
_ROOTS = (Path("/usr"), Path("/opt"), Path.home(), Path(os.__file__).parents[1])


@final
@dataclass(frozen=True)
class Files:
    """Files of one ending: the ones that are scored, and others."""

    label: str
    scored: tuple[Path, ...]
    others: tuple[Path, ...]


def files() -> list[Files]:
    """For every ending of the label file, up to 160 files of this machine, shuffled."""
    rows = (line.split() for line in _LABELS.read_text().splitlines() if line[0] != "#")
    labels = dict[str, str](rows)
    found: dict[str, list[Path]] = {ending: [] for ending in labels}
    for root in _ROOTS:
        for path in _walk(root):
            few = found.get(path.name.rsplit(".", 1)[-1].lower())
            if few is not None and len(few) < _CANDIDATES and _usable(path):
                few.append(path)
    rng = np.random.default_rng(0)
    result = []
    for ending, paths in found.items():
        order = [paths[k] for k in rng.permutation(len(paths))]
        groups = tuple(order[:_PER_TYPE]), tuple(order[_PER_TYPE:])
        result.append(Files(labels[ending], *groups))
    return result


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names))


def _usable(path: Path) -> bool:
    regular = path.is_file() and not path.is_symlink()
    return regular and path.stat().st_size > _SMALLEST_BYTES


def settings(model: Path) -> dict[str, Any]:
    """How the network reads bytes and what its classes mean."""
    return dict[str, Any](json.loads((model.parent / "config.json").read_text()))


def features(paths: Iterable[Path], how: dict[str, Any]) -> Array:
    """The first and the last bytes of every file without outer white space, padded."""
    return np.array([_ends(path, how) for path in paths], np.int32)


def _ends(path: Path, how: dict[str, Any]) -> list[int]:
    block, padding = how["block_size"], how["padding_token"]
    with path.open("rb") as file:
        first = file.read(block).lstrip()[: how["beg_size"]]
        file.seek(max(0, path.stat().st_size - block))
        last = file.read(block).rstrip()[-how["end_size"] :]
    missing = [padding] * (how["beg_size"] - len(first) + how["end_size"] - len(last))
    return [*first, *missing, *last]


def task(model: Path) -> Task:
    """Twenty files per ending, where that many exist."""
    how = settings(model)
    labels = how["target_labels_space"]
    groups = [group for group in files() if group.scored and group.label in labels]

    def score(outputs: Iterable[Array]) -> Scores:
        pairs = zip(outputs, groups, strict=True)
        right = [output.argmax(1) == labels.index(group.label) for output, group in pairs]
        return {
            "accuracy": float(np.concatenate(right).mean()),
            "mean_over_types": float(np.mean([hits.mean() for hits in right])),
        }

    return Task("accuracy", [{"bytes": features(g.scored, how)} for g in groups], score)
