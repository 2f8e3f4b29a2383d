"""OpenVINO on the CPU: the one place that touches its untyped API."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, final

import numpy as np
import onnx

from octavo.backends.ort_session import processor
from octavo.ir.errors import ModelError, UsageError, VerificationFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed

# Newer processors would compute floats in bfloat16, and products of compressed weights with
# activations it quantizes as it goes: neither is what was measured and compared.
OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_ERRORS = (RuntimeError, ValueError, TypeError)
# Layers without work of their own.
_PORTS = ("Const", "Input", "Output")


@final
@dataclass(frozen=True)
class Layer:
    """One layer of the runtime model: its type, precision and kernel, and seconds of a run.

    `names` are the nodes and values of the model file it was made of; `weights` is the type its
    constant weights are kept in, empty where it has none.
    """

    name: str
    kind: str
    precision: str
    kernel: str
    names: tuple[str, ...]
    weights: str
    seconds: float


@final
@dataclass(frozen=True)
class OvSession:
    """A compiled model file; every error of the runtime leaves it as an `OctavoError`."""

    name: str
    compiled: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, feed: Feed, outputs: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
        """The named outputs (none named: all) for one feed."""
        request = self.compiled.create_infer_request()
        self._infer(request, feed)
        values = (np.array(request.get_output_tensor(k).data) for k in range(len(self.outputs)))
        found = dict(zip(self.outputs, values, strict=True))
        return {name: found[name] for name in outputs or self.outputs}

    def bound(self, feed: Feed) -> Callable[[], None]:
        """A call that runs one fixed feed, for timing."""
        request = self.compiled.create_infer_request()
        self._infer(request, feed)

        def call() -> None:
            try:
                request.infer()
            except _ERRORS as error:
                raise _run_error(self.name, error) from error

        return call

    def layers(self, feed: Feed, rounds: int) -> tuple[Layer, ...]:
        """What runs, with median seconds over some rounds; needs a profiled session."""
        request = self.compiled.create_infer_request()
        seconds: dict[str, list[float]] = defaultdict(list)
        for index in range(rounds + 1):
            self._infer(request, feed)
            for measured in request.get_profiling_info() if index else ():
                seconds[measured.node_name].append(measured.real_time.total_seconds())
        typical = {name: median(values) for name, values in seconds.items()}
        return tuple(_layers(self.compiled, typical))

    def _infer(self, request: Any, feed: Feed) -> None:
        for name, port in zip(self.inputs, self.compiled.inputs, strict=True):
            # It would read as many bytes as it expects.
            if why := _mismatch(name, port, feed):
                raise UsageError("the feed does not fit the model", where=self.name, why=why)
        try:
            request.infer({name: feed[name] for name in self.inputs})
        except _ERRORS as error:
            raise _run_error(self.name, error) from error


def _mismatch(name: str, port: Any, feed: Feed) -> str:
    """Why an input cannot be what the feed holds, empty where it can."""
    if name not in feed:
        return f"input '{name}' is missing"
    array, wanted = feed[name], port.get_partial_shape()
    if not wanted.compatible(runtime().PartialShape(list(array.shape))):
        return f"input '{name}' has the shape {list(array.shape)}, the model declares {wanted}"
    dtype = port.get_element_type().to_dtype()
    return "" if dtype == array.dtype else f"input '{name}' is {array.dtype}, not {dtype}"


def open_session(
    path: Path, *, threads: int, config: Mapping[str, str] | None = None, profiled: bool = False
) -> OvSession:
    """Compile a model file for the CPU; `config` adds to the options artifacts rely on.

    Raises ModelError with the runtime's message when it does not load, UsageError where OpenVINO
    is not installed.
    """
    options = {**OPTIONS, **(config or {}), "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    if profiled:
        options["PERF_COUNT"] = True
    core = runtime().Core()
    try:
        compiled = core.compile_model(core.read_model(path), "CPU", options)
    except _ERRORS as error:
        message = "openvino does not load the model"
        raise ModelError(message, where=path.name, why=_reason(error)) from error
    return OvSession(path.name, compiled, *_ports(path))


def _ports(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of inputs and outputs as the file has them: a value may have others here."""
    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = tuple(value.name for value in graph.input if value.name not in constants)
    return inputs, tuple(value.name for value in graph.output)


def _layers(compiled: Any, seconds: Mapping[str, float]) -> list[Layer]:
    def text(node: Any, key: str) -> str:
        info = node.get_rt_info()
        return str(info[key].astype(str)) if key in info else ""

    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        if text(node, "layerType") in _PORTS:
            continue
        made = [value.get_source_output().get_node() for value in node.inputs()]
        constant = [n for n in made[1:2] if text(n, "layerType") == "Const"]
        # A turned weight is moved once, when the model loads.
        moved = [n for n in made[1:2] if text(n, "execTimeMcs") == "not_executed"]
        name = node.get_friendly_name()
        found.append(
            Layer(
                name=name,
                kind=text(node, "layerType"),
                precision=text(node, "runtimePrecision"),
                kernel=text(node, "primitiveType"),
                names=tuple(filter(None, text(node, "originalLayersNames").split(","))),
                weights=next((text(n, "outputPrecisions") for n in (*constant, *moved)), ""),
                seconds=seconds.get(name, 0.0),
            )
        )
    return found


@cache
def runtime() -> Any:
    """The package; UsageError where it is not installed."""
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        message = "the target openvino needs OpenVINO"
        hint = "pip install 'octavo[openvino]'"
        raise UsageError(message, why=str(error), hint=hint) from error


def environment(threads: int) -> str:
    """What a measurement rests on: runtime version, processor, threads."""
    version = str(runtime().__version__).split("-", maxsplit=1)[0]
    return f"openvino {version}, {processor()}, {threads} thread(s)"


def _run_error(name: str, error: Exception) -> VerificationFailed:
    return VerificationFailed(
        "openvino fails while it runs the model", where=name, why=_reason(error)
    )


def _reason(error: Exception) -> str:
    """The last line that says something: those before name files of the runtime's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (told or lines or [type(error).__name__])[-1]
