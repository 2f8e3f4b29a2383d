"""What of a compressed graph may be learned: codes, scales, biases, norms."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.ir.extract import extract, values_by_name
from octavo.ir.facts import Placement
from octavo.ir.fake_quant import DOMAIN, params_of, set_rounded
from octavo.ir.levels import OP_TYPE as LEVELS
from octavo.ir.levels import levels_of, reset_levels
from octavo.ir.mapped import reading
from octavo.ir.quant import dequantize, quantize
from octavo.ir.reference import Reference
from octavo.passes.weight_quantizers import level_quantizers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.quant import QuantParams
    from octavo.ir.torch_rounding import LearnedWeight, RoundingMethod
    from octavo.ir.torch_student import Student

# Where an operator reads one number per channel; `None` for any of its inputs.
_VECTORS: Mapping[str, tuple[int, ...] | None] = {
    "Conv": (2,), "ConvTranspose": (2,), "Gemm": (2,), "LayerNormalization": (1, 2),
    "BatchNormalization": (1, 2), "InstanceNormalization": (1, 2), "GroupNormalization": (1, 2),
    "RMSNormalization": (1,), "SimplifiedLayerNormalization": (1,), "Add": None, "Mul": None,
}  # fmt: skip
_MATRICES = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (0, 1)}
_LEARNED = ("FakeQuant", "FakeQuantBlocks")


@final
@dataclass(frozen=True)
class Trainable:
    """The learnable parts of a compressed graph, all by name.

    `weights` are quantizers of constants; `vectors` biases, shifts and gains with one number per
    channel that one node alone reads; `activations` the scales of activation quantizers with the
    group whose scales must stay in proportion; `matrices` weights of layers that nothing quantizes.
    """

    model: Model
    weights: Mapping[str, onnx_ir.Node]
    vectors: Mapping[str, onnx_ir.Node]
    activations: Mapping[str, tuple[str, onnx_ir.Node]]
    matrices: Mapping[str, onnx_ir.Node] = field(default_factory=dict)

    @staticmethod
    def of(model: Model, quantizers: Sequence[str] = _LEARNED) -> Trainable:
        """Of weights, those whose quantizers are of these types."""
        placement = model.find(Placement) or Placement({}, {}, {})
        weights, activations = {}, {}
        for node in model.graph:
            if node.domain != DOMAIN or node.op_type not in quantizers or node.inputs[0] is None:
                continue
            value, scale = node.inputs[0], node.inputs[1]
            site = placement.sites.get((value.name or "").removesuffix("_float"))
            site = placement.sites.get(value.name or "") or site
            if value.const_value is not None and site is None and value.const_value.size:
                weights[node.name or ""] = node
            elif site is not None and site.fixed is None and scale is not None:
                activations[scale.name or ""] = (site.group, node)
        return Trainable(model, weights, _vectors(model), activations, _matrices(model))

    @cached_property
    def reference(self) -> Model:
        """The model before anything was rounded; itself where nothing was."""
        found = self.model.find(Reference)
        return found.model if found is not None else self.model.clone()

    def readers(self) -> dict[str, list[str]]:
        """The names of the nodes that read each quantized weight, by quantizer."""
        return {
            name: [use.node.name or "" for use in fake.outputs[0].uses()]
            for name, fake in self.weights.items()
        }

    def rounded_nodes(self) -> set[str]:
        """The nodes that read anything quantized."""
        fakes = (node for node in self.model.graph if node.domain == DOMAIN)
        uses = (use.node for fake in fakes for use in fake.outputs[0].uses())
        return {node.name or "" for node in uses if node.domain != DOMAIN}

    def student(
        self,
        inputs: Sequence[str],
        outputs: Sequence[str],
        methods: Mapping[str, RoundingMethod],
        *,
        vectors: bool,
        activations: bool,
        matrices: bool = False,
    ) -> Student:
        """The part from `inputs` to `outputs` in torch, with variables.

        `methods` say by which variables each quantized weight is learned; weights that are not
        among them stay as they are. Raises NotDifferentiable.
        """
        from octavo.ir.torch_module import differentiable
        from octavo.ir.torch_rounding import weight_rounding
        from octavo.ir.torch_student import Student

        fakes = {self._fed(name): self.weights[name] for name in methods}
        part = extract(self.model, (*inputs, *fakes), outputs)
        graph = differentiable(part)
        used = {name: fake for name, fake in fakes.items() if name in graph.inputs}
        found: dict[str, LearnedWeight] = {}
        for name, fake in used.items():
            if fake.op_type == LEVELS:
                found[name] = self._coding(fake)
                continue
            params, rounded = params_of(fake), present(fake)
            start = self.float_weight(fake)
            found[name] = weight_rounding(methods[fake.name or ""], start, rounded, params)
        moving = [n for n in self.vectors if n in graph.parameters] if vectors else []
        free = [n for n in self.matrices if n in graph.parameters] if matrices else []
        scales = {n: g for n, (g, _) in self.activations.items() if n in graph.parameters}
        scales = scales if activations else {}
        return Student(graph, found, tuple(moving), scales, tuple(free))

    def in_rows(self, inputs: Sequence[str]) -> bool:
        """Whether feeds of these values can be divided into samples along their first axis.

        Vectors between nodes may be shapes, whose first axis is something else.
        """
        given = {value.name or "": value for value in self.model.graph.inputs}
        known = values_by_name(self.model)
        inner = [known[name] for name in inputs if name not in given]
        free = all(_free(value) for value in given.values())
        return free and all(v.shape is not None and v.shape.rank() > 1 for v in inner)

    def float_weight(self, fake: onnx_ir.Node) -> NDArray[np.float32]:
        """The weight before it was rounded, or what is left of it where nobody kept that."""
        value, reference = fake.inputs[0], self.model.find(Reference)
        assert value is not None
        assert value.const_value is not None
        known = reference.model.graph.initializers if reference is not None else {}
        source = known.get(value.name or "")
        if source is None or source.const_value is None:
            return present(fake)
        array = reading(source.const_value, _copied)
        return array if array.shape == tuple(value.const_value.shape.numpy()) else present(fake)

    def write(self, student: Student) -> None:
        """Put what a student learned into the graph."""
        from octavo.ir.torch_bcq import CodedWeight
        from octavo.ir.torch_rounding import WeightRounding

        by_output = {self._fed(name): fake for name, fake in self.weights.items()}
        for name, weight in student.weights.items():
            if isinstance(weight, CodedWeight):
                reset_levels(by_output[name], *weight.result())
            elif isinstance(weight, WeightRounding):
                set_rounded(self.model.graph, by_output[name], *weight.result())
        for name, array in student.initializers().items():
            value = self.model.graph.initializers[name]
            value.const_value = onnx_ir.Tensor(array.copy(), name=name)

    def _coding(self, fake: onnx_ir.Node) -> LearnedWeight:
        """The variables of a weight of levels."""
        from octavo.ir.torch_bcq import CodedWeight

        weight = next(q for q in level_quantizers(self.model) if q.fake is fake).original()
        rounded, levels = levels_of(fake)
        return CodedWeight(weight, rounded, levels, fake.attributes.get_int("axis", 0))

    def _fed(self, name: str) -> str:
        return self.weights[name].outputs[0].name or ""


def present(fake: onnx_ir.Node) -> NDArray[np.float32]:
    """The grid value that a weight's quantizer gives now."""
    value = fake.inputs[0]
    assert value is not None
    assert value.const_value is not None
    params: QuantParams = params_of(fake)
    return reading(value.const_value, lambda array: dequantize(quantize(array, params), params))


