"""Budgets as people write them."""

from __future__ import annotations

import pytest

from octavo.ir.budgets import parse_bytes, parse_count, parse_drop, parse_seconds
from octavo.ir.errors import UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4.9MB", 4_900_000),
        ("500 kB", 500_000),
        ("1234", 1234),
        ("25%", 500),
        ("0.25x", 500),
        ("2MiB", 2 << 20),
        ("3mb", 3_000_000),
    ],
)
def test_bytes(text: str, value: float) -> None:
    assert parse_bytes(text, "--size", 2000) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "value"), [("3ms", 0.003), ("0.2s", 0.2), ("0.5x", 2.0), ("50%", 2.0), ("7µs", 7e-6)]
)
def test_seconds(text: str, value: float) -> None:
    assert parse_seconds(text, "--latency", 4.0) == pytest.approx(value, rel=1e-12)


def test_counts_and_drops() -> None:
    assert parse_count("12G", "--bops", 1.0) == 12e9
    assert parse_count("10%", "--bops", 1e9) == pytest.approx(1e8, rel=1e-12)
    assert parse_drop("1%", "--max-drop", 0.8) == pytest.approx(0.008, rel=1e-12)
    assert parse_drop("1%", "--max-drop", -2.0) == pytest.approx(0.02, rel=1e-12)
    assert parse_drop("0.01", "--max-drop", 0.8) == 0.01


@pytest.mark.parametrize(
    ("parse", "text", "why"),
    [
        (parse_bytes, "3ms", "'ms' is no unit of it"),
        (parse_seconds, "3MB", "'MB' is no unit of it"),
        (parse_seconds, "3", "it has no unit"),
        (parse_bytes, "small", "is not a budget"),
        (parse_bytes, "", "is not a budget"),
        (parse_bytes, "0", "more than zero"),
        (parse_bytes, "-5MB", "more than zero"),
        (parse_seconds, "0x", "more than zero"),
        (parse_bytes, "1e999", "more than zero"),
        (parse_drop, "1ms", "'ms' is no unit of it"),
    ],
)
def test_what_is_no_budget_says_so(parse: object, text: str, why: str) -> None:
    assert callable(parse)
    with pytest.raises(UsageError, match="--budget") as caught:
        parse(text, "--budget", 1.0)
    assert why in str(caught.value)
