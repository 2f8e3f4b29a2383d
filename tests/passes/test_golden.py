"""Golden files: what a pass makes of a small model, as ONNX text.

A file holds cases separated by `// -----`:

    // RUN: canonicalize
    <model in ONNX text>
    // ----->
    <expected model>
    // FACT Norms n = kind=batch gamma=[1 2] …
    // REMARK missed "why" @node

The text after RUN is a pipeline; the case shows the graph after it, and the new facts and the
remarks of its last pass. `pytest --update-golden` rewrites everything after the arrow.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import onnx_ir
import pytest

from octavo.ir.read import read
from octavo.passes.pipeline import Pipeline
from octavo.passes.registry import PASSES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from octavo.ir.calibration import Feed
    from octavo.ir.facts import Fact
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.pipeline import Compilation

FOLDER = Path(__file__).parent.parent / "golden"
RUN, ARROW, SEPARATOR = "// RUN: ", "// ----->\n", "// -----\n"
FLOAT32_RELATIVE = 1e-5
EXACT_PASSES = ("canonicalize",)


@dataclass(frozen=True)
class Case:
    file: Path
    index: int
    pipeline: str
    given: str
    expected: str

    def __str__(self) -> str:
        return f"{self.file.stem}-{self.index}"

    def model(self) -> Model:
        return read(onnx.parser.parse_model(self.given))


def cases_of(file: Path) -> list[Case]:
    blocks = file.read_text(encoding="utf-8").split(SEPARATOR)
    return [_case(file, index, block) for index, block in enumerate(blocks)]


def _case(file: Path, index: int, block: str) -> Case:
    header, _, rest = block.lstrip("\n").partition("\n")
    assert header.startswith(RUN), f"{file.name}, case {index}: begin with '{RUN}'"
    given, _, expected = rest.partition(ARROW)
    return Case(file, index, header.removeprefix(RUN), given, expected)


def shown(compilation: Compilation) -> str:
    """The graph, the new facts and the remarks of the last pass, as a golden file has them."""
    proto = onnx_ir.to_proto(compilation.model.ir)
    proto.ClearField("producer_name")
    proto.ClearField("producer_version")
    del proto.functions[:]
    del proto.graph.value_info[:]
    record = compilation.records[-1]
    facts = [
        fact
        for kind, fact in compilation.model.facts.items()
        if kind.__name__ in record.facts_added
    ]
    lines = [line for fact in facts for line in fact_lines(fact)]
    remarks = [f'// REMARK {r.kind} "{r.text}" @{r.where}' for r in record.remarks]
    return "\n".join([_rounded(onnx.printer.to_text(proto).strip()), *lines, *remarks, ""])


def fact_lines(fact: Fact) -> Iterator[str]:
    """One line per entry of a fact's mappings; numbers have four digits."""
    for field in dataclasses.fields(cast("Any", fact)):
        entries = getattr(fact, field.name)
        if isinstance(entries, Mapping):
            for key, entry in entries.items():
                # Offers of a group: a line for each.
                lines = entry if isinstance(entry, tuple) else (entry,)
                yield from (f"// FACT {type(fact).__name__} {key} = {_text(x)}" for x in lines)


def _text(entry: object) -> str:
    if isinstance(entry, float):
        return f"{entry:.4g}"
    if isinstance(entry, np.ndarray):
        return np.array2string(entry, precision=4)
    if isinstance(entry, tuple):
        return "[" + "; ".join(map(_text, entry)) + "]"
    if isinstance(entry, Mapping):
        return "{" + ", ".join(f"{k}: {_text(v)}" for k, v in entry.items()) + "}"
    if dataclasses.is_dataclass(entry) and type(entry).__str__ is object.__str__:
        values = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
        return " ".join(f"{k}={_text(v)}" for k, v in values.items() if v is not None)
    return str(entry)


def _rounded(text: str) -> str:
    """Floats with five digits: the last ones differ between processors."""
    return re.sub(r"\d+\.\d{5,}", lambda number: f"{float(number[0]):.5g}", text)


FILES = sorted(FOLDER.glob("*.txt"))
CASES = [case for file in FILES for case in cases_of(file)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_golden_file(
    file: Path,
    request: pytest.FixtureRequest,
    calibrated: Callable[[Model], PassContext],
) -> None:
    assert file.stem in PASSES
    actual = []
    for case in cases_of(file):
        model, pipeline = case.model(), Pipeline.parse(case.pipeline)
        assert pipeline.passes[-1].name == file.stem
        actual.append(shown(pipeline.run(model, calibrated(model))))
    if request.config.getoption("--update-golden"):
        blocks = zip(cases_of(file), actual, strict=True)
        texts = [f"{RUN}{c.pipeline}\n{c.given}{ARROW}{text}" for c, text in blocks]
        file.write_text(SEPARATOR.join(texts), encoding="utf-8")
    for case, text in zip(cases_of(file), actual, strict=True):
        assert text == case.expected, str(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.file.stem in EXACT_PASSES], ids=str)
def test_exact_pass_keeps_what_a_model_computes(
    case: Case,
    pass_context: PassContext,
    feed_of: Callable[[Model, int], Feed],
    agrees: Callable[[Feed, Feed, float], None],
) -> None:
    before = case.model()
    after = Pipeline.parse(case.pipeline).run(before, pass_context).model
    feed = feed_of(before, 0)
    expected = pass_context.evaluator.run(before, feed)
    actual = pass_context.evaluator.run(after, feed)
    agrees(actual, expected, FLOAT32_RELATIVE)


@pytest.mark.parametrize("case", [c for c in CASES if c.file.stem in EXACT_PASSES], ids=str)
def test_exact_pass_is_idempotent(case: Case, pass_context: PassContext) -> None:
    once = Pipeline.parse(case.pipeline).run(case.model(), pass_context).model
    twice = Pipeline.parse(case.pipeline).run(once, pass_context)
    assert twice.model.fingerprint == once.fingerprint
