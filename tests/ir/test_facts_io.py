"""Facts survive the disk, whatever they hold, and nothing else is read as facts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo import models
from octavo.ir import facts
from octavo.ir.errors import UsageError
from octavo.ir.facts import (
    FLOAT,
    Choice,
    Fact,
    HalfConstants,
    Latencies,
    Norm,
    Norms,
    Option,
    Placement,
    Plan,
    Portable,
    QuantizedInput,
    Range,
    Ranges,
    Site,
)
from octavo.ir.facts_io import read_facts, write_facts
from octavo.ir.menu import Group, Menu, Offer, Units
from octavo.ir.quant import PerAxis, PerBlock, QuantParams, QuantSpec
from octavo.ir.read import read
from octavo.ir.reference import Original, Reference

_U8 = QuantSpec("u8")
_S8 = QuantSpec("s8", PerAxis(0), symmetric=True, used_bits=7)
_S4 = QuantSpec("s4", PerBlock(1, 32), symmetric=True)
_ARRAY = np.array([0.5, -1.25, 3.0], np.float32)
# Every fact, with every kind of field it may hold; a new fact without a line here fails.
EXAMPLES: dict[type[Fact], Fact] = {
    Norms: Norms(
        {
            "a": Norm("batch", _ARRAY, -_ARRAY, _ARRAY + 1, _ARRAY * _ARRAY, 1e-5),
            "map": Norm("layer", _ARRAY, _ARRAY),
        }
    ),
    Ranges: Ranges({"x/y:0": Range(-1.0, 2.0, -1e30, 2.5)}, "percentile", 64, "ab" * 32),
    Plan: Plan(
        {
            "conv": Choice(Option("static", _S8), "fastest", {"static": 1e-4, "float": 3e-4}),
            "fields": Choice(FLOAT, "kept float by 'fields'"),
            "matmul": Choice(Option("weight-only", _S4), ""),
        },
        "measured on a machine",
    ),
    Placement: Placement(
        {"x": Site("x", _U8, "g", True, 6.0, (0.0, 1.0)), "y": Site("y", _U8, "g")},
        {"x": ("conv", "add"), "y": ()},
        {"relu": "conv"},
    ),
    Latencies: Latencies({"conv": {"float": 1e-3, "static": 2e-4}}, 1e-10, 2e-10, "here"),
    HalfConstants: HalfConstants(("positions", "types")),
    Portable: Portable(),
    QuantizedInput: QuantizedInput(
        {"x": QuantParams(_U8, np.array(0.1, np.float32), np.array(3, np.int32))}
    ),
}


def _fact_types() -> list[type[Fact]]:
    kinds = [k for k in vars(facts).values() if isinstance(k, type) and issubclass(k, Fact)]
    return [kind for kind in kinds if kind is not Fact]


@pytest.mark.parametrize("kind", _fact_types(), ids=lambda kind: kind.__name__)
def test_a_fact_survives(kind: type[Fact], tmp_path: Path) -> None:
    write_facts({kind: EXAMPLES[kind]}, tmp_path)
    read = read_facts(tmp_path)
    assert read.keys() == {kind}
    _assert_same(read[kind], EXAMPLES[kind])


def test_all_facts_together_give_the_same_bytes_again(tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    write_facts(EXAMPLES, tmp_path)
    write_facts(read_facts(tmp_path), again)
    for name in ("facts.json", "facts.npz"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        '[{"is": "Path", "fields": {}}]',
        '[{"is": "Range", "fields": {}}]',
        '[{"is": "Ranges", "fields": {"by_value": {"array": "missing"}}}]',
    ],
)
def test_nothing_else_is_read(tmp_path: Path, content: str) -> None:
    write_facts({}, tmp_path)
    (tmp_path / "facts.json").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match="facts cannot be read"):
        read_facts(tmp_path)


def test_facts_of_the_planner_and_a_reference_model_survive(tmp_path: Path) -> None:
    group = Group("conv", ("conv",), role="Conv")
    offer = Offer("static", {"conv": Option("static", _S8)}, 10, 1e-3, integer=True)
    source = read(Path(models.__file__).parent / "fashion_mobile.onnx")
    known: dict[type[Fact], Fact] = {
        Menu: Menu({"conv": group}, {"conv": (offer,)}, 100, "analytic"),
        Reference: Reference(source.with_fact(EXAMPLES[Ranges])),
        Units: Units({"conv#width": {"2 of 4": (0, 3), "4 of 4": ()}}, {"conv#width": "conv"}),
        Original: Original(source),
    }
    write_facts(known, tmp_path)
    again = read_facts(tmp_path)
    _assert_same(again[Menu], known[Menu])
    _assert_same(again[Units], known[Units])
    original = again[Original]
    assert isinstance(original, Original)
    assert original.model.fingerprint == source.fingerprint
    reference = again[Reference]
    assert isinstance(reference, Reference)
    assert reference.model.fingerprint == source.fingerprint
    assert reference.model.source == source.source
    _assert_same(reference.model.find(Ranges), EXAMPLES[Ranges])


def test_a_pickle_is_not_unpacked(tmp_path: Path) -> None:
    write_facts({}, tmp_path)
    entry = [{"is": "Norms", "fields": {"by_value": {"array": "a0"}}}]
    (tmp_path / "facts.json").write_text(json.dumps(entry), encoding="utf-8")
    hostile = np.array([object()], dtype=object)
    with (tmp_path / "facts.npz").open("wb") as file:
        np.savez(file, a0=hostile)
    with pytest.raises(UsageError, match="facts cannot be read"):
        read_facts(tmp_path)


def _assert_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)
    elif dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            _assert_same(getattr(actual, field.name), getattr(expected, field.name))
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            _assert_same(actual[key], value)
    elif isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            _assert_same(one, other)
    else:
        assert actual == expected
