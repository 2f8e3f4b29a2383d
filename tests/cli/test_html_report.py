"""`report.html`: whole, safe and quiet whatever a model is called and whatever was measured."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from octavo.cli import plots
from octavo.cli.html_report import html
from octavo.cli.report_data import (
    CurvePoint,
    GroupRow,
    LayerRow,
    Prediction,
    Ranking,
    ReportData,
    rank_correlation,
    with_planner,
)
from octavo.ir.artifact import BenchRow
from octavo.ir.facts import FLOAT, Option
from octavo.ir.menu import Damage, Group, Menu, Offer, Sensitivity, Solution
from octavo.ir.quant import PerAxis, QuantSpec
from octavo.passes.base import Remark
from octavo.passes.record import GraphDiff, GraphSummary, PassRecord

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
HOSTILE = (
    "<script>alert(1)</script>",
    '"onload="alert(1)',
    "</svg></figure>&lt;",
    "$\\frac{x}{y}$",
    "模型\u202e\x07\ud800",
    "{{ title }}{% raw %}",
    "layer " * 60,
)
ODD = (math.nan, math.inf, -math.inf, 1e300, -1e300, 0.0, -1.0, 5e-324)
MOST_SECONDS = 1.5


class Page(HTMLParser):
    """What a browser would see: elements, attributes, text; `open_tags` is empty at the end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.seen: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags, f"</{tag}> closes nothing"
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def cells(self) -> str:
        return "".join(self.text)


def summary(nodes: int) -> GraphSummary:
    return GraphSummary("f", {"Conv": nodes}, 4 * nodes, {})


def record(name: str, where: str) -> PassRecord:
    remark = Remark("missed", where, "no kernel of this shape", {"rows": 3})
    diff = GraphDiff((), (), ())
    return PassRecord(
        1, name, "changed", 0.1, 0.0, 10**8, summary(3), summary(2), diff, (), (), {}, (remark,)
    )


def layer(name: str, number: float) -> LayerRow:
    return LayerRow(name, "Conv", "static", "integer kernel", 10, 40, "K", True, number, number)


def full(names: tuple[str, ...], numbers: tuple[float, ...] = (1.0, 0.5, 0.25)) -> ReportData:
    """A page with every part, its measured and estimated numbers taken in turn from `numbers`."""
    count = max(len(names), len(numbers))
    some = [numbers[k % len(numbers)] for k in range(count)]
    other = some[1:] + some[:1]
    pairs = list(enumerate(zip(some, other, strict=True)))
    curve = tuple(CurvePoint(a, b, a, chosen=k == 1) for k, (a, b) in pairs)
    groups = tuple(
        GroupRow(name, 1, "static", "", value, 10, value, value, value)
        for name, value in zip(names, some, strict=False)
    )
    row = BenchRow("a.onnx", 1000, 0.02, 0.01, 0.03, 1.0)
    damage = dict(zip(names, some, strict=False))
    return ReportData(
        title="model.onnx",
        files=(row, replace(row, file="model.onnx", bytes=250, speed=2.0)),
        facts={"cosine": "0.9999"},
        notes=names,
        config={"target": "ort-cpu"},
        layers=tuple(layer(name, value) for name, value in zip(names, some, strict=False)),
        passes=(record("canonicalize", names[0]),) if names else (),
        groups=groups,
        curve=curve,
        predictions=tuple(Prediction(str(k), a, b) for k, (a, b) in pairs),
        rankings=(Ranking("measured", "KL", damage), Ranking("fisher", "KL", damage, 0.9, 1.0)),
        activations={name: Damage(value) for name, value in damage.items()},
    )


