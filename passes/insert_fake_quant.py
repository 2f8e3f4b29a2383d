"""Insert FakeQuant nodes for the plan: on activations where placed, on every planned weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.ir.constants import own_constant
from octavo.ir.facts import Fact, Placement, Plan, Range, Ranges
from octavo.ir.fake_quant import DOMAIN, OPTION, declare_functions, fake_quant_node
from octavo.ir.mapped import reading
from octavo.ir.quant import QuantParams, QuantSpec, fitted, params_for_range, params_for_weight
from octavo.ir.reference import Reference
from octavo.passes.base import Pass
from octavo.passes.tied_weights import stored, tied_weights

if TYPE_CHECKING:
    from onnx_ir import TensorProtocol

    from octavo.ir.facts import Option, Site
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext


@final
@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Make the plan part of the graph, as nodes that stock runtimes execute.

    **What it does.** Adds a FakeQuant after every placed value, with parameters from its group's
    calibrated range, and one between every planned weight and its reader; activations of dynamic
    nodes get a FakeQuantDynamic, those of float8 nodes a FakeQuantFloat8 up to the largest
    magnitude seen. The reader carries its option as `octavo.option`.
    **Why.** The graph now computes what the integer kernels will, so it can be run, compared and
    lowered to any target.
    **When it does not apply.** Values without a site and nodes the plan leaves float.
    **Cost and accuracy.** Rounds every weight to its grid: at most half a scale per element.
    """

    name = "insert-fake-quant"
    requires = (Plan,)
    produces = (Reference,)
    preserves = (Fact,)

    def run(self, model: Model, ctx: PassContext) -> Model:
        reference = Reference(model.clone())
        placement = model.find(Placement) or Placement({}, {}, {})
        values = _values(model)
        params = _site_params(placement, values, model.find(Ranges))
        for name, site in placement.sites.items():
            value = values[name]
            _insert_site(model, value, params[site.group], placement.consumers[name])
            ctx.count("activation quantizers")
        self._insert_weights(model, ctx)
        declare_functions(model.ir)
        model.graph.sort()
        return model.with_fact(reference)

    def _insert_weights(self, model: Model, ctx: PassContext) -> None:
        plan = model.fact(Plan)
        tied = tied_weights(model, plan.by_node, ctx.target)
        done: dict[tuple[str, QuantSpec], onnx_ir.Value] = {}
        for node in list(model.graph):
            choice = plan.by_node.get(node.name or "")
            if choice is None or choice.option.method == "float":
                continue
            node.metadata_props[OPTION] = str(choice.option)
            row = ctx.target.support(node, choice.option.method).row
            if row is None:
                continue
            for index in row.weights if choice.option.weight is not None else ():
                _insert_weight(model, node, index, choice.option, tied, done)
                ctx.count("weights")
            if choice.option.method == "dynamic":
                _insert_dynamic(model, node, row.operands[0])
            if choice.option.method == "float8":
                for index in row.operands:
                    _insert_float8(model, node, index, ctx.target.half_scales)


def _values(model: Model) -> dict[str, onnx_ir.Value]:
    graph = model.graph
    made = (value for node in graph for value in node.outputs)
    return {v.name or "": v for v in (*graph.inputs, *graph.initializers.values(), *made)}


def _site_params(
    placement: Placement, values: Mapping[str, onnx_ir.Value], ranges: Ranges | None
) -> dict[str, QuantParams]:
    """One set of parameters per group: the union of its members' ranges, within its bounds."""
    groups: dict[str, list[Site]] = {}
    for site in placement.sites.values():
        groups.setdefault(site.group, []).append(site)
    return {name: _group_params(sites, values, ranges) for name, sites in groups.items()}


def _group_params(
    sites: Iterable[Site], values: Mapping[str, onnx_ir.Value], ranges: Ranges | None
) -> QuantParams:
    members = list(sites)
    fixed = next((s.fixed for s in members if s.fixed is not None), None)
    if fixed is not None:
        return params_for_range(members[0].spec, *fixed)
    found = [_range(values[s.value], ranges) for s in members]
    low, high = min(r.low for r in found), max(r.high for r in found)
    if any(s.nonnegative for s in members):
        low = 0.0
    high = min([high, *(s.clip_high for s in members if s.clip_high is not None)])
    return params_for_range(members[0].spec, low, high)


def _range(value: onnx_ir.Value, ranges: Ranges | None) -> Range:
    if value.const_value is not None:
        array = value.const_value.numpy()
        low, high = float(np.min(array)), float(np.max(array))
        return Range(low, high, low, high)
    assert ranges is not None
    return ranges.by_value[value.name or ""]


