"""The four small networks for 28x28 grey images, ten classes, in PyTorch.

Attribute names are the names of the initializers in the shipped `.onnx` files, so that `trained`
can fill a network from one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir
import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.ir.errors import UnknownName
from octavo.models import shipped

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CLASSES = 10


def conv_norm(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution without bias that keeps the grid, then its batch normalization."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def conv_norm_relu(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """`conv_norm` followed by a Relu."""
    return nn.Sequential(*conv_norm(inputs, outputs, kernel, stride, groups), nn.ReLU())


def pooled_head(channels: int) -> nn.Sequential:
    """Mean over the grid, then one linear layer to the classes."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class Residual(nn.Module):
    """Two convolutions with a shortcut (He et al. 2016, Figure 5 left)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a = conv_norm_relu(inputs, outputs, stride=stride)
        self.b = nn.Sequential(*conv_norm(outputs, outputs))
        same = stride == 1 and inputs == outputs
        self.d = nn.Identity() if same else nn.Sequential(*conv_norm(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.b(self.a(x)) + self.d(x))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project (Sandler et al. 2018, Figure 3b), with Relu."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        wide = inputs * expansion
        self.skip = stride == 1 and inputs == outputs
        self.f = nn.Sequential(
            conv_norm_relu(inputs, wide, 1),
            conv_norm_relu(wide, wide, 3, stride, groups=wide),
            *conv_norm(wide, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) if self.skip else self.f(x)


class EncoderBlock(nn.Module):
    """Self-attention and a Gelu layer, both normalized first (Dosovitskiy et al. 2021, eq. 2-3)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.m = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.attend(self.qkv(self.n1(x))))
        return x + self.m(self.n2(x))

    def attend(self, projected: Tensor) -> Tensor:
        """`[batch, tokens, 3 * width]` to `[batch, tokens, width]`."""
        batch, tokens, width = projected.shape[0], projected.shape[1], self.o.in_features
        heads = projected.reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5
        mixed = scores.softmax(-1) @ value
        return mixed.transpose(1, 2).reshape(batch, tokens, width)


class VisionTransformer(nn.Module):
    """A convolutional stem to 16 tokens, a class token, and four encoder blocks."""

    def __init__(self, width: int = 96, blocks: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.pe = nn.Sequential(
            conv_norm_relu(1, 24, 5, 2),
            conv_norm_relu(24, 48, 3, 2),
            nn.Conv2d(48, width, 3, 2, 1),
        )
        self.pos = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.b = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(blocks)))
        self.n, self.f = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.pe(x).flatten(2).transpose(1, 2)
        first = self.cls.expand(patches.shape[0], -1, -1)
        tokens = self.b(torch.cat([first, patches], 1) + self.pos)
        return self.f(self.n(tokens)[:, 0])


class RowLstm(nn.Module):
    """Reads an image as a sequence of rows with a bidirectional two-layer LSTM."""

    def __init__(self, units: int = 96) -> None:
        super().__init__()
        self.r = nn.LSTM(28, units, 2, batch_first=True, bidirectional=True)
        self.f = nn.Linear(2 * units, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.r(x.squeeze(1))
        return self.f(states.mean(1))


def resnet() -> nn.Module:
    """Three residual blocks after a 5x5 stem."""
    blocks = (Residual(24, 24, 1), Residual(24, 48, 1), Residual(48, 96, 2))
    return nn.Sequential(conv_norm_relu(1, 24, 5, 2), *blocks, pooled_head(96))


def mobile() -> nn.Module:
    """Four inverted residual blocks after a 3x3 stem."""
    shapes = ((16, 24, 1), (24, 32, 2), (32, 32, 1), (32, 64, 2))
    blocks = (InvertedResidual(*shape) for shape in shapes)
    return nn.Sequential(conv_norm_relu(1, 16, 3, 2), *blocks, pooled_head(64))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lstm": RowLstm,
    "mobile": mobile,
    "resnet": resnet,
    "vit": VisionTransformer,
}


def build(kind: str) -> nn.Module:
    """An untrained network: input float32 `[batch, 1, 28, 28]`, output logits `[batch, 10]`.

    Raises UnknownName for a kind that is not in `NETWORKS`.
    """
    if kind not in NETWORKS:
        raise UnknownName("network", kind, NETWORKS)
    return NETWORKS[kind]()


def trained(kind: str) -> nn.Module:
    """The network with the parameters of the shipped `.onnx` file, in inference mode."""
    network = build(kind)
    network.load_state_dict(_weights(shipped(f"fashion-{kind}"), network))
    return network.eval()


def _weights(path: Path, network: nn.Module) -> dict[str, Tensor]:
    graph = onnx_ir.load(path).graph
    stored = {name: value.const_value for name, value in graph.initializers.items()}
    # Equal parameters are stored once, the others are Identity nodes that read it.
    for node in graph:
        source = node.inputs[0] if node.op_type == "Identity" else None
        if source is not None:
            stored[node.outputs[0].name or ""] = source.const_value
    weights = dict(network.state_dict())
    for name in weights:
        tensor = stored.get(name)
        if tensor is not None:
            weights[name] = torch.from_numpy(tensor.numpy().copy())
    return weights