def test_names_cannot_leave_their_place() -> None:
    text = html(full(HOSTILE))
    page = Page(text)
    assert page.open_tags == []
    assert "svg" in page.seen
    assert not page.seen & {"script", "img", "link", "iframe", "object", "image", "foreignobject"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for name in HOSTILE[:4]:
        # In the tables of layers, groups and ranks, a remark, a note and a plot.
        assert page.cells.count(name) >= 5
    assert HOSTILE[-1] in page.cells
    assert "模型\\u202e\\x07\\ud800" in page.cells
    assert "\u202e" not in text
    text.encode("utf-8")


def test_a_name_is_text_in_a_plot_too() -> None:
    svg = plots.bars("p", ["<a>&$x$"], [plots.Bars("b", [1.0])])
    assert ">&lt;a&gt;&amp;$x$</text>" in svg


def test_nothing_outside_the_page_is_referred_to() -> None:
    text = html(full(("a", "b", "c")))
    assert not re.search(r"https?:|src\s*=|@import|url\((?!#)", text)
    page = Page(text)
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    policy = [value for name, value in page.attributes if name == "content" and "-src" in value]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_ids_are_unique_and_what_is_referred_to_exists() -> None:
    page = Page(html(full(tuple(f"n{k}" for k in range(20)), (3.0, 2.0, 1.0, 4.0))))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    wanted = {value[1:] for name, value in page.attributes if name == "href"}
    wanted |= {
        found for _, value in page.attributes for found in re.findall(r"url\(#(.+?)\)", value)
    }
    assert wanted
    assert wanted <= set(ids)


def test_colours_follow_the_page() -> None:
    figures = html(full(("a", "b"))).split("</style>")[1]
    assert not re.search(r"(fill|stroke): #", figures)
    assert "var(--after)" in figures
    assert "font-family: 'DejaVu" not in figures


def test_the_same_data_give_the_same_bytes() -> None:
    code = (
        "import runpy, sys; m = runpy.run_path(sys.argv[1]);"
        "print(m['html'](m['full'](('a', 'b', 'c'))), end='')"
    )
    again = subprocess.run(
        [sys.executable, "-c", code, __file__], capture_output=True, check=True, timeout=60
    )
    first = html(full(("a", "b", "c")))
    assert again.stdout.decode("utf-8") == first == html(full(("a", "b", "c")))


@pytest.mark.parametrize("count", [0, 1, 2, 8])
@pytest.mark.parametrize("numbers", [*((number,) for number in ODD), ODD, (1e14, 1e-14, 1.0)])
def test_odd_numbers_are_left_out_without_losing_the_page(
    count: int, numbers: tuple[float, ...]
) -> None:
    text = html(full(tuple(f"n{k}" for k in range(count)), numbers))
    page = Page(text)
    assert page.open_tags == []
    assert "not drawn" not in text
    assert not re.search(r"\b(nan|inf)\b", page.cells)
    coordinates = " ".join(v for n, v in page.attributes if n in ("d", "x", "y", "transform"))
    assert not re.search("nan|inf", coordinates)


def test_an_empty_compilation_has_a_page() -> None:
    page = Page(html(ReportData("x", (), {}, (), {}, (), ())))
    assert page.open_tags == []
    assert not page.seen & {"svg", "table", "h2"}


def test_parts_without_data_are_absent() -> None:
    data = replace(full(("a",)), groups=(), curve=(), predictions=(), rankings=(), activations={})
    page = Page(html(data))
    assert "Layers" in page.text
    assert not {"Plan", "Sensitivity"} & set(page.text)


def test_five_hundred_layers_are_quick_and_all_listed() -> None:
    names = tuple(f"/model/layers.{k}/attention/q/MatMul" for k in range(500))
    data = full(names, (0.3, 0.2, 0.1))
    html(full(("a",)))
    begin = time.process_time()
    text = html(data)
    assert time.process_time() - begin < MOST_SECONDS
    page = Page(text)
    assert all(f">{name}</td>" in text for name in names)
    assert 0 < page.text.count(names[3]) <= 8
    assert text.count("font-family: var(--mono)") == 2 * plots.MOST_BARS


def test_a_plot_that_fails_leaves_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("no font")

    monkeypatch.setattr(plots, "bars", broken)
    page = Page(html(full(("a", "b"))))
    assert [t for t in page.text if t.startswith("not drawn: Weights and time of layers")]
    assert page.open_tags == []


def test_bars_keep_the_order_and_leave_out_rows_without_one() -> None:
    names = [f"n{k}" for k in range(150)]
    lengths = [0.0 if k == 7 else float(k + 1) for k in range(150)]
    svg = plots.bars("p", names, [plots.Bars("b", lengths)])
    drawn = re.findall(r">(n\d+)</text>", svg)
    # The longest are the last hundred, which keep the order of the model.
    assert drawn == names[50:]
    few = plots.bars("p", names[:10], [plots.Bars("b", lengths[:10])])
    assert re.findall(r">(n\d+)</text>", few) == [n for n in names[:10] if n != "n7"]


def test_the_settings_of_matplotlib_stay_as_they_were() -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 31.0, "svg.fonttype": "path"}):
        svg = plots.bars("p", ["a"], [plots.Bars("b", [1.0])])
        assert matplotlib.rcParams["font.size"] == 31.0
        assert matplotlib.rcParams["svg.fonttype"] == "path"
    assert svg == plots.bars("p", ["a"], [plots.Bars("b", [1.0])])


def test_units_fit_the_largest_number() -> None:
    svg = plots.bars("p", ["a"], [plots.Bars("weights", [2_500_000], unit="bytes")])
    assert ">weights, MB</text>" in svg
    svg = plots.scatter([Prediction("a", 2e-4, 3e-4)])
    assert ">predicted, µs</text>" in svg


