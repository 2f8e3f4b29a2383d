"""Small trained networks with data to compile and judge them, and recipes for public models.

`names()` and `shipped()` give the files that ship with octavo; README.md beside them says what
they are. `public.py` describes bigger models, `fetch.py` gets them. Only `networks.py`,
`train.py` and `export_public.py` import torch.
"""

from __future__ import annotations

from pathlib import Path

from octavo.ir.errors import UnknownName

_FOLDER = Path(__file__).parent
_NETS = ("fashion-lstm", "fashion-mobile", "fashion-resnet", "fashion-vit")
_FILES = {
    **{name: name.replace("-", "_") + ".onnx" for name in _NETS},
    "fashion": "fashion.npz",
    "fashion-test": "fashion_test.npz",
}


def names() -> tuple[str, ...]:
    """The networks that ship with octavo."""
    return _NETS


def shipped(name: str) -> Path:
    """The file of a shipped network, or of its data.

    `fashion` holds 256 calibration images (`input`, float32 `[256, 1, 28, 28]`), `fashion-test`
    2,000 labelled ones (`input`, and `label`, int64 `[2000]`). Raises UnknownName.
    """
    if name not in _FILES:
        raise UnknownName("shipped model", name, _FILES)
    return _FOLDER / _FILES[name]
