"""What a compilation is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Request:
    """What a compilation was asked for; the defaults are part of every output.

    `pipeline` is a preset name or a pipeline text, empty for the preset the data allows.
    `shapes` and `threads` say what latency is measured with. `max_recurrent_error` bounds the
    relative output error that a dynamic LSTM kernel may add; below `min_agreement`, the share of
    rows with the same arg-max, dynamic kernels without data give way to weight-only ones.
    """

    target: str = "ort-cpu"
    pipeline: str = ""
    keep_float: tuple[str, ...] = ()
    shapes: Mapping[str, Sequence[int]] | None = None
    threads: int = 1
    seed: int = 0
    measure: bool = True
    max_recurrent_error: float = 0.02
    min_agreement: float = 0.6
