"""RNN, GRU and LSTM in torch: one loop over time, with ONNX's order of gates.

X is [steps, batch, inputs] (layout 0); weights are [directions, gates · hidden, …]; a sequence
that ended keeps its state and gives zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": lambda x, a, b: torch.relu(x),
    "tanh": lambda x, a, b: torch.tanh(x),
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "affine": lambda x, a, b: a * x + b,
    "leakyrelu": lambda x, a, b: functional.leaky_relu(x, 0.01 if a is None else a),
    "thresholdedrelu": lambda x, a, b: torch.where(x > (1.0 if a is None else a), x, 0.0),
    "scaledtanh": lambda x, a, b: a * torch.tanh(b * x),
    "hardsigmoid": lambda x, a, b: torch.clamp(
        (0.2 if a is None else a) * x + (0.5 if b is None else b), 0, 1
    ),
    "elu": lambda x, a, b: functional.elu(x, 1.0 if a is None else a),
    "softsign": lambda x, a, b: functional.softsign(x),
    "softplus": lambda x, a, b: functional.softplus(x),
}
_TAKES = {"affine": 2, "leakyrelu": 1, "thresholdedrelu": 1, "scaledtanh": 2}
_TAKES |= {"hardsigmoid": 2, "elu": 1}


def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    *,
    outputs: int,
    hidden_size: int | None = None,
    direction: str = "forward",
    layout: int = 0,
    clip: float | None = None,
    activations: Sequence[str] = (),
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
) -> tuple[Tensor, ...]:
    """RNN: H = f(X·Wᵀ + H·Rᵀ + Wb + Rb)."""
    functions = _functions(activations or ["Tanh"] * len(w), activation_alpha, activation_beta)

    def step(d: int) -> tuple[Tensor, Tensor, _Step]:
        b = _bias(bias, d, w)
        return w[d], b.sum(0), partial(_rnn_step, r[d], functions[d], clip)

    return _run(step, x, len(w), r, lengths, (h,), direction, layout)


def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    *,
    outputs: int,
    hidden_size: int | None = None,
    direction: str = "forward",
    layout: int = 0,
    clip: float | None = None,
    linear_before_reset: int = 0,
    activations: Sequence[str] = (),
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
) -> tuple[Tensor, ...]:
    """GRU with gates z, r, h."""
    names = activations or ["Sigmoid", "Tanh"] * len(w)
    functions = _functions(names, activation_alpha, activation_beta)

    def step(d: int) -> tuple[Tensor, Tensor, _Step]:
        f, g = functions[2 * d : 2 * d + 2]
        b = _bias(bias, d, w)
        return w[d], b[0], partial(_gru_step, r[d], b[1], f, g, clip, bool(linear_before_reset))

    return _run(step, x, len(w), r, lengths, (h,), direction, layout)


def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    outputs: int,
    hidden_size: int | None = None,
    direction: str = "forward",
    layout: int = 0,
    clip: float | None = None,
    input_forget: int = 0,
    activations: Sequence[str] = (),
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
) -> tuple[Tensor, ...]:
    """LSTM with gates i, o, f, c, and peepholes i, o, f."""
    names = activations or ["Sigmoid", "Tanh", "Tanh"] * len(w)
    functions = _functions(names, activation_alpha, activation_beta)

    def step(d: int) -> tuple[Tensor, Tensor, _Step]:
        peep = None if peepholes is None else peepholes[d].chunk(3)
        own = tuple(functions[3 * d : 3 * d + 3])
        run = partial(_lstm_step, r[d], peep, own, clip, bool(input_forget))
        return w[d], _bias(bias, d, w).sum(0), run

    return _run(step, x, len(w), r, lengths, (h, c), direction, layout)


def _rnn_step(
    r: Tensor, f: Callable[[Tensor], Tensor], clip: float | None, x: Tensor, state: tuple[Tensor]
) -> tuple[Tensor, ...]:
    return (f(_clipped(x + state[0] @ r.T, clip)),)


def _gru_step(
    r: Tensor,
    bias: Tensor,
    f: Callable[[Tensor], Tensor],
    g: Callable[[Tensor], Tensor],
    clip: float | None,
    linear_before_reset: bool,
    x: Tensor,
    state: tuple[Tensor],
) -> tuple[Tensor, ...]:
    h = state[0]
    n = h.shape[-1]
    zr = f(_clipped(x[:, : 2 * n] + h @ r[: 2 * n].T + bias[: 2 * n], clip))
    z, reset = zr.chunk(2, -1)
    if linear_before_reset:
        inner = reset * (h @ r[2 * n :].T + bias[2 * n :])
    else:
        inner = (reset * h) @ r[2 * n :].T + bias[2 * n :]
    new = g(_clipped(x[:, 2 * n :] + inner, clip))
    return ((1 - z) * new + z * h,)


def _lstm_step(
    r: Tensor,
    peep: tuple[Tensor, ...] | None,
    functions: tuple[Callable[[Tensor], Tensor], ...],
    clip: float | None,
    input_forget: bool,
    x: Tensor,
    state: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    f, g, activate = functions
    h, c = state
    i, o, forget, candidate = (x + h @ r.T).chunk(4, -1)
    if peep is not None:
        i, forget = i + peep[0] * c, forget + peep[2] * c
    i = f(_clipped(i, clip))
    forget = 1 - i if input_forget else f(_clipped(forget, clip))
    c = forget * c + i * g(_clipped(candidate, clip))
    if peep is not None:
        o = o + peep[1] * c
    return f(_clipped(o, clip)) * activate(c), c


def _run(
    cell: Callable[[int], tuple[Tensor, Tensor, _Step]],
    x: Tensor,
    directions: int,
    r: Tensor,
    lengths: Tensor | None,
    initial: tuple[Tensor | None, ...],
    direction: str,
    layout: int,
) -> tuple[Tensor, ...]:
    """Y [steps, directions, batch, hidden] and the last states [directions, batch, hidden]."""
    x = x.transpose(0, 1) if layout else x
    ends = None if lengths is None else lengths.to(torch.int64)
    sequences, states = [], []
    for d in range(directions):
        weight, bias, step = cell(d)
        backwards = direction == "reverse" or d == 1
        given = _reversed(x, ends) if backwards else x
        start = tuple(_start(s, d, layout, x, r.shape[-1]) for s in initial)
        y, last = _loop(step, given @ weight.T + bias, start, ends)
        sequences.append(_reversed(y, ends) if backwards else y)
        states.append(last)
    y = torch.stack(sequences, 1)
    lasts = [torch.stack(parts) for parts in zip(*states, strict=True)]
    if layout:
        return y.permute(2, 0, 1, 3), *(last.transpose(0, 1) for last in lasts)
    return y, *lasts


def _loop(
    step: _Step, x: Tensor, state: tuple[Tensor, ...], ends: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    ys = []
    for t, row in enumerate(x.unbind(0)):
        new = step(row, state)
        if ends is None:
            state = new
            ys.append(new[0])
            continue
        runs = (t < ends).reshape(-1, 1)
        state = tuple(torch.where(runs, a, b) for a, b in zip(new, state, strict=True))
        ys.append(torch.where(runs, new[0], torch.zeros_like(new[0])))
    return torch.stack(ys), state


def _reversed(x: Tensor, ends: Tensor | None) -> Tensor:
    """The steps from the end of each sequence to its start."""
    if ends is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0]).reshape(-1, 1)
    index = torch.where(steps < ends, ends - 1 - steps, steps)
    return x[index, torch.arange(x.shape[1])]


def _start(state: Tensor | None, d: int, layout: int, x: Tensor, hidden: int) -> Tensor:
    if state is None:
        return x.new_zeros(x.shape[1], hidden)
    return state[:, d] if layout else state[d]


def _bias(bias: Tensor | None, d: int, w: Tensor) -> Tensor:
    """The biases of W and R, [2, gates · hidden]."""
    return w.new_zeros(2, w.shape[1]) if bias is None else bias[d].reshape(2, -1)


def _clipped(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else x.clamp(-limit, limit)


def _functions(
    names: Sequence[str], alphas: Sequence[float], betas: Sequence[float]
) -> list[Callable[[Tensor], Tensor]]:
    """Activations by name; each takes its numbers from the lists in order, if it has any."""
    left, right = list(alphas), list(betas)
    found: list[Callable[[Tensor], Tensor]] = []
    for name in names:
        takes = _TAKES.get(name.lower(), 0)
        a = left.pop(0) if takes and left else None
        b = right.pop(0) if takes > 1 and right else None
        found.append(partial(_ACTIVATIONS[name.lower()], a=a, b=b))
    return found


SEVERAL: dict[str, Callable[..., Any]] = {"GRU": gru, "LSTM": lstm, "RNN": rnn}
