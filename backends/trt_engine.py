"""Engines on a device: build with a timing cache, look inside, run and time them.

Needs the `tensorrt` wheels of version 11 and a GPU with its driver.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, final

import numpy as np

from octavo.backends.trt_layers import Layer, read_layers
from octavo.ir.cache import default_folder
from octavo.ir.errors import UsageError, VerificationFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.backends.trt_commands import Shapes
    from octavo.ir.calibration import Feed

MAJOR = "11"
_RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
_TO_DEVICE, _TO_HOST = 1, 2
_WARM_UP, _ROUNDS = 5, 30


def version() -> str | None:
    """The version of TensorRT, `None` where it or a GPU is missing.

    Raises UsageError for another major version.
    """
    try:
        found = importlib.metadata.version("tensorrt")
    except importlib.metadata.PackageNotFoundError:
        return None
    if not found.startswith(f"{MAJOR}."):
        message = f"TensorRT {found} is installed, octavo lowers for {MAJOR}"
        hint = f"pip install 'tensorrt>={MAJOR},<{int(MAJOR) + 1}'"
        raise UsageError(message, why="older versions choose types by themselves", hint=hint)
    return found if _cuda() is not None else None


@final
@dataclass(frozen=True)
class Engine:
    """A deserialized engine; it lives as long as its runtime."""

    handle: Any
    trt: Any
    runtime: Any

    def layers(self) -> tuple[Layer, ...]:
        """What the inspector tells of every layer."""
        inspector = self.handle.create_engine_inspector()
        text = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        return read_layers(json.loads(text))

    def run(self, feed: Feed) -> tuple[dict[str, NDArray[np.generic]], float]:
        """Outputs by name, and the median seconds of a run after warm-up."""
        return _run(self, feed)


def build(path: Path, shapes: Mapping[str, Shapes]) -> Engine:
    """Build an engine, with the tactics that earlier builds on this machine timed.

    Raises VerificationFailed with the reason of the parser or builder.
    """
    trt = importlib.import_module("tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        why = "; ".join(parser.get_error(k).desc() for k in range(parser.num_errors))
        raise VerificationFailed("TensorRT does not parse the model", where=path.name, why=why)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if shapes:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape.least, shape.typical, shape.most)
        config.add_optimization_profile(profile)
    timings = default_folder() / f"tensorrt-{trt.__version__}.timings"
    timings.parent.mkdir(parents=True, exist_ok=True)
    known = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    config.set_timing_cache(known, ignore_mismatch=False)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise VerificationFailed("TensorRT does not build the model", where=path.name)
    timings.write_bytes(bytes(config.get_timing_cache().serialize()))
    runtime = trt.Runtime(logger)
    return Engine(runtime.deserialize_cuda_engine(serialized), trt, runtime)


def _run(engine: Engine, feed: Feed) -> tuple[dict[str, NDArray[np.generic]], float]:
    cuda, trt = _cuda(), engine.trt
    assert cuda is not None
    context = engine.handle.create_execution_context()
    names = [engine.handle.get_tensor_name(k) for k in range(engine.handle.num_io_tensors)]
    inputs = [n for n in names if engine.handle.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    for name in inputs:
        context.set_input_shape(name, feed[name].shape)
    arrays: dict[str, NDArray[np.generic]] = {}
    for name in names:
        dtype = trt.nptype(engine.handle.get_tensor_dtype(name))
        given = np.ascontiguousarray(feed[name], dtype) if name in inputs else None
        shape = tuple(context.get_tensor_shape(name))
        arrays[name] = given if given is not None else np.empty(shape, dtype)
    places = {name: cuda.allocate(array.nbytes) for name, array in arrays.items()}
    try:
        for name, place in places.items():
            context.set_tensor_address(name, place)
            if name in inputs:
                cuda.copy(place, arrays[name].ctypes.data, arrays[name].nbytes, _TO_DEVICE)
        seconds = _seconds(lambda: context.execute_async_v3(0), cuda.synchronize)
        outputs = {name: array for name, array in arrays.items() if name not in inputs}
        for name, array in outputs.items():
            cuda.copy(array.ctypes.data, places[name], array.nbytes, _TO_HOST)
    finally:
        for place in places.values():
            cuda.free(place)
    return outputs, seconds


def _seconds(start: Callable[[], object], wait: Callable[[], None]) -> float:
    found = []
    for _ in range(_WARM_UP + _ROUNDS):
        begin = time.perf_counter()
        start()
        wait()
        found.append(time.perf_counter() - begin)
    return median(found[_WARM_UP:])


@final
@dataclass(frozen=True)
class _Cuda:
    """The few calls of the CUDA runtime that running an engine takes."""

    library: ctypes.CDLL

    def allocate(self, size: int) -> int:
        place = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(place), ctypes.c_size_t(max(1, size)))
        return int(place.value or 0)

    def copy(self, to: int, source: int, size: int, kind: int) -> None:
        places = ctypes.c_void_p(to), ctypes.c_void_p(source)
        self._call("cudaMemcpy", *places, ctypes.c_size_t(size), ctypes.c_int(kind))

    def free(self, place: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(place))

    def synchronize(self) -> None:
        self._call("cudaDeviceSynchronize")

    def devices(self) -> int:
        count = ctypes.c_int()
        failed = self.library.cudaGetDeviceCount(ctypes.byref(count))
        return 0 if failed else count.value

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            message = f"{name} fails with CUDA error {code}"
            raise VerificationFailed(message, hint="is the GPU in use, or out of memory?")


@cache
def _cuda() -> _Cuda | None:
    """The CUDA runtime where it loads and sees a device."""
    folders = [p for p in _package_folders() if p.is_dir()]
    for name in _RUNTIMES:
        for path in (name, *(str(folder / name) for folder in folders)):
            try:
                found = _Cuda(ctypes.CDLL(path))
            except OSError:
                continue
            return found if found.devices() else None
    return None


def _package_folders() -> list[Path]:
    """Where wheels put the runtime."""
    try:
        roots = importlib.import_module("nvidia").__path__
    except ImportError:
        return []
    return [Path(root) / folder / "lib" for root in roots for folder in ("cu13", "cuda_runtime")]
