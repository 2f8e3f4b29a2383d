"""Quantize a model with another tool: `python peers.py TOOL IN.onnx OUT.onnx [CALIBRATION.npz]`.

A process of its own, so that its seconds and memory compare with those of `octavo compile`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from task import Feed


def static(method: str, source: Path, target: Path, data: Path) -> None:
    """onnxruntime's static quantization as its documentation recommends for x64 with VNNI."""
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared)
    quantize_static(
        prepared,
        target,
        _reader(data),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
    )
    prepared.unlink()


def dynamic(source: Path, target: Path) -> None:
    """onnxruntime's dynamic quantization, one scale per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


TOOLS: dict[str, Callable[..., None]] = {
    "ort-static-minmax": partial(static, "MinMax"),
    "ort-static-percentile": partial(static, "Percentile"),
    "ort-dynamic": dynamic,
}


def _reader(data: Path) -> object:
    from onnxruntime.quantization import CalibrationDataReader

    arrays = dict(np.load(data))
    count = len(next(iter(arrays.values())))

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
        def __init__(self) -> None:
            self.samples = iter(range(count))

        def get_next(self) -> Feed | None:
            k = next(self.samples, None)
            return None if k is None else {n: array[k : k + 1] for n, array in arrays.items()}

    return Reader()


if __name__ == "__main__":
    TOOLS[sys.argv[1]](*map(Path, sys.argv[2:]))
