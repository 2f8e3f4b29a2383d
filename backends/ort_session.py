"""ONNX Runtime sessions on the CPU: the one place that touches its untyped API."""

from __future__ import annotations

import platform
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
import onnx_ir
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_state

from octavo.ir.errors import ModelError, OctavoError, UnknownName, UsageError, VerificationFailed
from octavo.ir.fake_quant import fold_quantized_constants
from octavo.ir.memory import release_memory
from octavo.ir.model import weight_bytes
from octavo.ir.parts import parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.model import Model

Optimization = Literal["all", "extended", "basic", "none"]

_LEVELS = {
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
_PROVIDERS = ["CPUExecutionProvider"]
_QUIET = 4
_IN_MEMORY_BYTES = 256 << 20
_PART_BYTES = 64 << 20
_SMALL_BYTES = 1 << 10
_OPTIMIZED = "session.optimized_model_external_initializers"
_WRONG_FEED = (runtime_state.InvalidArgument, ValueError)
_IN_KERNEL = "while running"
_RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    *(c for c in vars(runtime_state).values() if isinstance(c, type) and issubclass(c, Exception)),
    RuntimeError,
    ValueError,
)


@final
@dataclass(frozen=True)
class Session:
    """A loaded model; every error of the runtime leaves it as an `OctavoError`."""

    name: str
    handle: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    keeps_alive: tuple[object, ...] = ()

    def run(self, feed: Feed, outputs: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
        """The named outputs (none named: all) for one feed.

        Raises UsageError when the feed does not fit the model, VerificationFailed when a kernel
        fails.
        """
        names = tuple(outputs) or self.outputs
        try:
            arrays = self.handle.run(list(names), dict(feed))
        except _RUNTIME_ERRORS as error:
            raise _run_error(self.name, error) from error
        return dict(zip(names, arrays, strict=True))

    def bound(self, feed: Feed) -> Callable[[], None]:
        """A call that runs one fixed feed without copying inputs, for timing."""
        binding = self.handle.io_binding()
        try:
            for name, array in feed.items():
                binding.bind_cpu_input(name, array)
            for name in self.outputs:
                binding.bind_output(name)
        except _RUNTIME_ERRORS as error:
            raise _run_error(self.name, error) from error

        def call() -> None:
            try:
                self.handle.run_with_iobinding(binding)
            except _RUNTIME_ERRORS as error:
                raise _run_error(self.name, error) from error

        return call

    def end_profiling(self) -> Path:
        """Stop profiling and return the file of events."""
        return Path(self.handle.end_profiling())


def make_session(
    model: Path | bytes,
    *,
    threads: int,
    optimization: Optimization = "all",
    config: Mapping[str, str] | None = None,
    profile_prefix: Path | None = None,
    optimized_path: Path | None = None,
    disabled_optimizers: Iterable[str] = (),
) -> Session:
    """Load a model on the CPU provider; external data is found only for a path.

    `config` holds session configuration entries such as `session.disable_quant_qdq`;
    `optimized_path` receives the graph after the runtime's own rewrites; `profile_prefix` turns
    profiling on. Raises ModelError with the runtime's message when the model does not load.
    """
    options = _options(threads, optimization)
    _configure(options, config or {})
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
        # Weights beside the graph: it is read without them, and protobuf ends at 2 GB.
        options.add_session_config_entry(f"{_OPTIMIZED}_file_name", f"{optimized_path.name}.data")
        options.add_session_config_entry(f"{_OPTIMIZED}_min_size_in_bytes", str(_SMALL_BYTES))
    return _load(model, options, set(disabled_optimizers))


def _options(threads: int, optimization: Optimization) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = _LEVELS[optimization]
    # Idle worker threads of one session would otherwise steal time from the next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _configure(options: Any, config: Mapping[str, str]) -> None:
    for key, value in config.items():
        try:
            options.add_session_config_entry(key, value)
        except _RUNTIME_ERRORS as error:
            message = f"onnxruntime does not accept the session option '{key[:80]}'"
            raise ModelError(message, why=_reason(error)) from error


def _load(model: Path | bytes, options: Any, disabled_optimizers: set[str]) -> Session:
    name = model.name if isinstance(model, Path) else "model in memory"
    try:
        handle = onnxruntime.InferenceSession(
            str(model) if isinstance(model, Path) else model,
            options,
            providers=_PROVIDERS,
            disabled_optimizers=disabled_optimizers,
            enable_fallback=0,
        )
    except _RUNTIME_ERRORS as error:
        message = "onnxruntime does not load the model"
        raise ModelError(message, where=name, why=_reason(error)) from error
    inputs = tuple(value.name for value in handle.get_inputs())
    return Session(name, handle, inputs, tuple(value.name for value in handle.get_outputs()))


def environment(threads: int) -> str:
    """What a measurement rests on: runtime version, processor, threads."""
    return f"onnxruntime {onnxruntime.__version__}, {processor()}, {threads} thread(s)"


@cache
def has_vnni() -> bool:
    """Whether this processor multiplies bytes without saturating; true where nothing tells."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "vnni")
    return "vnni" in flags


@cache
def processor() -> str:
    """The processor as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@final
@dataclass
class OrtEvaluator:
    """Runs models in memory; keeps the last `capacity` sessions, by fingerprint and outputs.

    One feed is in memory at a time; the caller bounds its size by the size of a batch.
    """

    threads: int = 2
    optimization: Optimization = "all"
    capacity: int = 2
    _sessions: OrderedDict[tuple[str, tuple[str, ...]], Session] = field(
        default_factory=OrderedDict, repr=False
    )

    def stream(
        self, model: Model, batches: Batches, values: Sequence[str]
    ) -> Iterator[dict[str, NDArray[np.generic]]]:
        """The named values (intermediate ones too) for every feed, one feed at a time."""
        session = self._session(model, tuple(dict.fromkeys(values)))
        for feed in batches:
            yield session.run(feed, values)

    def run(self, model: Model, feed: Feed) -> dict[str, NDArray[np.generic]]:
        """The graph outputs of one feed, by output name."""
        return self._session(model, ()).run(feed)

    def outputs(self, model: Model, feeds: Iterable[Feed]) -> list[dict[str, NDArray[np.generic]]]:
        """The graph outputs of every feed; of a large model only a part is in memory at a time."""
        if weight_bytes(model) <= _IN_MEMORY_BYTES:
            run = self.load(model)
            return [run(feed) for feed in feeds]
        alive = [dict(feed) for feed in feeds]
        for part in parts(model, _PART_BYTES):
            session = model_session(part.model, 1, self.optimization)
            for held in alive:
                held |= session.run({name: held[name] for name in session.inputs})
                for name in part.drops:
                    del held[name]
            del session
            release_memory()
        names = [value.name or "" for value in model.graph.outputs]
        return [{name: held[name] for name in names} for held in alive]

    def load(self, model: Model) -> Callable[[Feed], dict[str, NDArray[np.generic]]]:
        """A model that is run by calling it, on one thread; it lives as long as the caller."""
        return model_session(model, 1, self.optimization).run

    def _session(self, model: Model, values: tuple[str, ...]) -> Session:
        key = (model.fingerprint, values)
        if key not in self._sessions:
            # The old session goes first, so that no more than `capacity` are ever alive.
            while len(self._sessions) >= self.capacity:
                self._sessions.popitem(last=False)
            release_memory()
            shown = _with_outputs(model, values) if values else model
            self._sessions[key] = model_session(shown, self.threads, self.optimization)
        self._sessions.move_to_end(key)
        return self._sessions[key]


def model_session(model: Model, threads: int, optimization: Optimization = "all") -> Session:
    """A session of a model in memory.

    Weights are handed over as they lie in memory; where they are large the runtime would copy
    them, and a temporary file that it maps takes less.
    """
    own = model.ir.clone()
    fold_quantized_constants(own)
    if weight_bytes(model) <= _IN_MEMORY_BYTES:
        options = _options(threads, optimization)
        content, arrays = _detached(own)
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
        options.add_external_initializers(list(arrays), values)
        session = _load(content, options, set())
        return replace(session, keeps_alive=tuple(arrays.values()))
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        path = Path(folder) / "model.onnx"
        onnx_ir.save(own, path, external_data="model.onnx.data")
        return make_session(path, threads=threads, optimization=optimization)


def _detached(own: onnx_ir.Model) -> tuple[bytes, dict[str, NDArray[np.generic]]]:
    """The serialized graph without its float32 weights, and these by name."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, value in own.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype != onnx_ir.DataType.FLOAT or tensor.nbytes < _SMALL_BYTES:
            continue
        arrays[name] = np.ascontiguousarray(tensor.numpy())
        shape = onnx_ir.Shape(tensor.shape.numpy())
        value.const_value = onnx_ir.ExternalTensor(
            "memory", 0, tensor.nbytes, onnx_ir.DataType.FLOAT, shape=shape, name=name
        )
    return onnx_ir.to_proto(_embedded(own)).SerializeToString(), arrays


def _embedded(own: onnx_ir.Model) -> onnx_ir.Model:
    """The model with its other tensors in memory: nothing it still reads lies in a file."""
    for graph in own.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, onnx_ir.ExternalTensor) and tensor.location != "memory":
                value.const_value = onnx_ir.Tensor(tensor.numpy(), tensor.dtype, name=value.name)
    return own


def _with_outputs(model: Model, names: Sequence[str]) -> Model:
    """A clone whose graph outputs are the named values."""
    shown = model.clone()
    graph = shown.graph
    values = {v.name: v for v in (*graph.inputs, *graph.initializers.values())}
    values |= {v.name: v for node in graph for v in node.outputs if v.name}
    unknown = next((name for name in names if name not in values), None)
    if unknown is not None:
        raise UnknownName("value", unknown, (str(name) for name in values))
    graph.outputs.clear()
    graph.outputs.extend(values[name] for name in names)
    return shown


def _run_error(name: str, error: Exception) -> OctavoError:
    # A kernel that refuses its inputs reports the same code as a wrong feed.
    if isinstance(error, _WRONG_FEED) and _IN_KERNEL not in str(error):
        return UsageError("the feed does not fit the model", where=name, why=_reason(error))
    message = "onnxruntime fails while it runs the model"
    return VerificationFailed(message, where=name, why=_reason(error))


def _reason(error: Exception) -> str:
    """The message without the runtime's prefix, which ends with its error code."""
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).strip()
