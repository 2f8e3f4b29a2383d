"""`octavo sensitivity`: what compressing every group does to the outputs, by several estimators."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

import typer

from octavo.cli.compile_options import ModelFile, Preprocess, UseCache
from octavo.cli.render import (
    AsJson,
    format_bytes,
    format_seconds,
    print_json,
    print_message,
    print_table,
)
from octavo.ir.errors import NotDifferentiable, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from octavo.cli.progress import Progress
    from octavo.ir.backend import Backend
    from octavo.ir.calibration import Batches
    from octavo.ir.menu import Menu, Offer, Sensitivity
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

_ALL = "all"
_TRUTH = "measured"
_RANDOM_FEEDS = 8

Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        "-c",
        help="Inputs, as octavo compile takes them, labels too; without them random numbers.",
    ),
]
Estimators = Annotated[
    str,
    typer.Option(
        help="measured, fisher, lampq, hessian, layer-error, lim, weight-error, zd, separated by "
        "commas, or all."
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Samples at most.")]
Bits = Annotated[int, typer.Option(min=2, max=8, help="Weight bits that damage is shown at.")]
KeepFloat = Annotated[
    list[str] | None,
    typer.Option(help="Nodes to leave alone: a name, a glob, re:… or type:Conv; repeatable."),
]
Shape = Annotated[
    list[str] | None,
    typer.Option(help="Input shape of random numbers, as NAME=1x3x224x224; repeatable."),
]
TargetName = Annotated[str, typer.Option(help="What to compile for; see octavo targets list.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]


def sensitivity(
    model: ModelFile,
    calibration: Calibration = "",
    preprocess: Preprocess = "",
    estimator: Estimators = _TRUTH,
    samples: Samples = 64,
    bits: Bits = 4,
    keep_float: KeepFloat = None,
    target: TargetName = "ort-cpu",
    shape: Shape = None,
    seed: Seed = 0,
    cache: UseCache = True,
    as_json: AsJson = False,
) -> None:
    """Estimate what low-bit weights of every group of nodes do to the outputs.

    Ranks start with the group that is damaged most. Estimators are compared by Spearman's rank
    correlation with the measured damage.
    """
    from octavo.cli.bench_command import parse_shapes
    from octavo.cli.progress import progress_bars
    from octavo.cli.target import backend_of

    backend = backend_of(target)
    names = _names(estimator)
    work = _Work(
        calibration, preprocess, samples, bits, tuple(keep_float or ()), backend,
        parse_shapes(shape or ()), seed, cache,
    )  # fmt: skip
    with progress_bars() as progress:
        found = work.run(model, names, skip=estimator == _ALL, progress=progress)
    if as_json:
        print_json(found.json())
    else:
        _print(found)


@final
@dataclass(frozen=True)
class _Work:
    """What is asked, apart from the model and the estimators."""

    calibration: str
    preprocess: str
    samples: int
    bits: int
    keep_float: tuple[str, ...]
    backend: Backend
    shapes: Mapping[str, Sequence[int]]
    seed: int
    cache: bool

    def run(self, path: Path, names: Sequence[str], *, skip: bool, progress: Progress) -> _Found:
        """Run the estimators; with `skip`, those that the model has no gradients for are noted."""
        from octavo.ir.menu import Menu
        from octavo.ir.read import read
        from octavo.passes.canonicalize import Canonicalize
        from octavo.passes.estimators import estimator
        from octavo.passes.offer_options import OfferOptions
        from octavo.passes.pipeline import Pipeline

        source = read(path)
        batches, notes = self._batches(source)
        bits = tuple(sorted({*OfferOptions().bits, self.bits}, reverse=True))
        offer = OfferOptions(bits=bits, static=False, keep_float=self.keep_float)
        found: list[Sensitivity] = []
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as executor:
            ctx = self._context(Path(folder), executor, progress)
            model = Pipeline((Canonicalize(), offer)).run(source, ctx).model
            shown = _shown(model.fact(Menu), self.bits, path)
            for name in names:
                try:
                    found.append(estimator(name)(model, ctx, batches, self.samples, "auto"))
                except NotDifferentiable as error:
                    if not skip:
                        raise
                    notes.append(f"{name}: {error.what}")
        return _Found(path, model.fact(Menu), self.bits, shown, tuple(found), tuple(notes))

    def _context(
        self, folder: Path, executor: ThreadPoolExecutor, progress: Progress
    ) -> PassContext:
        from octavo.ir.cache import Cache, default_folder
        from octavo.ir.cost import AnalyticCost
        from octavo.passes.base import PassContext

        return PassContext(
            target=self.backend.target,
            cost=AnalyticCost(self.backend.target),
            evaluator=self.backend.evaluator(),
            executor=executor,
            workdir=folder,
            seed=self.seed,
            cache=Cache(default_folder()) if self.cache else None,
            progress=progress,
        )

    def _batches(self, source: Model) -> tuple[Batches, list[str]]:
        """The data, and what a user should know of it."""
        from octavo.cli.calibration_data import load_calibration
        from octavo.cli.preprocess import Preprocess
        from octavo.cli.stand_in import stand_in

        if not self.calibration:
            count = min(self.samples, _RANDOM_FEEDS)
            note = f"no calibration data: damage is estimated on {count} random samples"
            return stand_in(source, self.shapes, self.seed, count), [note]
        how = Preprocess.parse(self.preprocess) if self.preprocess else None
        data = load_calibration(self.calibration, source, how)
        return data, list(getattr(data, "warnings", ()))


@final
@dataclass(frozen=True)
class _Found:
    """What the estimators say of the groups that hold weights.

    `shown` are the offers, by group, that the table gives the damage of.
    """

    path: Path
    menu: Menu
    bits: int
    shown: Mapping[str, Offer]
    found: tuple[Sensitivity, ...]
    notes: tuple[str, ...]

    @property
    def groups(self) -> list[str]:
        """Groups that hold weights, in topological order."""
        return _weighted(self.menu)

    def ranks(self, of: Sensitivity) -> dict[str, int]:
        """Place of every group by its damage, 1 for the largest."""
        damages = {name: of.damage(name, offer.name).mean for name, offer in self.shown.items()}
        return {n: 1 + sum(o > d for o in damages.values()) for n, d in damages.items()}

    def agreement(self, of: Sensitivity, offers: Mapping[str, Sequence[Offer]]) -> float | None:
        """Spearman's rank correlation with the measured damage over some offers."""
        from octavo.cli.report_data import rank_correlation

        truth = next((s for s in self.found if s.estimator == _TRUTH), None)
        if truth is None or truth is of:
            return None
        pairs = [(group, offer.name) for group, some in offers.items() for offer in some]
        return rank_correlation(
            [of.damage(*pair).mean for pair in pairs], [truth.damage(*pair).mean for pair in pairs]
        )

    def agreements(self, of: Sensitivity) -> tuple[float | None, float | None]:
        """Spearman's over the groups at the bits that are shown, and over all offers but float."""
        shown = {name: (offer,) for name, offer in self.shown.items()}
        return self.agreement(of, shown), self.agreement(
            of, {name: self.menu.offers[name][1:] for name in self.groups}
        )

    def json(self) -> dict[str, object]:
        """Everything, also what the tables leave out."""
        return {
            "model": str(self.path),
            "bits": self.bits,
            "notes": list(self.notes),
            "groups": [self._group(name) for name in self.groups],
            "estimators": [self._estimator(found) for found in self.found],
        }

    def _group(self, name: str) -> dict[str, object]:
        group, offers = self.menu.groups[name], self.menu.offers[name]
        shown = self.shown.get(name)
        return {
            "group": name,
            "role": group.role,
            "nodes": list(group.nodes),
            "reason": group.reason,
            "bytes": offers[0].bytes,
            "offer": shown.name if shown is not None else None,
            "offers": {
                offer.name: {
                    found.estimator: {
                        "damage": found.damage(name, offer.name).mean,
                        "standard_error": found.damage(name, offer.name).standard_error,
                    }
                    for found in self.found
                }
                for offer in offers
            },
        }

    def _estimator(self, found: Sensitivity) -> dict[str, object]:
        at_bits, overall = self.agreements(found)
        return {
            "estimator": found.estimator,
            "seconds": found.seconds,
            "samples": found.samples,
            "metric": found.metric,
            "ranks": self.ranks(found),
            "spearman_at_bits": at_bits,
            "spearman": overall,
        }


