"""Matrix products, convolutions, normalisations and losses of ONNX in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from octavo.ir.torch_ops_window import window_pads

_CONV = (functional.conv1d, functional.conv2d, functional.conv3d)
_CONV_TRANSPOSE = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Gemm: α·A·B + β·C."""
    product = (a.T if transA else a) @ (b.T if transB else b)
    product = product if alpha == 1 else alpha * product
    return product if c is None else product + (c if beta == 1 else beta * c)


def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Conv over one to three axes."""
    n = x.dim() - 2
    stride, dilation = strides or [1] * n, dilations or [1] * n
    low, high = window_pads(x, w.shape[2:], stride, dilation, auto_pad, pads)
    if low == high:
        return _CONV[n - 1](x, w, b, stride, low, dilation, group)
    return _CONV[n - 1](_padded(x, low, high), w, b, stride, 0, dilation, group)


def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """ConvTranspose: the full result, then padded and cropped to the wanted size."""
    n = x.dim() - 2
    stride, dilation = strides or [1] * n, dilations or [1] * n
    extra = output_padding or [0] * n
    full = _CONV_TRANSPOSE[n - 1](x, w, None, stride, 0, 0, group, dilation)
    size = [full.shape[k + 2] + extra[k] for k in range(n)]
    if output_shape is None and auto_pad.startswith("SAME"):
        output_shape = [x.shape[k + 2] * stride[k] for k in range(n)]
    if output_shape is None:
        given = list(pads or [0] * (2 * n)) if auto_pad == "NOTSET" else [0] * (2 * n)
        low, high = given[:n], given[n:]
    else:
        total = [a - b for a, b in zip(size, output_shape, strict=True)]
        first = [t // 2 if auto_pad == "SAME_UPPER" else t - t // 2 for t in total]
        low, high = first, [t - f for t, f in zip(total, first, strict=True)]
    crop = _padded(full, [-k for k in low], [e - k for e, k in zip(extra, high, strict=True)])
    return crop if b is None else crop + b.reshape(-1, *[1] * n)


def batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    outputs: int,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> tuple[Tensor, ...]:
    """BatchNormalization; in training mode also the running mean and (biased) variance."""
    if not training_mode:
        return (_normalised(x, scale, bias, mean, var, epsilon),)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    now, spread = x.mean(axes), x.var(axes, unbiased=False)
    y = _normalised(x, scale, bias, now, spread, epsilon)
    keep = 1 - momentum
    return y, mean * momentum + now * keep, var * momentum + spread * keep


def _normalised(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, epsilon: float
) -> Tensor:
    """(x - mean) / deviation · scale + bias; torch's own has no gradient for the statistics."""
    shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
    factor = scale * torch.rsqrt(var + epsilon)
    moved = bias - mean * factor
    return torch.addcmul(moved.reshape(shape), x, factor.reshape(shape))


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """InstanceNormalization."""
    return functional.group_norm(x, x.shape[1], scale, bias, epsilon)


def group_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    """GroupNormalization; before opset 21 one scale per group."""
    if len(scale) != x.shape[1]:
        each = x.shape[1] // num_groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return functional.group_norm(x, num_groups, scale, bias, epsilon)


def layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    outputs: int,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> tuple[Tensor, ...]:
    """LayerNormalization; mean and 1/deviation only where a node names them."""
    shape = x.shape[axis:]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        y = functional.layer_norm(x, shape, scale, bias, epsilon)
    else:
        y = functional.layer_norm(x, shape, eps=epsilon) * scale
        y = y if bias is None else y + bias
    if outputs == 1:
        return (y,)
    axes = list(range(axis % x.dim(), x.dim()))
    mean = x.mean(axes, keepdim=True)
    return y, mean, torch.rsqrt(x.var(axes, unbiased=False, keepdim=True) + epsilon)


