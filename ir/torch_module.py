"""A model as a torch graph with gradients: its float constants are parameters.

One table gives the torch function of every ONNX operator; operators without an entry are
expanded where ONNX defines them by a function. Integers, shapes among them, are computed as the
graph runs. Import this module only where torch is wanted: it loads torch.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

import onnx_ir
import torch
from onnx_ir import AttributeType, DataType
from torch import Tensor

from octavo.ir import (
    torch_ops_fourier,
    torch_ops_gather,
    torch_ops_math,
    torch_ops_nn,
    torch_ops_quant,
    torch_ops_recurrent,
    torch_ops_reduce,
    torch_ops_resize,
    torch_ops_shape,
    torch_ops_window,
)
from octavo.ir.errors import NotDifferentiable, UnknownName
from octavo.ir.torch_functions import function_of
from octavo.ir.torch_values import DTYPES, tensor_of, widened

if TYPE_CHECKING:
    from onnx_ir import TensorProtocol

    from octavo.ir.model import Model

# Functions that return one tensor, and those that return a tuple and are told how many of its
# members the node names.
OPS: Mapping[str, Callable[..., Any]] = {
    **torch_ops_math.OPS,
    **torch_ops_reduce.OPS,
    **torch_ops_shape.OPS,
    **torch_ops_gather.OPS,
    **torch_ops_nn.OPS,
    **torch_ops_window.OPS,
    **torch_ops_resize.OPS,
    **torch_ops_quant.OPS,
    **torch_ops_fourier.OPS,
}
SEVERAL: Mapping[str, Callable[..., Any]] = {
    **torch_ops_reduce.SEVERAL,
    **torch_ops_shape.SEVERAL,
    **torch_ops_nn.SEVERAL,
    **torch_ops_window.SEVERAL,
    **torch_ops_recurrent.SEVERAL,
    **torch_ops_quant.SEVERAL,
}
_DTYPE_ATTRIBUTES = {"to", "dtype", "output_dtype", "output_datatype", "precision"}


@final
@dataclass(frozen=True, eq=False)
class TorchGraph:
    """A model in torch.

    `parameters` are the float initializers by name. They share memory with the model's arrays
    unless those lie in a file, so never write to them: give `run` overrides. `attributes` names
    the module's attribute of every initializer, integer buffers included. `batched` says that
    the first axis of every input may have any size.
    """

    module: torch.fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: Mapping[str, torch.nn.Parameter]
    attributes: Mapping[str, str]
    batched: bool
    double: bool

    def run(
        self, feed: Mapping[str, Tensor], overrides: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The outputs by name; `overrides` replace initializers and may carry gradients.

        Raises UnknownName for an override that is no initializer in use or a missing input.
        """
        args = tuple(self._input(feed, name) for name in self.inputs)
        if overrides:
            found = torch.func.functional_call(self.module, self._renamed(overrides), args)
        else:
            found = self.module(*args)
        return dict(zip(self.outputs, found, strict=True))

    def _input(self, feed: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in feed:
            raise UnknownName("input", name, feed)
        value = feed[name]
        return value.to(widened(value.dtype, self.double))

    def _renamed(self, overrides: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name in overrides:
            if name not in self.attributes:
                raise UnknownName("initializer", name, self.attributes)
        return {self.attributes[name]: value for name, value in overrides.items()}


def differentiable(
    model: Model, outputs: Sequence[str] | None = None, *, double: bool = False
) -> TorchGraph:
    """The torch graph that computes `outputs`: any values by name, the graph's own by default.

    `double` computes in float64 whatever the model keeps in float32. Raises NotDifferentiable
    for an operator that has no torch form and UnknownName for an output that does not exist.
    """
    lowering = _Lowering(model, double)
    wanted = [str(value.name) for value in model.graph.outputs] if outputs is None else outputs
    return lowering.run(wanted)


class _Lowering:
    """Builds one torch graph; `nodes` are the values that exist so far."""

    def __init__(self, model: Model, double: bool) -> None:
        self.model, self.double = model, double
        self.fx = torch.fx.Graph()
        self.root = torch.nn.Module()
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.attributes: dict[str, str] = {}
        self.nodes: dict[onnx_ir.Value, torch.fx.Node] = {}
        self.count = 0

    def run(self, outputs: Sequence[str]) -> TorchGraph:
        graph = self.model.graph
        inputs = [value for value in graph.inputs if value.name not in graph.initializers]
        for k, value in enumerate(inputs):
            self.nodes[value] = self.fx.placeholder(f"input_{k}")
        named = _values(graph)
        for name in outputs:
            if name not in named:
                raise UnknownName("value", name, named)
        wanted = [named[name] for name in outputs]
        for node in _needed(graph, wanted):
            self.lower(node, {})
        self.fx.output(tuple(self.value(value) for value in wanted))
        self.fx.lint()
        return TorchGraph(
            torch.fx.GraphModule(self.root, self.fx),
            tuple(str(value.name) for value in inputs),
            tuple(outputs),
            MappingProxyType(self.parameters),
            MappingProxyType(self.attributes),
            all(_any_size(value) for value in inputs),
            self.double,
        )

    def lower(self, node: onnx_ir.Node, given: Mapping[str, onnx_ir.Attr]) -> None:
        """Add a node; `given` are the attributes of the function call that it is part of."""
        if node.op_type == "Constant" and not node.domain:
            self.nodes[node.outputs[0]] = self.constant(_constant(node, given))
            return
        tables = (torch_ops_quant.OCTAVO, {}) if node.domain == "octavo" else (OPS, SEVERAL)
        one, several = ({}, {}) if node.domain not in ("", "octavo") else tables
        function = one.get(node.op_type) or several.get(node.op_type)
        if function is None:
            self.expand(node, given)
            return
        args = tuple(None if v is None else self.value(v) for v in node.inputs)
        kwargs = self.keywords(node, given, function)
        if node.op_type not in several:
            self.nodes[node.outputs[0]] = self.fx.call_function(function, args, kwargs)
            return
        made = self.fx.call_function(function, args, {**kwargs, "outputs": _named_outputs(node)})
        for k, value in enumerate(node.outputs[: _named_outputs(node)]):
            self.nodes[value] = self.fx.call_function(operator.getitem, (made, k))

    def expand(self, node: onnx_ir.Node, given: Mapping[str, onnx_ir.Attr]) -> None:
        """Add the body of the function that ONNX defines the operator by."""
        body = function_of(node, self.model.ir) if not given else None
        if body is None:
            raise NotDifferentiable(node.op_type, node.name or "", self.model.source.name)
        for formal, actual in zip(body.inputs, node.inputs, strict=False):
            if actual is not None:
                self.nodes[formal] = self.value(actual)
        attributes = {**body.attributes, **node.attributes}
        for inner in body:
            # A formal input that the call leaves out is left out inside as well.
            for k, value in enumerate(inner.inputs):
                if value is not None and value in body.inputs and value not in self.nodes:
                    inner.replace_input_with(k, None)
            self.lower(inner, attributes)
        for formal, actual in zip(body.outputs, node.outputs, strict=False):
            self.nodes[actual] = self.value(formal)

    def value(self, value: onnx_ir.Value) -> torch.fx.Node:
        if value not in self.nodes:
            assert value.const_value is not None, value.name
            self.nodes[value] = self.constant(value.const_value, str(value.name))
        return self.nodes[value]

    def constant(self, tensor: TensorProtocol, name: str | None = None) -> torch.fx.Node:
        """A constant: a parameter if it is an initializer of floats, else a buffer."""
        if tensor.dtype not in DTYPES:
            raise NotDifferentiable(f"constant of {tensor.dtype}", name or "", self.where)
        value = tensor_of(tensor)
        value = value.to(widened(value.dtype, self.double))
        attribute = f"constant_{self.count}"
        self.count += 1
        if name is not None:
            self.attributes[name] = attribute
        if name is not None and tensor.dtype in _GRADIENT_TYPES:
            self.parameters[name] = torch.nn.Parameter(value)
            self.root.register_parameter(attribute, self.parameters[name])
        else:
            self.root.register_buffer(attribute, value)
        return self.fx.get_attr(attribute)

    @property
    def where(self) -> str:
        return self.model.source.name

    def keywords(
        self,
        node: onnx_ir.Node,
        given: Mapping[str, onnx_ir.Attr],
        function: Callable[..., Any],
    ) -> dict[str, Any]:
        """Attributes as keyword arguments; one that the function lacks is an error."""
        found: dict[str, Any] = {}
        for name, attribute in node.attributes.items():
            actual = given.get(str(attribute.ref_attr_name)) if attribute.is_ref() else attribute
            if actual is None:
                continue
            if name not in _parameters(function):
                what = f"{node.op_type} with attribute '{name}'"
                raise NotDifferentiable(what, node.name or "", self.where)
            found[name] = self.keyword(name, actual, node)
        return found

    def keyword(self, name: str, attribute: onnx_ir.Attr, node: onnx_ir.Node) -> Any:
        match attribute.type:
            case AttributeType.TENSOR:
                return self.constant(attribute.as_tensor())
            case AttributeType.INT if name in _DTYPE_ATTRIBUTES:
                code = attribute.as_int()
                if not code:
                    return None
                if DataType(code) not in DTYPES:
                    raise NotDifferentiable(
                        f"{node.op_type} to {DataType(code)}", node.name or "", self.where
                    )
                return widened(DTYPES[DataType(code)], self.double)
            case AttributeType.INTS | AttributeType.FLOATS | AttributeType.STRINGS:
                return list(attribute.value)
        return attribute.value


_GRADIENT_TYPES = {DataType.FLOAT, DataType.DOUBLE, DataType.FLOAT16, DataType.BFLOAT16}


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}


def _values(graph: onnx_ir.Graph) -> dict[str, onnx_ir.Value]:
    made = [value for node in graph for value in node.outputs if value.name]
    every = [*graph.inputs, *graph.initializers.values(), *made]
    return {str(value.name): value for value in every}


def _needed(graph: onnx_ir.Graph, wanted: Sequence[onnx_ir.Value]) -> list[onnx_ir.Node]:
    """The nodes behind some values, in the graph's order."""
    found: set[onnx_ir.Node] = set()
    waiting = [value.producer() for value in wanted]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        waiting.extend(value.producer() for value in node.inputs if value is not None)
    return [node for node in graph if node in found]


def _any_size(value: onnx_ir.Value) -> bool:
    return value.shape is not None and len(value.shape) > 0 and not isinstance(value.shape[0], int)


def _named_outputs(node: onnx_ir.Node) -> int:
    return max((k + 1 for k, value in enumerate(node.outputs) if value.name), default=1)


def _constant(node: onnx_ir.Node, given: Mapping[str, onnx_ir.Attr]) -> TensorProtocol:
    (attribute,) = node.attributes.values()
    actual = given[str(attribute.ref_attr_name)] if attribute.is_ref() else attribute
    if actual.type == AttributeType.TENSOR:
        return actual.as_tensor()
    kind = DataType.INT64 if actual.type.name.startswith("INT") else DataType.FLOAT
    return onnx_ir.tensor(actual.value, kind)