def _weighted(menu: Menu) -> list[str]:
    return [name for name, offers in menu.offers.items() if offers[0].bytes]


def _shown(menu: Menu, bits: int, path: Path) -> dict[str, Offer]:
    """The offer of every group that its damage is shown of: float compute before integer."""
    from octavo.passes.type_scale import weight_bits

    shown: dict[str, Offer] = {}
    for name in _weighted(menu):
        fitting = [offer for offer in menu.offers[name] if weight_bits(offer) == bits]
        stored = [offer for offer in fitting if offer.name.startswith("storage")]
        if fitting:
            shown[name] = (stored or fitting)[0]
    if not shown:
        message = f"no group can have {bits}-bit weights"
        raise UsageError(message, where=str(path), hint="octavo inspect names the nodes")
    return shown


def _names(text: str) -> list[str]:
    """The estimators that were asked for, the measured one first; UnknownName, near misses."""
    from octavo.passes.estimators import ESTIMATORS, estimator

    given = [part.strip() for part in text.split(",") if part.strip()]
    if not given:
        message = "no estimator is named"
        raise UsageError(message, hint=f"known: {', '.join(ESTIMATORS)} and {_ALL}")
    names = list(ESTIMATORS) if given == [_ALL] else given
    for name in names:
        estimator(name)
    return sorted(dict.fromkeys(names), key=lambda name: name != _TRUTH)


def _print(found: _Found) -> None:
    for note in found.notes:
        print_message(f"note: {note}")
    ranks = {s.estimator: found.ranks(s) for s in found.found}
    columns = ["group", "role", "nodes", "bytes"]
    for one in found.found:
        columns += [one.estimator, *(["±"] if one.estimator == _TRUTH else []), "rank"]
    rows = []
    for name in found.groups:
        group = found.menu.groups[name]
        size = format_bytes(found.menu.offers[name][0].bytes)
        shown = found.shown.get(name)
        row: list[object] = [name, group.role, len(group.nodes), size]
        for one in found.found:
            damage = one.damage(name, shown.name) if shown is not None else None
            row.append(_number(damage and damage.mean))
            if one.estimator == _TRUTH:
                row.append(_number(damage and damage.standard_error))
            row.append(ranks[one.estimator].get(name, ""))
        rows.append(row)
    print_table(columns, rows, title=f"damage of {found.bits}-bit weights")
    print_table(
        ("estimator", "seconds", "samples", "metric", f"Spearman, {found.bits} bits", "Spearman"),
        [
            (
                one.estimator,
                format_seconds(one.seconds),
                one.samples or "",
                one.metric,
                *(f"{value:.3f}" if value is not None else "" for value in found.agreements(one)),
            )
            for one in found.found
        ],
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"