def test_the_chosen_plan_is_marked_once_a_side() -> None:
    points = [CurvePoint(1e6 * k, 1e-3 * k, 1 / k, k == 3) for k in range(1, 6)]
    assert plots.pareto(points, "KL").count(">chosen</text>") == 2
    assert plots.pareto([replace(p, seconds=None) for p in points], "KL").count(">chosen") == 1
    assert plots.pareto([replace(p, damage=None) for p in points], "KL") == ""


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [9, 3, 2, 1], -1.0),
        # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 Σd² / n(n² - 1) = 1 - 24 / 60.
        ([1, 2, 3, 4], [20, 10, 40, 30], 0.6),
        # Ranks 1 2.5 2.5 4 and 1 2 3 4: deviations give 4.5 / √(4.5 · 5).
        ([1, 5, 5, 9], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),
        ([1], [1], None),
        ([1, 1, 1], [1, 2, 3], None),
        ([1, math.nan, 3], [1, 2, 3], None),
    ],
)
def test_rank_correlation(left: list[float], right: list[float], expected: float | None) -> None:
    found = rank_correlation(left, right)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


def planned() -> ReportData:
    four = Option("weight-only", QuantSpec("s4", PerAxis(0)))
    eight = Option("static", QuantSpec("s8", PerAxis(0)))
    groups = {name: Group(name, (name,)) for name in ("a", "b")}
    offers = {
        name: (
            Offer("float", {name: FLOAT}, 400, 0.004),
            Offer(str(eight), {name: eight}, 100, 0.001),
            Offer("four", {name: four}, 50, 0.003),
        )
        for name in groups
    }
    solution = Solution(
        status="optimal",
        objective="damage",
        gap=0.0,
        seconds=0.1,
        solver="HiGHS",
        limits={"bytes": 200.0},
        totals={"bytes": 150.0, "seconds": 0.004, "damage": 0.3},
        options={"a": "four", "b": str(eight)},
        # The second is the chosen one, added up in another order.
        curve=(
            {"bytes": 100.0, "damage": 0.9},
            {"bytes": 150.0, "seconds": 0.004, "damage": 0.1 + 0.2},
        ),
    )
    measured = {
        "a": {"four": Damage(0.2, 0.01)},
        "b": {"four": Damage(0.6), str(eight): Damage(0.1)},
    }
    fisher = {"a": {"four": Damage(2.0)}, "b": {"four": Damage(7.0), str(eight): Damage(1.0)}}
    return with_planner(
        full(()),
        Menu(groups, offers, 10, "estimated"),
        solution,
        (
            Sensitivity(measured, {"v": Damage(0.05)}, "measured", "KL of the outputs"),
            Sensitivity(fisher, {}, "fisher", "½ Δᵀ F Δ"),
        ),
        (Prediction("plan", 0.004, 0.005),),
    )


def test_what_the_planner_decided_is_on_the_page() -> None:
    data = planned()
    assert [(g.name, g.bits, g.bytes, g.damage, g.standard_error) for g in data.groups] == [
        ("a", 4, 50, 0.2, 0.01),
        ("b", 8, 100, 0.1, 0.0),
    ]
    assert [point.chosen for point in data.curve] == [False, True]
    assert [ranking.rank_correlation for ranking in data.rankings] == [None, pytest.approx(1.0)]
    assert data.rankings[0].damage == {"a": 0.2, "b": 0.6}
    page = Page(html(data))
    assert page.open_tags == []
    for text in ("optimal, gap 0", "bytes ≤ 200", "four", "KL of the outputs", "-20.0 %", "chosen"):
        assert text in page.cells


def test_a_plan_that_is_not_on_the_curve_is_added_to_it() -> None:
    curve = ({"bytes": 2.0},)
    solution = Solution("optimal", "damage", 0.0, 0.1, "", {}, {"bytes": 1.0}, {}, curve=curve)
    data = with_planner(full(()), Menu({}, {}, 0, ""), solution)
    assert data.curve == (CurvePoint(2.0, None, None), CurvePoint(1.0, None, None, chosen=True))


def test_a_compilation_leaves_its_page(artifact: Path) -> None:
    text = (artifact / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open_tags == []
    planned = json.loads((artifact / "plan.json").read_text(encoding="utf-8"))["planned"]
    assert planned
    assert all(node["node"] in page.text for node in planned)
    assert "fashion_mobile.onnx" in page.text
    # No folder of this machine, neither of the source nor of the output.
    assert str(artifact.parent) not in text
    assert str(Path(__file__).resolve().parents[2]) not in text
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    assert "report.html" not in manifest["files"]
    assert not np.isnan(manifest["results"]["cosine"])
