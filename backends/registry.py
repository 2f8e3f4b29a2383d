"""All targets by name, and the backend of each.

Naming a target loads no runtime: its backend is made when somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from octavo.backends import ort_target, ov_target, trt_target

if TYPE_CHECKING:
    from octavo.ir.backend import Backend
    from octavo.ir.target import Target

TARGETS: Mapping[str, Target] = {
    **ort_target.TARGETS,
    **ov_target.TARGETS,
    **trt_target.TARGETS,
}


def backend(name: str) -> Backend:
    """The backend of a target of `TARGETS`; KeyError for any other name."""
    return _MAKERS[name](TARGETS[name])


def _ort(target: Target) -> Backend:
    from octavo.backends.ort_backend import OrtBackend

    return OrtBackend(target)


def _openvino(target: Target) -> Backend:
    from octavo.backends import ov_backend, ov_session

    # Better now than after the passes.
    ov_session.runtime()
    return ov_backend.OpenVinoBackend(target)


def _tensorrt(target: Target) -> Backend:
    from octavo.backends.trt_backend import TensorRtBackend

    return TensorRtBackend(target)


_MAKERS: Mapping[str, Callable[[Target], Backend]] = {
    **dict.fromkeys(ort_target.TARGETS, _ort),
    **dict.fromkeys(ov_target.TARGETS, _openvino),
    **dict.fromkeys(trt_target.TARGETS, _tensorrt),
}
