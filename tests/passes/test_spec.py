"""The text form of passes parses back to the same passes, and says what is wrong with a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.ir.errors import UnknownName, UsageError
from octavo.ir.model import Model
from octavo.passes.base import Pass, PassContext
from octavo.passes.pipeline import Pipeline
from octavo.passes.presets import PRESETS, preset
from octavo.passes.registry import PASSES
from octavo.passes.spec import format_passes, options_of, parse_passes


@final
@dataclass(frozen=True)
class Sample(Pass):
    """A pass with an option of every kind."""

    name = "sample-pass"

    count: int = 3
    ratio: float = 0.5
    enabled: bool = True
    method: Literal["mse", "entropy"] = "mse"
    label: str = "plain"
    maybe_label: str | None = None
    maybe_count: int | None = 7
    patterns: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)

    def run(self, model: Model, ctx: PassContext) -> Model:
        return model


REGISTRY: dict[str, type[Pass]] = {"sample-pass": Sample}
samples = st.builds(
    Sample,
    count=st.integers(),
    ratio=st.floats(allow_nan=False),
    enabled=st.booleans(),
    method=st.sampled_from(["mse", "entropy"]),
    label=st.text(),
    maybe_label=st.none() | st.text(),
    maybe_count=st.none() | st.integers(),
    patterns=st.lists(st.text()).map(tuple),
    sizes=st.lists(st.integers()).map(tuple),
)


@given(st.lists(samples, min_size=1, max_size=4).map(tuple))
def test_every_value_of_every_option_survives_the_text(passes: tuple[Sample, ...]) -> None:
    assert parse_passes(format_passes(passes), REGISTRY) == passes


@given(st.text(alphabet='sample-pu{}=,;"\\ 1\n', max_size=30))
def test_any_text_parses_or_is_refused_as_usage(text: str) -> None:
    try:
        passes = parse_passes(text, REGISTRY)
    except UsageError:
        return
    assert parse_passes(format_passes(passes), REGISTRY) == passes


@pytest.mark.parametrize("text", PRESETS.values())
def test_presets_are_texts_that_print_as_they_are_written(text: str) -> None:
    assert str(Pipeline.parse(text)) == text


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_at_its_defaults_prints_as_its_name(name: str) -> None:
    assert str(Pipeline.parse(name)) == name


def test_defaults_are_left_out_and_blanks_do_not_matter() -> None:
    passes = parse_passes(" sample-pass { count = 3 , label=x } , sample-pass", REGISTRY)
    assert format_passes(passes) == "sample-pass{label=x},sample-pass"


def test_options_are_listed_with_type_and_default() -> None:
    options = options_of(Sample)
    assert options["method"] == ("mse|entropy", "mse")
    assert options["maybe-count"] == ("int|none", "7")
    assert options["sizes"] == ("int;…", "1;2")


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("sampel-pass", "unknown pass 'sampel-pass'", "did you mean sample-pass?"),
        ("zzz", "unknown pass 'zzz'", "known: sample-pass"),
        (
            "sample-pass{coutn=1}",
            "unknown option of sample-pass 'coutn'",
            "did you mean count or maybe-count?",
        ),
        ("sample-pass{method=entrpy}", "unknown value 'entrpy'", "did you mean entropy?"),
        ("sample-pass{count=1.5}", "'1.5' is not int", ""),
        ("sample-pass{enabled=yes}", "'yes' is not bool", ""),
        ("", "the pipeline is empty", "name at least one pass, for instance canonicalize"),
    ],
)
def test_what_is_wrong_is_named(text: str, what: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_passes(text, REGISTRY)
    assert (caught.value.what, caught.value.hint) == (what, hint)


@pytest.mark.parametrize(
    ("text", "column"),
    [("sample-pass,,x", 12), ("sample-pass{count", 0), ("sample-pass,", 12), ("!", 0)],
)
def test_a_caret_points_at_the_character(text: str, column: int) -> None:
    with pytest.raises(UsageError, match="cannot be read") as caught:
        parse_passes(text, REGISTRY)
    first, second = caught.value.where.split("\n")
    assert (first, second.index("^")) == (text, column)
    printed = str(caught.value).splitlines()
    assert printed[2].index("^") - printed[1].index(text) == column


def test_an_unknown_preset_comes_with_its_neighbours() -> None:
    with pytest.raises(UnknownName) as caught:
        preset("int9")
    assert caught.value.hint.startswith("did you mean int8")
