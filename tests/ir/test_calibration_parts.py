"""Parts of calibration data: disjoint, complete, labels in step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from octavo.ir.calibration import Part, first_samples, samples_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed


@dataclass(frozen=True)
class Numbered:
    """Feeds of given sizes whose samples are 0, 1, 2, …; a sample's label is ten times it."""

    sizes: tuple[int, ...]
    labelled: bool = True
    sha256: str = "abc"

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    @property
    def labels(self) -> NDArray[np.generic] | None:
        return np.arange(self.samples) * 10 if self.labelled else None

    def __iter__(self) -> Iterator[Feed]:
        start = 0
        for size in self.sizes:
            yield {"x": np.arange(start, start + size).reshape(size, 1)}
            start += size


def numbers(part: Part) -> list[int]:
    return [int(n) for feed in part for n in feed["x"][:, 0]]


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 2, 5), (4, 4), (7, 1, 1, 2, 6)])
@pytest.mark.parametrize("of", [2, 3])
def test_parts_share_nothing_and_lose_nothing(sizes: tuple[int, ...], of: int) -> None:
    source = Numbered(sizes)
    parts = [Part(source, index, of) for index in range(of)]
    if len(sizes) < of:
        assert not parts[0].divided
        return
    found = [numbers(part) for part in parts]
    assert sorted(n for part in found for n in part) == list(range(sum(sizes)))
    for part, own in zip(parts, found, strict=True):
        assert own
        assert part.divided
        assert part.samples == len(own)
        assert part.labels is not None
        assert part.labels.tolist() == [10 * n for n in own]
        assert numbers(part) == own
    assert len({part.sha256 for part in parts}) == of


def test_which_feeds_a_part_holds() -> None:
    assert numbers(Part(Numbered((2, 1, 3, 1)), 1)) == [2, 6]


def test_the_rest_of_a_part_is_all_else() -> None:
    source = Numbered((2, 1, 3, 1, 2))
    part = Part(source, 1, 3)
    rest = Part(source, 1, 3, rest=True)
    assert numbers(part) == [2, 7, 8]
    assert numbers(rest) == [0, 1, 3, 4, 5, 6]
    assert rest.samples == 6
    assert rest.labels is not None
    assert rest.labels.tolist() == [0, 10, 30, 40, 50, 60]
    assert rest.sha256 != part.sha256


def test_a_single_feed_is_the_whole_of_every_part() -> None:
    source = Numbered((5,))
    for index in range(2):
        part = Part(source, index)
        assert not part.divided
        assert numbers(part) == [0, 1, 2, 3, 4]
        assert part.samples == 5
        assert part.labels is not None
        assert part.labels.tolist() == [0, 10, 20, 30, 40]


def test_data_without_labels_has_parts_without() -> None:
    assert Part(Numbered((2, 2), labelled=False), 0).labels is None


def test_other_data_has_parts_of_other_digests() -> None:
    assert Part(Numbered((2, 2), sha256="abd"), 0).sha256 != Part(Numbered((2, 2)), 0).sha256


def test_samples_are_counted_on_the_first_axis_of_the_first_array() -> None:
    assert samples_of({"scale": np.array(2.0), "x": np.zeros((6, 2))}) == 6
    assert samples_of({"scale": np.array(2.0)}) == 1


@pytest.mark.parametrize(
    ("limit", "kept"), [(1, [3]), (3, [3]), (4, [3]), (5, [3, 2]), (9, [3, 2]), (10, [3, 2, 5])]
)
def test_whole_feeds_up_to_a_limit(limit: int, kept: list[int]) -> None:
    assert [samples_of(f) for f in first_samples(Numbered((3, 2, 5)), limit)] == kept
