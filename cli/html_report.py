"""`report.html`: a compilation on one page that needs no network, light or dark, on paper too.

It holds measured seconds, so it is no part of what a manifest hashes; the same data give the
same bytes. A plot that cannot be drawn leaves a sentence where it would be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, final

from octavo.cli import render
from octavo.cli.html_template import PAGE, STYLE

if TYPE_CHECKING:
    from pathlib import Path

    from octavo.cli.report_data import GroupRow, LayerRow, Prediction, Ranking, ReportData
    from octavo.passes.record import PassRecord

REPORT = "report.html"
_LONG_TABLE = 30
_NAME, _CODE, _NUMBER, _TEXT = "name", "code", "number", "text"
_REMARK = (("", _TEXT), ("where", _NAME), ("remark", _TEXT), ("values", _TEXT))
_BEFORE_AFTER = (("before", "source"), ("after", "artifact"))


@final
@dataclass(frozen=True)
class _Plot:
    svg: str
    caption: str
    keys: tuple[tuple[str, str], ...] = ()
    kind: ClassVar[str] = "plot"


@final
@dataclass(frozen=True)
class _Table:
    """Columns are titles with a style; `marked` are the numbers of the rows that stand out."""

    columns: tuple[tuple[str, str], ...]
    rows: Sequence[tuple[str, ...]]
    summary: str = ""
    marked: frozenset[int] = field(default_factory=frozenset)
    kind: ClassVar[str] = "table"

    @property
    def folded(self) -> bool:
        return bool(self.summary)


@final
@dataclass(frozen=True)
class _Facts:
    facts: Mapping[str, str]
    kind: ClassVar[str] = "facts"


@final
@dataclass(frozen=True)
class _Texts:
    texts: Sequence[str]
    kind: ClassVar[str] = "texts"


_Block = _Plot | _Table | _Facts | _Texts


@final
@dataclass(frozen=True)
class _Section:
    title: str
    blocks: Sequence[_Block]


def write_report(data: ReportData, path: Path) -> None:
    """Write the page."""
    path.write_text(html(data), encoding="utf-8")


def html(data: ReportData) -> str:
    """The page as text: every name is escaped, nothing outside the page is referred to."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=_printable,
    )
    sections = [section for section in _sections(data) if section.blocks]
    return environment.from_string(PAGE).render(
        title=data.title,
        subtitle=_subtitle(data),
        style=STYLE,
        tiles=_tiles(data),
        sections=sections,
        footer="Written by octavo.",
    )


def _printable(value: object) -> object:
    """Control characters escaped, but not in what is markup already."""
    return render.printable(value) if type(value) is str else value


def _subtitle(data: ReportData) -> str:
    target = data.config.get("target", "")
    return f"compiled for {target}" if target else "compiled"


def _tiles(data: ReportData) -> list[tuple[str, str]]:
    """The figures that matter most, each with what it is."""
    facts = [(value, name) for name, value in data.facts.items()]
    if not data.files:
        return facts
    source, artifact = data.files[0], data.files[-1]
    size = f"{_percent(artifact.bytes, source.bytes)} of {_bytes(source.bytes)}"
    if not artifact.speed:
        return [(_bytes(artifact.bytes), size), *facts]
    time = f"{artifact.speed:.2f}x as fast as {_seconds(source.median_seconds)}"
    return [(_bytes(artifact.bytes), size), (_seconds(artifact.median_seconds), time), *facts]


def _sections(data: ReportData) -> Iterator[_Section]:
    yield _Section("", [*_files(data), *([_Texts(data.notes)] if data.notes else [])])
    yield _Section("Plan", list(_plan(data)))
    yield _Section("Sensitivity", list(_sensitivity(data)))
    yield _Section("Layers", list(_layers(data)))
    yield _Section("Passes", list(_passes(data.passes)))
    yield _Section("Request", [_Facts(data.config)] if data.config else [])


def _files(data: ReportData) -> Iterator[_Block]:
    if not data.files:
        return
    columns = [("file", _NAME)]
    columns += [(t, _NUMBER) for t in ("size", "of source", "median", "10 to 90 %", "speed")]
    rows = [
        (
            row.file,
            _bytes(row.bytes),
            _percent(row.bytes, data.files[0].bytes),
            _seconds(row.median_seconds or None),
            f"{_seconds(row.low_seconds)} to {_seconds(row.high_seconds)}" if row.speed else "",
            f"{row.speed:.2f}x" if row.speed else "",
        )
        for row in data.files
    ]
    yield _Table(tuple(columns), rows)


