"""Reading weights that lie in a memory-mapped file without keeping their pages resident."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import onnx_ir

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx_ir import TensorProtocol

Result = TypeVar("Result")


def reading(tensor: TensorProtocol, use: Callable[[NDArray[Any]], Result]) -> Result:
    """What `use` makes of a tensor's array; a mapping of a file is closed behind it.

    The result must not be a view of the array.
    """
    result = use(tensor.numpy())
    if isinstance(tensor, onnx_ir.ExternalTensor):
        # Somebody else still looks at the array: its pages stay, and the next reader maps anew.
        with suppress(BufferError):
            tensor.release()
    return result