def rms_norm(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """RMSNormalization."""
    axes = list(range(axis % x.dim(), x.dim()))
    # The stash type is float32: half precision would lose the mean square.
    wide = x if x.dtype == torch.float64 else x.float()
    unit = wide * torch.rsqrt((wide * wide).mean(axes, keepdim=True) + epsilon)
    return unit.to(x.dtype) * scale


def mean_variance_norm(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """MeanVarianceNormalization, ONNX's 1e-9 added to the deviation."""
    mean = x.mean(list(axes), keepdim=True)
    deviation = torch.sqrt(((x * x).mean(list(axes), keepdim=True)) - mean * mean)
    return (x - mean) / (deviation + 1e-9)


def local_response_norm(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """LRN over neighbouring channels."""
    widths = [0, 0] * (x.dim() - 2) + [(size - 1) // 2, size // 2]
    squares = functional.pad(x * x, widths).unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * squares) ** beta


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Softmax (opset 13 on)."""
    return torch.softmax(x, axis)


def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """LogSoftmax (opset 13 on)."""
    return torch.log_softmax(x, axis)


def dropout(
    x: Tensor,
    ratio: Tensor | None = None,
    training_mode: Tensor | None = None,
    *,
    outputs: int,
    seed: int | None = None,
) -> tuple[Tensor, ...]:
    """Dropout; what a training mode would drop is random, so only ratio 0 is left there."""
    training = training_mode is not None and bool(training_mode.reshape(-1).tolist()[0])
    if training and (ratio is None or ratio.reshape(-1).tolist()[0]):
        raise ValueError("Dropout in training mode is random")
    return x, torch.ones_like(x, dtype=torch.bool)


def nll_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int | None = None,
) -> Tensor:
    """NegativeLogLikelihoodLoss."""
    skip = -100 if ignore_index is None else ignore_index
    # Beyond two spatial axes torch wants them flat.
    logs, index = x.reshape(x.shape[0], x.shape[1], -1), target.to(torch.int64)
    flat = index.reshape(x.shape[0], -1)
    loss = functional.nll_loss(logs, flat, weight, ignore_index=skip, reduction=reduction)
    return loss.reshape(target.shape) if reduction == "none" else loss


def cross_entropy_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    outputs: int,
    reduction: str = "mean",
    ignore_index: int | None = None,
) -> tuple[Tensor, ...]:
    """SoftmaxCrossEntropyLoss and the log-probabilities."""
    logs = torch.log_softmax(x, 1)
    loss = nll_loss(logs, target, weight, reduction=reduction, ignore_index=ignore_index)
    return loss, logs


def grid_sample(
    x: Tensor,
    grid: Tensor,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> Tensor:
    """GridSample over two or three axes."""
    modes = {"linear": "bilinear", "cubic": "bicubic"}
    return functional.grid_sample(
        x, grid, modes.get(mode, mode), padding_mode, align_corners=bool(align_corners)
    )


def affine_grid(theta: Tensor, size: Tensor, *, align_corners: int = 0) -> Tensor:
    """AffineGrid."""
    return functional.affine_grid(theta, size.tolist(), align_corners=bool(align_corners))


def causal_conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    past: Tensor | None = None,
    *,
    outputs: int,
    activation: str = "none",
) -> tuple[Tensor, ...]:
    """CausalConvWithState: depthwise, and the last k - 1 positions as the next state."""
    k = w.shape[-1]
    state = x.new_zeros(*x.shape[:2], k - 1) if past is None else past
    whole = torch.cat([state, x], -1)
    y = functional.conv1d(whole, w, b, groups=x.shape[1])
    y = functional.silu(y) if activation in ("silu", "swish") else y
    return y, whole.narrow(-1, whole.shape[-1] - (k - 1), k - 1)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    outputs: int,
    q_num_heads: int,
    kv_num_heads: int,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
    chunk_size: int = 64,
) -> tuple[Tensor, ...]:
    """LinearAttention, one step after the other; [batch, steps, heads · size]."""

    wide = torch.promote_types(query.dtype, torch.float32)

    def heads(x: Tensor, count: int) -> Tensor:
        return x.reshape(*x.shape[:2], count, -1).transpose(1, 2).to(wide)

    q, k, v = heads(query, q_num_heads), heads(key, kv_num_heads), heads(value, kv_num_heads)
    g = None if decay is None else torch.exp(heads(decay, kv_num_heads))
    b = None if beta is None else beta.reshape(*beta.shape[:2], -1, 1).transpose(1, 2).to(wide)
    sizes = (q.shape[0], kv_num_heads, k.shape[-1], v.shape[-1])
    state = q.new_zeros(sizes) if past is None else past.to(wide)
    rows = []
    for t in range(q.shape[2]):
        state = state if g is None or "gated" not in update_rule else state * g[:, :, t, :, None]
        new = v[:, :, t]
        if "delta" in update_rule and b is not None:
            new = b[:, :, t] * (new - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t]))
        state = state + k[:, :, t, :, None] * new[:, :, None, :]
        spread = state.repeat_interleave(q_num_heads // kv_num_heads, 1)
        rows.append(torch.einsum("bhkv,bhk->bhv", spread, q[:, :, t]))
    y = torch.stack(rows, 1).flatten(2) * (scale or 1 / math.sqrt(k.shape[-1]))
    kept = state if past is None else state.to(past.dtype)
    return y.to(query.dtype), kept.to(query.dtype) if past is None else kept


def _padded(x: Tensor, low: Sequence[int], high: Sequence[int]) -> Tensor:
    pairs = zip(reversed(low), reversed(high), strict=True)
    return functional.pad(x, [width for pair in pairs for width in pair])


OPS: dict[str, Callable[..., Any]] = {
    "AffineGrid": affine_grid,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "GridSample": grid_sample,
    "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm,
    "LRN": local_response_norm,
    "LogSoftmax": log_softmax,
    "MatMul": torch.matmul,
    "MeanVarianceNormalization": mean_variance_norm,
    "NegativeLogLikelihoodLoss": nll_loss,
    "RMSNormalization": rms_norm,
    "Softmax": softmax,
}
SEVERAL: dict[str, Callable[..., Any]] = {
    "BatchNormalization": batch_norm,
    "CausalConvWithState": causal_conv,
    "Dropout": dropout,
    "LayerNormalization": layer_norm,
    "LinearAttention": linear_attention,
    "SoftmaxCrossEntropyLoss": cross_entropy_loss,
}