def _insert_site(
    model: Model, value: onnx_ir.Value, params: QuantParams, readers: tuple[str, ...]
) -> None:
    producer = value.producer()
    output = value.is_graph_output() and producer is not None and bool(readers or value.uses())
    uses = [use for use in value.uses() if use.node.name in set(readers)]
    node = fake_quant_node(value, params, f"{value.name}_quant", model.graph)
    if producer is not None:
        model.graph.insert_after(producer, node)
    else:
        model.graph.insert_before(model.graph[0], node)
    quantized = node.outputs[0]
    quantized.name = f"{value.name}_fq"
    for use in uses:
        use.node.replace_input_with(use.idx, quantized)
    if output or (value.is_graph_output() and producer is not None):
        _hand_over_output(model, value, quantized)


def _hand_over_output(model: Model, value: onnx_ir.Value, quantized: onnx_ir.Value) -> None:
    """The quantized value becomes the graph output and takes its name."""
    name = value.name
    value.name = f"{name}_float"
    quantized.name = name
    quantized.shape, quantized.type = value.shape, value.type
    outputs = model.graph.outputs
    for index, output in enumerate(outputs):
        if output is value:
            outputs[index] = quantized


def _insert_weight(
    model: Model,
    node: onnx_ir.Node,
    index: int,
    option: Option,
    tied: set[str],
    done: dict[tuple[str, QuantSpec], onnx_ir.Value],
) -> None:
    """Quantize a weight; readers of one share it, tied ones whatever their kernels."""
    read = node.inputs[index]
    assert read is not None
    assert option.weight is not None
    weight, spec = stored(read, option.weight)
    is_tied = weight.name in tied
    if not is_tied:
        weight = own_constant(read, model.graph)
        spec = fitted(option.weight, tuple(_tensor(weight).shape.numpy()))
    key = (f"{weight.name} {'tied' if is_tied else option.method}", spec)
    if key not in done:
        params = reading(_tensor(weight), lambda array: params_for_weight(array, spec))
        number = sum(known == key[0] for known, _ in done)
        name = f"{weight.name}_{option.method}{number or ''}"
        quantizer = fake_quant_node(weight, params, name, model.graph)
        quantizer.outputs[0].name = f"{name}_fq"
        model.graph.insert_before(node, quantizer)
        done[key] = quantizer.outputs[0]
    turns = is_tied and weight is not read
    node.replace_input_with(index, _turned(model, node, done[key]) if turns else done[key])


def _tensor(value: onnx_ir.Value) -> TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _turned(model: Model, before: onnx_ir.Node, value: onnx_ir.Value) -> onnx_ir.Value:
    """The transpose of a quantized matrix, one for all that read it turned."""
    readers = (reader for reader in value.consumers() if reader.op_type == "Transpose")
    made = next(readers, None)
    if made is None:
        name, shape = f"{value.name}_turned", value.shape
        made = onnx_ir.node("Transpose", [value], {"perm": [1, 0]}, name=name)
        made.outputs[0].name = name
        made.outputs[0].type = value.type
        made.outputs[0].shape = None if shape is None else onnx_ir.Shape(tuple(shape)[::-1])
        model.graph.insert_before(before, made)
    return made.outputs[0]


def _insert_dynamic(model: Model, node: onnx_ir.Node, index: int) -> None:
    value = node.inputs[index]
    assert value is not None
    readers = (u.node for u in value.uses())
    made = next((n for n in readers if n.op_type == "FakeQuantDynamic"), None)
    if made is None:
        name = f"{value.name}_dynamic"
        made = onnx_ir.node("FakeQuantDynamic", [value], domain=DOMAIN, name=name)
        made.outputs[0].name = f"{name}_fq"
        made.outputs[0].shape, made.outputs[0].type = value.shape, value.type
        model.graph.insert_before(node, made)
    node.replace_input_with(index, made.outputs[0])


def _insert_float8(model: Model, node: onnx_ir.Node, index: int, half_scales: bool) -> None:
    """Float8 numbers lose nothing by a wide range: their steps are relative."""
    value = node.inputs[index]
    assert value is not None
    name = f"{value.name}_float8"
    made = next((u.node for u in value.uses() if u.node.name == name), None)
    if made is None:
        found = _range(value, model.find(Ranges))
        spec = QuantSpec("f8", symmetric=True, half_scales=half_scales)
        params = params_for_range(spec, found.observed_low, found.observed_high)
        made = fake_quant_node(value, params, name, model.graph)
        made.outputs[0].name = f"{name}_fq"
        model.graph.insert_before(node, made)
    node.replace_input_with(index, made.outputs[0])
