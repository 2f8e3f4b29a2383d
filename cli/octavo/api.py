"""The public verbs `octavo.compile`, `octavo.load` and `octavo.package`; the CLI wraps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

if TYPE_CHECKING:
    from octavo.cli.compilation import Compiled
    from octavo.cli.packaging import Packaged
    from octavo.cli.request import Request
    from octavo.ir.backend import Session
    from octavo.ir.cache import Cache
    from octavo.ir.calibration import Batches
    from octavo.ir.model import Model


class Budgets(TypedDict, total=False):
    """What a plan must keep to, as on the command line; see `octavo compile --help`.

    `size` ("25%", "4.9MB"), `latency` ("3ms", "0.5x"), `memory`, `bops` and `max_damage` are the
    most that may be used; to minimise size or latency, give `max_damage`. `max_drop` ("1%", or
    "0.01") asks for the smallest or fastest artifact (`goal`) whose metric falls by no more on
    held-out samples: top-1 accuracy by the labels of the data, or the function that `metric` names
    ("module:function"). `profile` is the path of a recorded table, `refine_seconds` bounds the
    search around the plan, `estimator` says how damage is found. With `structure`, budgets choose
    fewer channels, neurons and heads as well as bits. `top_k` plans and `pareto` points
    of the curve of damage against size are kept.
    """

    size: str
    latency: str
    memory: str
    bops: str
    max_damage: float | None
    max_drop: str
    metric: str
    goal: Literal["smallest", "fastest"]
    profile: str
    structure: bool
    refine_seconds: float
    estimator: str
    top_k: int
    pareto: int


def compile(  # noqa: A001  (the public verb; nothing here needs the builtin)
    model: object,
    *,
    target: str = "ort-cpu",
    calibration: object = None,
    preprocess: str = "",
    pipeline: str = "",
    keep_float: Sequence[str] = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
    threads: int = 1,
    seed: int = 0,
    measure: bool = True,
    max_recurrent_error: float = 0.02,
    min_agreement: float = 0.6,
    portable: bool = False,
    cache: Cache | None = None,
    minimise: Literal["damage", "size", "latency"] = "damage",
    **budgets: Unpack[Budgets],
) -> Compiled:
    """Compile a model and return it with its evidence; `.save("out/")` writes the artifact.

    `model` is a path, a `Model` of `octavo.read`, or a torch program. `calibration` is a path
    (`.npz`, folder), a mapping of arrays whose first axis counts samples, an iterable of feeds, or
    "synthetic" or "analytic" where there is no data. `pipeline` is a preset or a pipeline text,
    empty for the preset the data allows. `shapes` gives input shapes to measure latency with;
    `max_recurrent_error` and `min_agreement` bound what dynamic kernels may change, `portable`
    leaves only weights that OpenVINO and TensorRT execute too (see `Request`).

    With `budgets` (see `Budgets`) or goals one plan decides for the whole graph, and `minimise` is
    what it makes least; what a goal misses is in `Compiled.missed`. Raises OctavoError,
    BudgetInfeasible among them.
    """
    from octavo.cli.request import Request
    from octavo.ir.read import read

    source = read(model)
    request = Request(
        target=target,
        pipeline=pipeline,
        keep_float=tuple(keep_float),
        shapes=shapes,
        threads=threads,
        seed=seed,
        measure=measure,
        max_recurrent_error=max_recurrent_error,
        min_agreement=min_agreement,
        portable=portable,
        objective=minimise,
        **budgets,
    )
    if isinstance(calibration, str) and calibration in ("synthetic", "analytic"):
        return _without_data(calibration, model, source, request, cache)
    return _with_data(calibration, preprocess, source, request, cache)


def _with_data(
    calibration: Any, preprocess: str, source: Model, request: Request, cache: Cache | None
) -> Compiled:
    from octavo.cli.compilation import compile_model

    batches = None if calibration is None else _batches(calibration, source, preprocess)
    return compile_model(source, calibration=batches, request=request, cache=cache)


def _without_data(
    named: str, given: object, source: Model, request: Request, cache: Cache | None
) -> Compiled:
    """Compile with data made from the model, or with ranges that rest on none."""
    from octavo.cli.compilation import compile_model
    from octavo.cli.synthetic_data import Maker, chosen
    from octavo.cli.synthetic_options import SyntheticOptions

    file = Path(given) if isinstance(given, str | Path) else Path(source.source.name)
    how = SyntheticOptions().synthesis(file)
    maker = Maker(source, request.target, request.seed, cache, lambda label, done, total: None)
    data = chosen(named, maker, how, request)
    compiled = compile_model(source, calibration=data.batches, request=data.request, cache=cache)
    return replace(compiled, notes=(*compiled.notes, *data.notes))


def _batches(calibration: Any, source: Model, preprocess: str) -> Batches:
    from octavo.cli.calibration_data import load_calibration
    from octavo.cli.preprocess import Preprocess

    how = Preprocess.parse(preprocess) if preprocess else None
    return load_calibration(calibration, source, how)


def load(folder: str | Path, *, threads: int = 1) -> Session:
    """A session of an artifact or package folder, with the session options it relies on.

    Its runtime is that of the target: ONNX Runtime, or OpenVINO.
    """
    from octavo.cli.target import DEFAULT, backend_of
    from octavo.ir.artifact_io import read_artifact
    from octavo.ir.package_io import is_package, read_package

    folder = Path(folder)
    if is_package(folder):
        packed, backend = read_package(folder), backend_of(DEFAULT)
        return backend.open(folder / packed.model, threads=threads, config=packed.session_options)
    artifact = read_artifact(folder).artifact
    options = artifact.session_options
    return backend_of(artifact.target).open(artifact.path, threads=threads, config=options)


def package(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    any_processor: bool = False,
    force: bool = False,
) -> Packaged:
    """Write an artifact folder as a device gets it, by default to FOLDER/package.

    See `octavo package --help`. Raises OctavoError.
    """
    from octavo.cli.packaging import package_artifact

    where = None if output is None else Path(output)
    return package_artifact(Path(folder), where, any_processor=any_processor, force=force)
