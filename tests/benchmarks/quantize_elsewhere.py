"""Quantize with a tool that has an environment of its own.

`PYTHON_OF_THE_TOOL quantize_elsewhere.py TOOL IN.onnx FEEDS OUT [transformer]`, TOOL being `nncf`
(OUT ends in .onnx, or in .xml for OpenVINO's format), `quark` or `modelopt`. FEEDS is a folder of
.npz, one per calibration sample. The tools want other versions of what octavo uses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Feeds = list[dict[str, Any]]


def nncf(source: str, samples: Feeds, target: str, kind: str) -> None:
    """Post-training quantization with NNCF's defaults."""
    import nncf  # type: ignore[import-not-found]
    import onnx
    import openvino

    to_onnx = target.endswith(".onnx")
    model = onnx.load(source) if to_onnx else openvino.Core().read_model(source)
    made = nncf.quantize(
        model,
        nncf.Dataset(samples),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER if kind == "transformer" else None,
    )
    if to_onnx:
        onnx.save(made, target)
    else:
        openvino.save_model(made, target, compress_to_fp16=False)


def quark(source: str, samples: Feeds, target: str, kind: str) -> None:
    """AMD Quark's preset of 8-bit activations and weights."""
    from quark.onnx import ModelQuantizer, QConfig  # type: ignore[import-not-found]

    class Reader:
        def __init__(self) -> None:
            self.feeds: Iterator[dict[str, Any]] = iter(samples)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    ModelQuantizer(QConfig.get_default_config("A8W8")).quantize_model(source, target, Reader())


def modelopt(source: str, samples: Feeds, target: str, kind: str) -> None:
    """NVIDIA ModelOpt's int8 with its defaults."""
    from modelopt.onnx.quantization import quantize  # type: ignore[import-not-found]

    data = {name: np.concatenate([feed[name] for feed in samples]) for name in samples[0]}
    quantize(source, "int8", calibration_data=data, output_path=target, calibration_eps=["cpu"])


TOOLS: dict[str, Callable[[str, Feeds, str, str], None]] = {
    "nncf": nncf,
    "quark": quark,
    "modelopt": modelopt,
}


def main(tool: str, source: str, feeds: str, target: str, kind: str = "") -> None:
    """Quantize; every feed is a calibration sample."""
    samples = [dict(np.load(path)) for path in sorted(Path(feeds).glob("*.npz"))]
    TOOLS[tool](source, samples, target, kind)


if __name__ == "__main__":
    main(*sys.argv[1:])
