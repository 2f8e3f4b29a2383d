"""Quantize with NNCF: `PYTHON_WITH_NNCF nncf_quantize.py IN.onnx FEEDS OUT.xml [transformer]`.

FEEDS is a folder of .npz, one per calibration feed. Runs in an environment of its own: NNCF wants
other versions of what octavo uses.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(source: str, feeds: str, target: str, kind: str = "") -> None:
    """Post-training quantization with NNCF's defaults; every feed is a calibration sample."""
    import nncf  # type: ignore[import-not-found]
    import numpy as np
    import openvino

    model = openvino.Core().read_model(source)
    samples = [dict(np.load(path)) for path in sorted(Path(feeds).glob("*.npz"))]
    made = nncf.quantize(
        model,
        nncf.Dataset(samples),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER if kind == "transformer" else None,
    )
    openvino.save_model(made, target, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
