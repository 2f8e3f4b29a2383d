"""What the next plan aims at."""

from __future__ import annotations

import math

import pytest

from octavo.cli.aims import Aims

_LATENCY = 0.5


def scale_of(aims: Aims) -> float:
    """The share of the float model's seconds that the next plan is given, of the budget."""
    return float(aims.scaled.removesuffix("x")) / _LATENCY


@pytest.mark.parametrize("error", [0.6, 0.8, 0.92, 1.0, 1.1, 1.5])
def test_the_last_file_that_keeps_to_the_latency_takes_most_of_it(error: float) -> None:
    """Files take `error` times the seconds predicted; plans use all they are given."""
    aims, shares = Aims(None, f"{_LATENCY}x"), []
    for _ in range(5):
        share = error * scale_of(aims)
        shares.append(share)
        if not aims.keeps(0.0, share):
            aims.tighten(0.0, share)
        elif not aims.loosen(share, 1.0):
            break
    assert len(shares) <= 3
    assert 0.9 < shares[-1] <= 0.99


def test_steps_of_seconds_end_between_what_kept_and_what_broke() -> None:
    """Between two plans is nothing: the search ends with the slower one that keeps."""
    aims, kept = Aims(None, f"{_LATENCY}x"), []
    for _ in range(20):
        share = 0.8 if scale_of(aims) < 1.17 else 1.2
        if not aims.keeps(0.0, share):
            aims.tighten(0.0, share)
            if not aims.open:
                break
        else:
            kept.append(scale_of(aims))
            if not aims.loosen(share, 1.0):
                break
    assert len(kept) > 1
    assert kept == sorted(kept)
    assert 1.17 / 1.04 < kept[-1] < 1.17


@pytest.mark.parametrize(
    ("over", "share", "kept"),
    [(0.0, 0.0, True), (-5.0, 0.98, True), (0.0, 0.995, False), (1.0, 0.5, False)],
)
def test_a_file_keeps_to_a_latency_with_room_for_noise(
    over: float, share: float, kept: bool
) -> None:
    assert Aims(100.0, "10ms").keeps(over, share) is kept


def test_a_plan_that_did_not_use_its_seconds_gets_no_more() -> None:
    aims = Aims(None, "10ms")
    assert not aims.loosen(0.5, 0.5)
    assert aims.scaled == "10ms"


def test_bytes_are_taken_from_the_next_size() -> None:
    aims = Aims(1000.0, "")
    aims.tighten(100.0, 0.0)
    assert aims.size is not None
    assert aims.size < 900
    assert (aims.scaled, aims.broke) == ("", math.inf)


@pytest.mark.parametrize("latency", ["", "none"])
def test_no_latency_is_never_scaled(latency: str) -> None:
    aims = Aims(None, latency)
    assert not aims.loosen(0.0, 1.0)
    assert aims.scaled == latency
