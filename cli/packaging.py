"""What a device gets: the model in the runtime's own format, examples, and a probe to check by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.backends.ort_package import (
    RUNTIME,
    load_seconds,
    required_kernels,
    runs_on,
    write_ort,
)
from octavo.cli.package_examples import CPP_FILE, PYTHON, PYTHON_FILE, cpp
from octavo.ir.artifact_io import MODEL, read_artifact
from octavo.ir.errors import UsageError, VerificationFailed
from octavo.ir.output_folder import open_output
from octavo.ir.package_io import KERNELS, ORT_MODEL, PACKAGE, Package, PackedTensor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from octavo.ir.artifact import Artifact
    from octavo.ir.calibration import Feed

FOLDER = "package"
_PROBE = "probe"
_BUILD = (
    "./build.sh --config MinSizeRel --build_shared_lib --parallel --skip_tests "
    f"--minimal_build --include_ops_by_config {KERNELS} --enable_reduced_operator_type_support"
)


@final
@dataclass(frozen=True)
class PackedFile:
    """One form of the model: bytes, and seconds to load it on one thread."""

    name: str
    bytes: int
    load_seconds: float


@final
@dataclass(frozen=True)
class Packaged:
    """A written package: where it lies, what it says, and both forms of the model."""

    folder: Path
    package: Package
    files: tuple[PackedFile, ...]
    kernels: str


def package_artifact(
    folder: Path, output: Path | None = None, *, any_processor: bool = False, force: bool = False
) -> Packaged:
    """Write an artifact of ONNX Runtime as a package, by default to FOLDER/package.

    `any_processor` leaves out layouts that fit only this processor; `force` replaces an earlier
    package. Raises UsageError for an artifact of another runtime, or for an output that cannot be
    written, VerificationFailed where the artifact is damaged.
    """
    saved = read_artifact(folder)
    artifact = saved.artifact
    if not artifact.target.startswith("ort-"):
        message = f"an artifact for {artifact.target} is not packaged for ONNX Runtime"
        raise UsageError(message, where=str(folder), hint="compile with --target ort-cpu")
    if damaged := saved.damaged_files():
        raise VerificationFailed(damaged[0], where=str(folder), why="; ".join(damaged[1:]))
    probes = saved.probes()
    output = output or folder / FOLDER
    with open_output(output, force=force, marker=PACKAGE) as partial:
        write_ort(artifact, partial / ORT_MODEL, any_processor=any_processor)
        kernels = required_kernels(partial / ORT_MODEL)
        (partial / KERNELS).write_text(kernels, encoding="utf-8")
        (partial / _PROBE).mkdir()
        package = Package(
            source_sha256=saved.manifest.files[MODEL].sha256,
            runtime=RUNTIME,
            processor=runs_on(kernels),
            session_options=dict(artifact.session_options),
            inputs=tuple(_write_arrays(partial, "input", probes.feeds[0])),
            outputs=tuple(_write_arrays(partial, "output", probes.outputs[0])),
            reduced_build=_BUILD,
        )
        package.write(partial)
        (partial / PYTHON_FILE).write_text(PYTHON, encoding="utf-8")
        (partial / CPP_FILE).write_text(cpp(package), encoding="utf-8")
        files = tuple(_files(artifact, partial / ORT_MODEL))
    return Packaged(output, package, files, kernels)


def _write_arrays(folder: Path, role: str, feed: Feed) -> Iterator[PackedTensor]:
    for index, (name, array) in enumerate(feed.items()):
        if array.dtype.kind not in "fiub":
            message = f"{role} '{name}' holds {array.dtype}, which a package has no form for"
            raise UsageError(message, hint="deploy model.onnx itself")
        file = f"{_PROBE}/{role}{index}.bin"
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        (folder / file).write_bytes(np.ascontiguousarray(little).tobytes())
        yield PackedTensor(name, array.dtype.name, tuple(array.shape), file)


def _files(artifact: Artifact, ort: Path) -> Iterator[PackedFile]:
    options = artifact.session_options
    yield PackedFile(MODEL, artifact.bytes, load_seconds(artifact.path, options))
    yield PackedFile(ORT_MODEL, ort.stat().st_size, load_seconds(ort, options))
