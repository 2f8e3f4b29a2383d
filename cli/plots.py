"""Plots of the report as inline SVG: text stays text, colours are variables of the page.

matplotlib lays out and draws; what it writes is then reduced to elements that a page can hold
many times: no metadata, no ids but those that are referred to, no colours and fonts of its own.
Numbers that are missing, not finite or absurd (beyond 1e15) are left out.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final
from xml.etree import ElementTree

import numpy as np

from octavo.cli.render import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType
    from numpy.typing import NDArray

    from octavo.cli.report_data import CurvePoint, Prediction

Unit = Literal["bytes", "seconds", "bits", ""]
Numbers = Sequence[float | None]

# Colours that stand for variables of the page, which is light or dark.
_INK, _MUTED, _LINE = "#010101", "#020202", "#030303"
_BEFORE, _AFTER, _DAMAGE = "#040404", "#050505", "#060606"
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    _BEFORE: "var(--before)",
    _AFTER: "var(--after)",
    _DAMAGE: "var(--damage)",
}
_STYLE: dict[RcKeyType, object] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.0,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": _MUTED,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": _LINE,
    "grid.linewidth": 0.5,
    "lines.color": _AFTER,
    "xtick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.color": _LINE,
    "ytick.labelcolor": _MUTED,
}
_UNITS: dict[str, tuple[tuple[float, str], ...]] = {
    "bytes": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "seconds": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bits": ((1.0, ""),),
    "": ((1.0, ""),),
}
_LARGEST = 1e15
_WIDE_SPREAD = 30.0
MOST_BARS = 100
_MOST_LABELS, _MOST_CHARACTERS = 12, 40
# Inches; a character is one of the widest usual monospaced fonts at the size of tick labels.
_WIDTH, _ROW, _TOP, _BOTTOM, _GAP, _CHARACTER = 11.0, 0.18, 0.46, 0.22, 0.3, 0.065


@final
@dataclass(frozen=True)
class Bars:
    """One column of bars: `after` on the broader `before`, with its standard error if known."""

    title: str
    after: Numbers
    before: Numbers = ()
    error: Numbers = ()
    unit: Unit = ""
    damage: bool = False


def bars(label: str, names: Sequence[str], columns: Sequence[Bars]) -> str:
    """Columns of horizontal bars, a row for every name, the first on top.

    Rows without a bar are left out; of too many to read, those with the longest bars are drawn.
    Empty where there is no bar at all.
    """
    lengths = {c.title: _longest(c, len(names)) for c in columns}
    columns = [column for column in columns if lengths[column.title].any()]
    if not columns:
        return ""
    shares = [lengths[c.title] / lengths[c.title].max() for c in columns]
    longest = np.max(shares, axis=0)
    rows = np.sort(np.argsort(-longest, kind="stable")[: min(MOST_BARS, np.sum(longest > 0))])
    labels = [_shortened(names[row]) for row in rows]

    def draw(figure: Figure) -> None:
        height = _TOP + _BOTTOM + _ROW * len(rows)
        figure.set_size_inches(_WIDTH, height)
        left = 0.1 + _CHARACTER * max(map(len, labels))
        step = (_WIDTH - left - 0.1 + _GAP) / len(columns)
        bottom, share = _BOTTOM / height, _ROW * len(rows) / height
        for index, column in enumerate(columns):
            at = (left + index * step) / _WIDTH, bottom, (step - _GAP) / _WIDTH, share
            axes = figure.add_axes(at)
            _draw_bars(axes, column, rows)
            for place, name in enumerate(labels if index == 0 else ()):
                _name_row(axes, place, name)

    return _svg(label, draw)


def pareto(points: Sequence[CurvePoint], metric: str) -> str:
    """Damage against bytes and against seconds, the chosen plan marked; empty without points."""
    damage = _finite([point.damage for point in points])
    sides: tuple[tuple[str, Unit, NDArray[np.float64]], ...] = (
        ("size", "bytes", _finite([point.bytes for point in points])),
        ("latency", "seconds", _finite([point.seconds for point in points])),
    )
    sides = tuple(side for side in sides if np.isfinite(side[2] + damage).any())
    chosen = np.array([point.chosen for point in points], bool)

    def draw(figure: Figure) -> None:
        figure.set_size_inches(_WIDTH, 3.3)
        for index, (title, unit, costs) in enumerate(sides):
            axes = figure.add_axes((0.08 + 0.5 * index, 0.14, 0.41, 0.8))
            known = np.isfinite(costs + damage)
            scale, name = _unit(costs, unit)
            _draw_curve(axes, costs[known] / scale, damage[known], chosen[known])
            axes.set_xlabel(f"{title}, {name}")
        figure.axes[0].set_ylabel(_shortened(metric))

    return _svg(f"Pareto curve of {metric}", draw) if sides else ""


def scatter(predictions: Sequence[Prediction]) -> str:
    """Predicted against measured seconds with the diagonal; empty where nothing is positive."""
    predicted = _finite([p.predicted_seconds for p in predictions])
    measured = _finite([p.measured_seconds for p in predictions])
    known = np.flatnonzero((predicted > 0) & (measured > 0))
    if not known.size:
        return ""
    names = [_shortened(predictions[int(at)].name) for at in known]
    scale, unit = _unit(np.maximum(predicted, measured)[known], "seconds")
    x, y = predicted[known] / scale, measured[known] / scale
    low, high = min(x.min(), y.min()), max(x.max(), y.max())

    def draw(figure: Figure) -> None:
        figure.set_size_inches(5.2, 4.4)
        axes = figure.add_axes((0.12, 0.11, 0.84, 0.85))
        wide = high > _WIDE_SPREAD * low
        limits = (low / 1.6, high * 1.6) if wide else (0.0, high * 1.12)
        for scaled in "xy" if wide else "":
            _logarithmic(axes, scaled)
        axes.plot(limits, limits, color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.plot(x, y, "o", color=_AFTER, markersize=5)
        axes.set(xlim=limits, ylim=limits)
        if len(names) <= _MOST_LABELS:
            _name_points(axes, names, x, y)
        axes.set(xlabel=f"predicted, {unit}", ylabel=f"measured, {unit}")

    return _svg("predicted against measured seconds", draw)


def _draw_bars(axes: Axes, column: Bars, rows: NDArray[np.intp]) -> None:
    count = int(rows[-1]) + 1
    scale, unit = _unit(_longest(column, count)[rows], column.unit)
    before, after, error = (
        _finite(values, count)[rows] / scale
        for values in (column.before, column.after, column.error)
    )
    places = np.arange(len(rows))
    color, width = _DAMAGE if column.damage else _AFTER, 5.0 if len(column.before) else 8.0
    for ends, shade, breadth in ((before, _BEFORE, 9.5), (after, color, width)):
        drawn = np.flatnonzero(np.nan_to_num(ends))
        axes.hlines(places[drawn], 0, ends[drawn], colors=shade, linewidth=breadth)
    spread = np.flatnonzero(np.nan_to_num(error * after))
    low, high = (after - error)[spread], (after + error)[spread]
    axes.hlines(places[spread], low, high, colors=_INK, linewidth=0.9)
    reach = np.concatenate([before, after, [0.0]])
    axes.set(xlim=(np.nanmin(reach) * 1.05, np.nanmax(reach) * 1.05))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title(f"{column.title}, {unit}" if unit else column.title, pad=16)
    if column.unit == "bits":
        axes.set_xticks([bits for bits in (0, 4, 8, 16, 32) if bits <= axes.get_xlim()[1]])
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(_plain)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.axvline(0, color=_MUTED, linewidth=0.7)
    axes.tick_params(length=0, labeltop=True, labelbottom=len(rows) > 25)
    axes.set_yticks(())


def _name_row(axes: Axes, place: int, name: str) -> None:
    """A name left of its bars; a tick would draw the same, but takes four times as long."""
    axes.annotate(
        name,
        (0, place),
        (-4, 0),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="center",
        family="monospace",
        size=7.5,
    )


def _draw_curve(
    axes: Axes,
    costs: NDArray[np.float64],
    damage: NDArray[np.float64],
    chosen: NDArray[np.bool_],
) -> None:
    order = np.lexsort((damage, costs))
    costs, damage, chosen = costs[order], damage[order], chosen[order]
    above = damage[damage > 0]
    if above.size and damage.max() > _WIDE_SPREAD * above.min():
        _logarithmic(axes, "y", 0.0 if above.size == damage.size else float(above.min()))
    axes.plot(costs, damage, "-", color=_AFTER, linewidth=1.2)
    axes.plot(costs[~chosen], damage[~chosen], "o", color=_AFTER, markersize=4.5)
    for at in np.flatnonzero(chosen):
        axes.plot(costs[at], damage[at], "o", color=_DAMAGE, markersize=8)
        # Better plans lie below and to the left, where a curve of the best has no points.
        axes.annotate(
            "chosen",
            (costs[at], damage[at]),
            (8, 8),
            textcoords="offset points",
            color=_INK,
        )
    axes.margins(0.12, 0.12)
    axes.xaxis.set_major_formatter(_plain)
    axes.yaxis.set_major_formatter(_plain)
    axes.tick_params(length=0)


def _name_points(
    axes: Axes, names: Sequence[str], x: NDArray[np.float64], y: NDArray[np.float64]
) -> None:
    """Names beside points, on the side with more room, moved up where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    free = {"left": 0.0, "right": 0.0}
    for at in np.argsort(y, kind="stable"):
        right, up = to_axes.transform((x[at], y[at]))
        aligned: Literal["left", "right"] = "left" if right < 0.5 else "right"
        up = free[aligned] = max(float(up), free[aligned] + 0.04)
        side = 0.02 if aligned == "left" else -0.02
        axes.text(right + side, up, names[at], transform=axes.transAxes, ha=aligned, va="center")


