"""How axes go through operators with weights: products, convolutions, recurrences and pools."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.axis_rules_elementwise import broadcast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnx_ir

    from octavo.ir.axis_links import Axis, NodeLinks

GATES: Mapping[str, int] = {"LSTM": 4, "GRU": 3, "RNN": 1}
_UNSEEN = "neither operand is zero where the weights of these indices are"
_SPATIAL = "neighbours along this axis are combined"


def _matmul(links: NodeLinks) -> None:
    a, b = _operands(links)
    output, rank_a, rank_b = links.output, len(links.shape(a)), len(links.shape(b))
    contracted = links.axis(a, -1), links.axis(b, -2 if rank_b > 1 else 0)
    _contract(links, *contracted)
    if rank_a > 1:
        links.same((a, -2), (output, -2 if rank_b > 1 else -1))
    if rank_b > 1:
        links.same((b, -1), (output, -1))
    if rank_a > 1 and rank_b > 1:
        broadcast(links, a, output, skip=2)
        broadcast(links, b, output, skip=2)
    for value, rank in ((a, rank_a), (b, rank_b)):
        if min(rank_a, rank_b) == 1:
            for axis in range(rank - 2):
                links.same((value, axis), (output, axis))


def _gemm(links: NodeLinks) -> None:
    a, b = _operands(links)
    turned = [links.node.attributes.get_int(name, 0) for name in ("transA", "transB")]
    _contract(links, links.axis(a, 1 - turned[0]), links.axis(b, turned[1]))
    links.same((a, turned[0]), (links.output, 0))
    links.same((b, 1 - turned[1]), (links.output, 1))
    bias = links.input(2)
    if bias is not None:
        broadcast(links, bias, links.output)


def _contract(links: NodeLinks, a: Axis, b: Axis) -> None:
    """Two axes that are summed over: exact where one operand is zero."""
    from octavo.ir.axis_links import Link

    links.links.append(Link(a, b))
    links.vanish(_UNSEEN, a, b)


def _operands(links: NodeLinks) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    a, b = links.input(0), links.input(1)
    assert a is not None
    assert b is not None
    return a, b


def _conv(links: NodeLinks) -> None:
    """Channels within all groups alike, or whole groups."""
    x, weight = _operands(links)
    _image(links, x)
    groups = links.node.attributes.get_int("group", 1)
    y, bias = (links.output, 1), links.input(2)
    if bias is not None:
        links.same((bias, 0), y)
    if groups == 1:
        _contract(links, links.axis(x, 1), links.axis(weight, 1))
        links.same((weight, 0), y)
        return
    group = links.own("group", groups)
    inside = links.axis(weight, 1)
    outside = links.own("out", links.shape(weight)[0] // groups)
    links.block([links.axis(x, 1)], [group, inside])
    links.block([links.axis(*y)], [group, outside])
    links.block([links.axis(weight, 0)], [group, outside])


def _conv_transpose(links: NodeLinks) -> None:
    x, weight = _operands(links)
    _image(links, x)
    groups = links.node.attributes.get_int("group", 1)
    y, bias = (links.output, 1), links.input(2)
    if bias is not None:
        links.same((bias, 0), y)
    if groups == 1:
        _contract(links, links.axis(x, 1), links.axis(weight, 0))
        links.same((weight, 1), y)
        return
    group = links.own("group", groups)
    inside = links.own("in", links.shape(weight)[0] // groups)
    links.block([links.axis(x, 1)], [group, inside])
    links.block([links.axis(weight, 0)], [group, inside])
    links.block([links.axis(*y)], [group, links.axis(weight, 1)])


def _image(links: NodeLinks, x: onnx_ir.Value) -> None:
    links.same((x, 0), (links.output, 0))
    for axis in range(2, len(links.shape(x))):
        links.freeze(x, axis, _SPATIAL)
        links.freeze(links.output, axis, _SPATIAL)


def _pool(links: NodeLinks) -> None:
    x = links.input(0)
    assert x is not None
    if any(value.name for value in links.node.outputs[1:]):
        links.freeze_all("it gives positions")
        return
    _image(links, x)
    links.same((x, 1), (links.output, 1))


def _recurrent(links: NodeLinks) -> None:
    """A hidden unit is a row of every gate in W and R, a column of R, and a state."""
    node, x = links.node, links.input(0)
    weight, recurrence = links.input(1), links.input(2)
    assert x is not None
    assert weight is not None
    assert recurrence is not None
    if node.attributes.get_int("layout", 0):
        links.freeze_all("its first axis is the batch")
        return
    size = links.shape(recurrence)[2]
    hidden = recurrence, 2
    _contract(links, links.axis(x, 2), links.axis(weight, 2))
    initial = [links.input(index) for index in (5, 6)]
    for value in (*node.outputs, *filter(None, initial)):
        if value.name:
            links.same((value, -1), hidden)
    for rows in (weight, recurrence, links.input(3), links.input(7)):
        if rows is not None:
            every = np.arange(links.shape(rows)[1])
            links.same((rows, 1), hidden, every, every % size)
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
    for value in values:
        for axis in range(
            len(links.shape(value)) - (1 if value not in (weight, recurrence) else 2)
        ):
            links.freeze(value, axis, "steps, directions and samples of a recurrence stay")
    lengths = links.input(4)
    if lengths is not None:
        links.freeze_all("lengths of sequences stay", [lengths])


def _einsum(links: NodeLinks) -> None:
    """Axes of the same letter; letters that the output lacks are summed over."""
    equation = links.node.attributes.get_string("equation", "").replace(" ", "")
    if "." in equation or "->" not in equation:
        links.freeze_all("an equation without a plain list of axes")
        return
    before, after = equation.split("->")
    first: dict[str, tuple[onnx_ir.Value, int]] = {
        c: (links.output, k) for k, c in enumerate(after)
    }
    summed: dict[str, list[Axis]] = {}
    for value, letters in zip(links.node.inputs, before.split(","), strict=True):
        assert value is not None
        for axis, letter in enumerate(letters):
            if letter in first:
                links.same(first[letter], (value, axis))
            first.setdefault(letter, (value, axis))
            if letter not in after:
                summed.setdefault(letter, []).append(links.axis(value, axis))
    for axes in summed.values():
        links.vanish(_UNSEEN, *axes)


RULES: Mapping[str, Callable[[NodeLinks], None]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    **dict.fromkeys(GATES, _recurrent),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _pool),
}