def _plan(data: ReportData) -> Iterator[_Block]:
    """What the planner decided: the plan among others, bits and damage of every group."""
    from octavo.cli import plots

    if data.solution:
        yield _Facts(data.solution)
    yield from _plotted(
        lambda: plots.pareto(data.curve, data.metric),
        f"Predicted {data.metric} of the plans that no other plan beats, against their size and "
        "latency.",
    )
    yield from _plotted(
        lambda: plots.bars(
            "bits and damage of every group",
            [group.name for group in data.groups],
            [
                plots.Bars("bits per weight", [g.bits for g in data.groups], unit="bits"),
                plots.Bars(
                    "damage",
                    [group.damage for group in data.groups],
                    error=[group.standard_error for group in data.groups],
                    damage=True,
                ),
            ],
        ),
        f"Decision groups in topological order{_cut(data.groups)}. Damage is {data.metric}, with "
        "its standard error.",
    )
    yield from _group_table(data.groups)
    yield from _plotted(
        lambda: plots.scatter(data.predictions),
        "Predicted against measured latency; a perfect prediction lies on the line.",
    )
    if data.predictions:
        columns = (("model", _NAME), *((t, _NUMBER) for t in ("predicted", "measured", "error")))
        yield _table(columns, [_prediction_row(p) for p in data.predictions], "predictions")


def _group_table(groups: Sequence[GroupRow]) -> Iterator[_Block]:
    columns = (
        *(("group", _NAME), ("nodes", _NUMBER), ("option", _CODE), ("bits", _NUMBER)),
        *(("bytes", _NUMBER), ("time", _NUMBER), ("damage", _NUMBER), ("together because", _TEXT)),
    )
    rows = [
        (
            group.name,
            str(group.nodes),
            group.option,
            _number(group.bits),
            _bytes(group.bytes),
            _seconds(group.seconds),
            _number(group.damage),
            group.reason,
        )
        for group in groups
    ]
    if rows:
        yield _table(columns, rows, "groups")


def _prediction_row(prediction: Prediction) -> tuple[str, ...]:
    predicted, measured = prediction.predicted_seconds, prediction.measured_seconds
    error = 100 * (predicted - measured) / measured if measured else math.nan
    shown = f"{error:+.1f} %" if math.isfinite(error) else ""
    return prediction.name, _seconds(predicted), _seconds(measured), shown


def _sensitivity(data: ReportData) -> Iterator[_Block]:
    """Estimators side by side: how they order the groups, and how right they are."""
    if data.rankings:
        yield from _estimators(data)
    values = sorted(data.activations.items(), key=lambda item: -item[1].mean)
    if values:
        rows = [(n, _number(d.mean), _number(d.standard_error)) for n, d in values]
        columns = (("quantized value", _NAME), ("damage", _NUMBER), ("standard error", _NUMBER))
        yield _table(columns, rows, "quantized values, the most sensitive first")


def _estimators(data: ReportData) -> Iterator[_Block]:
    yield _Table(
        (
            *(("estimator", _TEXT), ("metric", _TEXT)),
            *(("rank correlation with measured", _NUMBER), ("time", _NUMBER)),
        ),
        [
            (r.estimator, r.metric, _number(r.rank_correlation), _seconds(r.seconds))
            for r in data.rankings
        ],
    )
    ranks = [_ranks(ranking) for ranking in data.rankings]
    names = list(dict.fromkeys(name for ranking in data.rankings for name in ranking.damage))
    names.sort(key=lambda name: ranks[0].get(name, len(names) + 1))
    yield _table(
        (("group", _NAME), *((r.estimator, _NUMBER) for r in data.rankings)),
        [
            (name, *(_ranked(name, *pair) for pair in zip(data.rankings, ranks, strict=True)))
            for name in names
        ],
        "groups, the most sensitive first",
    )


def _ranks(ranking: Ranking) -> dict[str, int]:
    """Places from 1, the most damage first."""
    known = [name for name, damage in ranking.damage.items() if math.isfinite(damage)]
    known.sort(key=lambda name: -ranking.damage[name])
    return {name: place for place, name in enumerate(known, 1)}