def _logarithmic(axes: Axes, which: str, linear_below: float = 0.0) -> None:
    """A logarithmic axis with plain numbers; linear near zero where zero must be on it."""
    from matplotlib.ticker import NullFormatter

    if linear_below:
        axes.set_yscale("symlog", linthresh=linear_below)
    elif which == "x":
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(_plain)
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: float) -> str:
    return f"{value:g}"


def _longest(column: Bars, count: int) -> NDArray[np.float64]:
    """The length of the longer bar of every row, zero where there is none."""
    sides = [_finite(values, count) for values in (column.before, column.after)]
    longest: NDArray[np.float64] = np.max(np.abs(np.nan_to_num(sides)), axis=0)
    return longest


def _finite(values: Numbers, count: int | None = None) -> NDArray[np.float64]:
    """Numbers with NaN for all that cannot be drawn, filled up or cut to `count`."""
    known = np.array([np.nan if value is None else float(value) for value in values], np.float64)
    known[~(np.abs(known) <= _LARGEST)] = np.nan
    if count is None:
        return known
    return np.concatenate([known[:count], np.full(max(count - len(known), 0), np.nan)])


def _unit(values: NDArray[np.float64], unit: Unit) -> tuple[float, str]:
    """The unit in which the largest number is at least one, and its name."""
    largest = np.nanmax(np.abs(values), initial=0.0)
    return next((u for u in _UNITS[unit] if largest >= u[0]), _UNITS[unit][-1])