def _vectors(model: Model) -> dict[str, onnx_ir.Node]:
    found = {}
    for node in model.graph:
        places = _VECTORS.get(node.op_type, ()) if not node.domain else ()
        for index, value in enumerate(node.inputs):
            wanted = places is None or index in places
            if wanted and value is not None and _is_vector(value):
                found[value.name or ""] = node
    return found


def _matrices(model: Model) -> dict[str, onnx_ir.Node]:
    """The float32 weights of layers that no quantizer reads."""
    found = {}
    for node in model.graph:
        for index in _MATRICES.get(node.op_type, ()) if not node.domain else ():
            value = node.inputs[index]
            tensor = value.const_value if value is not None else None
            if tensor is None or value is None or value.producer() is not None:
                continue
            if tensor.dtype == onnx_ir.DataType.FLOAT and tensor.shape.rank() > 1:
                found[value.name or ""] = node
    return found


def _is_vector(value: onnx_ir.Value) -> bool:
    """A constant of several float32 with one dimension that counts, and one reader."""
    tensor = value.const_value
    if tensor is None or value.producer() is not None or value.is_graph_output():
        return False
    dims = [size for size in tensor.shape.numpy() if size != 1]
    single = len(value.uses()) == 1 and not value.is_graph_input()
    return single and tensor.dtype == onnx_ir.DataType.FLOAT and len(dims) == 1


def _free(value: onnx_ir.Value) -> bool:
    """Whether the first axis may have any size."""
    return value.shape is not None and value.shape.rank() > 0 and not value.shape.is_static(0)


def _copied(array: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.array(array, np.float32)