def _ranked(name: str, ranking: Ranking, ranks: Mapping[str, int]) -> str:
    return f"{_number(ranking.damage[name])} (#{ranks[name]})" if name in ranks else ""


def _layers(data: ReportData) -> Iterator[_Block]:
    from octavo.cli import plots

    layers = data.layers
    weights = plots.Bars(
        "weights",
        [layer.weight_bytes for layer in layers],
        [layer.source_bytes for layer in layers],
        unit="bytes",
    )
    times = plots.Bars(
        "time",
        [layer.seconds for layer in layers],
        [layer.source_seconds for layer in layers],
        unit="seconds",
    )
    source = f" Times of the source: {data.cost_source}." if data.cost_source else ""
    yield from _plotted(
        lambda: plots.bars("layers", [layer.name for layer in layers], [weights, times]),
        f"Weights and time of layers{_cut(layers)}, before and after.{source}",
        _BEFORE_AFTER,
    )
    if layers:
        yield _layer_table(layers)


def _layer_table(layers: Sequence[LayerRow]) -> _Table:
    columns = (
        *(("layer", _NAME), ("operator", _TEXT), ("option", _CODE), ("kernel", _NAME)),
        *((title, _NUMBER) for title in ("source bytes", "bytes", "source time", "time")),
        ("why", _TEXT),
    )
    rows = [
        (
            layer.name,
            layer.op_type,
            layer.option,
            f"{layer.kernel} (not as planned)" if layer.ok is False else layer.kernel,
            _bytes(layer.source_bytes or None),
            _bytes(layer.weight_bytes or None),
            _seconds(layer.source_seconds),
            _seconds(layer.seconds),
            layer.reason,
        )
        for layer in layers
    ]
    wrong = frozenset(at for at, layer in enumerate(layers) if layer.ok is False)
    return _table(columns, rows, "layers", wrong)


def _passes(records: Sequence[PassRecord]) -> Iterator[_Block]:
    columns = (
        *(("pass", _NAME), ("status", _TEXT), ("time", _NUMBER), ("peak memory", _NUMBER)),
        *(("nodes", _NUMBER), ("weights", _NUMBER), ("counted", _TEXT)),
    )
    rows = [
        (
            record.spec,
            record.status,
            _seconds(record.seconds),
            _bytes(record.peak_bytes or None),
            str(sum(record.after.nodes.values())),
            _bytes(record.after.weight_bytes),
            ", ".join(f"{name} {count}" for name, count in record.counters.items()),
        )
        for record in records
    ]
    if rows:
        yield _Table(columns, rows)
    for record in records:
        remarks = [
            (r.kind, r.where, r.text, ", ".join(f"{k} {v}" for k, v in r.values.items()))
            for r in record.remarks
        ]
        if remarks:
            name = record.spec.partition("{")[0]
            yield _Table(
                _REMARK, remarks, f"{name}: {len(remarks)} remark{'s' * (len(remarks) > 1)}"
            )


def _table(
    columns: tuple[tuple[str, str], ...],
    rows: Sequence[tuple[str, ...]],
    what: str,
    marked: frozenset[int] = frozenset(),
) -> _Table:
    """A table that is folded where it is long."""
    summary = f"{len(rows)} {what}" if len(rows) > _LONG_TABLE else ""
    return _Table(columns, rows, summary, marked)


def _plotted(
    draw: Callable[[], str], caption: str, keys: tuple[tuple[str, str], ...] = ()
) -> Iterator[_Block]:
    """A plot, nothing where there is nothing to draw, or why it could not be drawn."""
    try:
        svg = draw()
    # A picture is not worth the compilation it describes, whatever went wrong in drawing it.
    except Exception as error:
        yield _Texts([f"not drawn: {caption} ({type(error).__name__})"])
    else:
        if svg:
            yield _Plot(svg, caption, keys)


def _cut(rows: Sequence[object]) -> str:
    from octavo.cli.plots import MOST_BARS

    return f", the {MOST_BARS} with the longest bars" if len(rows) > MOST_BARS else ""


def _bytes(count: float | None) -> str:
    return render.format_bytes(int(count)) if count is not None and math.isfinite(count) else ""


def _seconds(seconds: float | None) -> str:
    return render.format_seconds(seconds) if seconds is not None and math.isfinite(seconds) else ""


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def _number(value: float | None) -> str:
    return f"{value:.3g}" if value is not None and math.isfinite(value) else ""