def _shortened(name: str) -> str:
    """A name that fits beside bars: its middle is left out first."""
    text = " ".join(printable(name).split())
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: half - 1]}…{text[-half:]}"


def _svg(label: str, draw: Callable[[Figure], None]) -> str:
    """The element that `draw` fills; the settings of whoever else uses matplotlib are kept."""
    import matplotlib
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings(), np.errstate(all="ignore"):
        # A name may hold glyphs that the font lacks: the browser has others.
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        # The ids of two figures on one page differ.
        matplotlib.rcParams["svg.hashsalt"] = label
        figure = Figure()
        draw(figure)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _inline(ElementTree.fromstring(file.getvalue()), label)


def _inline(root: ElementTree.Element, label: str) -> str:
    """A figure as an element of an HTML page."""
    for parent in root.iter():
        parent.tag = parent.tag.rpartition("}")[2]
        for child in [c for c in parent if c.tag.rpartition("}")[2] in ("metadata", "style")]:
            parent.remove(child)
        if parent.tag == "g":
            parent.attrib.pop("id", None)
        for key in [key for key in parent.attrib if key.startswith("{")]:
            parent.set(key.rpartition("}")[2], parent.attrib.pop(key))
        if "style" in parent.attrib:
            parent.set("style", _style(parent.attrib["style"]))
    width = float(root.attrib["width"].removesuffix("pt")) * 4 / 3
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    root.set("style", f"max-width: {width:.0f}px")
    return ElementTree.tostring(root, encoding="unicode").strip()


def _style(text: str) -> str:
    """A style with variables for colours, and with the fonts of the page."""
    kept = []
    for declaration in text.split("; "):
        if declaration.startswith("font-family"):
            # All other text inherits the font of the page.
            kept += ["font-family: var(--mono)"] if "monospace" in declaration else []
        else:
            kept.append(re.sub(r"#0\d0\d0\d", lambda color: _VARIABLES[color[0]], declaration))
    return "; ".join(kept)
