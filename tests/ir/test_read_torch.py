"""PyTorch programs against torch itself."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from octavo.ir.errors import ModelError, UsageError
from octavo.ir.read import read
from octavo.ir.read_torch import read_torch
from octavo.ir.write import serialize

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from octavo.ir.model import Model

# float32 convolutions and sums in another order than torch.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 36, 5))
    network(torch.randn(16, 1, 8, 8))  # gives the normalization statistics of its own
    return network.train()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def exported(
    network: nn.Module, *inputs: torch.Tensor, **options: Any
) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.export.export(network, inputs, **options)


@pytest.fixture(scope="module")
def program(network: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    network.eval()
    batch = {0: torch.export.Dim.DYNAMIC}
    program = exported(network, images, dynamic_shapes=(batch,))
    network.train()
    return program


@pytest.fixture(scope="module")
def archive(
    program: torch.export.ExportedProgram, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "network.pt2"
    torch.export.save(program, path)
    return path


def run(model: Model, *inputs: torch.Tensor) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(serialize(model))
    names = [value.name for value in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    (output,) = session.run(None, feed)
    return np.asarray(output)


@torch.no_grad()
def expected(network: nn.Module, *inputs: torch.Tensor) -> np.ndarray[Any, Any]:
    network.eval()
    output = network(*inputs).numpy()
    network.train()
    return np.asarray(output)


def input_shape(model: Model, index: int = 0) -> list[str]:
    shape = model.graph.inputs[index].shape
    return [] if shape is None else [str(size) for size in shape]


def count(model: Model, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph)


def test_a_module_runs_like_torch_at_any_batch_in_inference_mode(
    network: nn.Module, images: torch.Tensor
) -> None:
    model = read(network, inputs=(images[:1],))
    assert network.training
    assert all(part.training for part in network.modules())
    assert input_shape(model) == ["batch", "1", "8", "8"]
    assert model.source.name == "Sequential"
    np.testing.assert_allclose(run(model, images), expected(network, images), atol=TOLERANCE)


def test_batch_normalization_stays_visible(network: nn.Module, images: torch.Tensor) -> None:
    model = read_torch(network, images)
    assert count(model, "BatchNormalization") == 1
    assert count(model, "Dropout") == 0


@pytest.mark.parametrize("kind", ["program", "file", "graph module", "traced"])
def test_each_form_runs_like_torch(
    kind: str,
    network: nn.Module,
    images: torch.Tensor,
    program: torch.export.ExportedProgram,
    archive: Path,
) -> None:
    forms: dict[str, Callable[[], Model]] = {
        "program": lambda: read_torch(program),
        "file": lambda: read(archive),
        "graph module": lambda: read_torch(program.module(), (images,)),
        "traced": lambda: read_torch(torch.fx.symbolic_trace(network), (images,)),
    }
    model = forms[kind]()
    two = images[:2]
    np.testing.assert_allclose(run(model, two), expected(network, two), atol=TOLERANCE)


def test_the_source_of_a_file_is_its_name_and_digest(archive: Path) -> None:
    source = read(archive).source
    assert source.name == "network.pt2"
    assert source.bytes == archive.stat().st_size
    assert len(source.sha256) == 64


def test_the_same_module_gives_the_same_bytes_without_paths_of_the_machine(
    network: nn.Module, images: torch.Tensor
) -> None:
    first, second = (serialize(read_torch(network, images)) for _ in range(2))
    assert first == second
    assert b".py" not in first


def test_training_the_module_on_does_not_change_the_model(images: torch.Tensor) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    before = expected(network, images)
    model = read_torch(network, images)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    np.testing.assert_allclose(run(model, images), before, atol=TOLERANCE)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.embedding(ids) * mask[..., None])
        return output


def test_tied_weights_stay_one_tensor_and_every_input_gets_the_batch() -> None:
    network = Tied()
    model = read_torch(network, (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)))
    weights = {id(v.const_value) for v in model.graph.initializers.values() if v.shape == (9, 4)}
    assert len(weights) == 1
    assert [input_shape(model, index)[0] for index in (0, 1)] == ["batch", "batch"]
    ids, mask = torch.arange(9).reshape(3, 3), torch.rand(3, 3)
    np.testing.assert_allclose(run(model, ids, mask), expected(network, ids, mask), atol=TOLERANCE)


class OnlyThree(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.shape[0] == 3 else x.flatten()


class Singular(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = torch.linalg.svdvals(x)
        return values


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.add(x, getattr(x, "no_such_attribute"))  # noqa: B009


def test_a_fixed_batch_is_a_warning_with_the_reason(images: torch.Tensor) -> None:
    with pytest.warns(UserWarning, match=r"OnlyThree is read with fixed shapes: .*static shape"):
        model = read_torch(OnlyThree(), images)
    assert input_shape(model) == ["3", "1", "8", "8"]


def test_an_operator_without_onnx_form_is_named(images: torch.Tensor) -> None:
    with pytest.raises(ModelError, match=r"aten\._linalg_svd\.default") as caught:
        read_torch(Singular(), images)
    assert caught.value.where == "Singular"


def test_an_error_of_forward_is_told(images: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="no_such_attribute"):
        read_torch(Broken(), images)


def test_missing_or_superfluous_inputs(
    network: nn.Module, program: torch.export.ExportedProgram, images: torch.Tensor
) -> None:
    with pytest.raises(UsageError, match="Sequential cannot be read without example inputs"):
        read_torch(network)
    with pytest.raises(UsageError, match="fixes its own inputs"):
        read_torch(program, (images,))


def test_a_program_in_training_mode_is_refused(network: nn.Module, images: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="training mode"):
        read_torch(exported(network.train(), images))


def test_torch_is_optional(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match=r"octavo\[torch\]"):
        read_torch(network)
