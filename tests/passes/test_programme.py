"""Totals of a choice, counted by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from octavo.ir.errors import UnknownName, UsageError
from octavo.passes.programme import Border, Candidate, MemoryRow, Programme, keeps

FLOAT = Candidate(0.0, {"bytes": 40.0, "seconds": 3.0})
INTEGER = Candidate(0.25, {"bytes": 10.0, "seconds": 1.0, "bops": 7.0}, integer=True)


def two(**more: Any) -> Programme:
    """Groups a and b that may be float (0) or integer (1)."""
    return Programme({"a": (FLOAT, INTEGER), "b": (FLOAT, INTEGER)}, **more)


def test_totals_add_fixed_costs_and_those_of_the_chosen() -> None:
    programme = two(fixed={"bytes": 5.0, "disk": 2.0, "damage": 0.5})
    assert programme.resources == ("damage", "bops", "bytes", "disk", "seconds")
    assert programme.totals({"a": 0, "b": 1}) == {
        "damage": 0.75,
        "bops": 7.0,
        "bytes": 55.0,
        "disk": 2.0,
        "seconds": 4.0,
    }


def test_sums_are_exact() -> None:
    tiny = (Candidate(1e-16), Candidate(0.0))
    programme = Programme({"a": (Candidate(1.0),), "b": tiny, "c": tiny})
    assert programme.totals({"a": 0, "b": 0, "c": 0})["damage"] == 1.0 + 2e-16


@pytest.mark.parametrize(
    ("producer", "readers", "a", "b", "seconds"),
    [
        ("a", ("b",), 0, 0, 0.0),
        ("a", ("b",), 1, 1, 0.0),
        ("a", ("b",), 0, 1, 16.0),
        ("a", ("b",), 1, 0, 32.0),
        ("a", ("b", "b", None), 0, 1, 16.0),
        ("a", ("b", None), 1, 1, 32.0),
        ("a", ("a",), 1, 0, 0.0),
        (None, ("a", "b"), 1, 1, 16.0),
        (None, ("a", "b"), 0, 0, 0.0),
        (None, (None,), 1, 1, 0.0),
    ],
)
def test_a_value_crosses_once_in_each_direction(
    producer: str | None, readers: tuple[str | None, ...], a: int, b: int, seconds: float
) -> None:
    programme = two(borders=(Border(producer, readers, 16.0, 32.0),))
    own = sum((FLOAT, INTEGER)[j].costs["seconds"] for j in (a, b))
    assert programme.totals({"a": a, "b": b})["seconds"] == own + seconds


def test_memory_is_that_of_the_fullest_moment() -> None:
    rows = (MemoryRow(100.0, {"a": 60.0}), MemoryRow(90.0, {"a": 10.0, "b": 50.0}))
    programme = two(memory_rows=rows)
    memory = {(a, b): programme.totals({"a": a, "b": b})["memory"] for a in (0, 1) for b in (0, 1)}
    assert memory == {(0, 0): 100.0, (0, 1): 100.0, (1, 0): 80.0, (1, 1): 40.0}


def test_limits_are_compared_exactly_but_for_the_rounding_of_sums() -> None:
    assert keeps({"bytes": 1e10}, {"bytes": 1e10})
    assert not keeps({"bytes": 1e10 + 1}, {"bytes": 1e10})
    assert keeps({"seconds": 0.1 + 0.2}, {"seconds": 0.3})
    assert not keeps({"seconds": 0.3 + 1e-11}, {"seconds": 0.3})


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_what_is_no_cost_is_refused(wrong: float) -> None:
    with pytest.raises(UsageError, match="a cost must be finite and not negative"):
        Programme({"a": (Candidate(wrong),)})
    with pytest.raises(UsageError, match="a cost must be finite and not negative"):
        Programme({"a": (Candidate(0.0, {"bytes": wrong}),)})
    with pytest.raises(UsageError, match="a cost must be finite and not negative"):
        two(fixed={"bytes": wrong})
    with pytest.raises(UsageError, match="a cost must be finite and not negative"):
        two(borders=(Border("a", ("b",), 0.0, wrong),))
    with pytest.raises(UsageError, match="a cost must be finite and not negative"):
        two(memory_rows=(MemoryRow(1.0, {"a": wrong}),))


def test_groups_must_exist_and_have_candidates() -> None:
    with pytest.raises(UsageError, match="a group has no candidate"):
        Programme({"a": ()})
    with pytest.raises(UnknownName, match="unknown group 'c'"):
        two(borders=(Border("a", ("c",), 0.0, 0.0),))
    with pytest.raises(UnknownName, match="unknown group 'c'"):
        two(memory_rows=(MemoryRow(1.0, {"c": 1.0}),))


def test_memory_is_counted_in_one_way_only() -> None:
    rows = (MemoryRow(1.0, {}),)
    with pytest.raises(UsageError, match="memory is counted by rows"):
        Programme({"a": (Candidate(0.0, {"memory": 1.0}),)}, memory_rows=rows)
    with pytest.raises(UsageError, match="memory is counted by rows"):
        two(fixed={"memory": 1.0}, memory_rows=rows)
