"""The public networks that come as bare weights, written again in PyTorch.

Parameters are named so that the loaders in `export_public.py` can fill them from the files that
their packages hold; each class says where the architecture is published.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

# Kernel, stride, expansion, inputs, outputs, repeats of each stage of EfficientNet-Lite0.
_STAGES = (
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 2),
    (5, 2, 6, 24, 40, 2),
    (3, 2, 6, 40, 80, 3),
    (5, 1, 6, 80, 112, 3),
    (5, 2, 6, 112, 192, 4),
    (3, 1, 6, 192, 320, 1),
)


class MobileBlock(nn.Module):
    """Expand, depthwise, project, with Relu6 and without squeeze-and-excitation."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.skip = stride == 1 and inputs == outputs
        expand = conv_norm(inputs, wide, 1, 1, relu=True) if expansion > 1 else nn.Identity()
        self.expand = expand
        self.depthwise = conv_norm(wide, wide, kernel, stride, groups=wide, relu=True)
        self.project = conv_norm(wide, outputs, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.skip else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019, Table 1, without squeeze-and-excitation and Swish).

    float32 `[batch, 3, 224, 224]` to logits `[batch, 1000]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 32, 3, 2, relu=True)
        blocks = []
        for kernel, stride, expansion, inputs, outputs, repeats in _STAGES:
            blocks.append(MobileBlock(kernel, stride, expansion, inputs, outputs))
            again = (MobileBlock(kernel, 1, expansion, outputs, outputs) for _ in range(1, repeats))
            blocks.extend(again)
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_norm(320, 1280, 1, 1, relu=True)
        self.classify = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        features = self.head(self.blocks(self.stem(x)))
        return self.classify(functional.adaptive_avg_pool2d(features, 1).flatten(1))


def conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1, relu: bool = False
) -> nn.Sequential:
    """Convolution without bias, padded as TensorFlow's "SAME", and its batch normalization."""
    # On an even grid, "SAME" with stride 2 pads one pixel more below and right than above and left.
    before, after = (kernel - 2) // 2, (kernel - 1) // 2
    pad = [nn.ZeroPad2d((before, after, before, after))] if stride == 2 else []
    padding = 0 if stride == 2 else kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    activation = [nn.ReLU6()] if relu else []
    return nn.Sequential(*pad, conv, nn.BatchNorm2d(outputs, eps=1e-3), *activation)


class BertBlock(nn.Module):
    """Self-attention and a Gelu layer, each followed by its LayerNorm (Devlin et al. 2019)."""

    def __init__(self, width: int, heads: int, wide: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, wide), nn.Linear(wide, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.size)
        mixed = (scores + bias).softmax(-1) @ value
        x = self.norm1(self.out(mixed.transpose(1, 2).reshape(x.shape)) + x)
        return self.norm2(self.down(functional.gelu(self.up(x))) + x)

    def split(self, x: Tensor) -> Tensor:
        """`[batch, tokens, width]` to `[batch, heads, tokens, width / heads]`."""
        return x.view(*x.shape[:2], self.heads, self.size).transpose(1, 2)


class Bert(nn.Module):
    """BERT's encoder as all-MiniLM-L6-v2 uses it.

    `input_ids` and `attention_mask`, int64 `[batch, seq]`, to `[batch, seq, 384]`.
    """

    def __init__(
        self, width: int = 384, blocks: int = 6, heads: int = 12, wide: int = 1536,
        vocabulary: int = 30522, positions: int = 512,
    ) -> None:  # fmt: skip
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width)
        self.kind = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(BertBlock(width, heads, wide) for _ in range(blocks))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        position = self.position.weight[: input_ids.shape[1]]
        x = self.norm(self.word(input_ids) + self.kind.weight[0] + position)
        hidden = 1.0 - attention_mask[:, None, None, :].to(x.dtype)
        bias = hidden * torch.finfo(x.dtype).min
        for block in self.blocks:
            x = block(x, bias)
        return x


class RmsNorm(nn.Module):
    """Scale by the root of the mean square (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions, then SwiGLU (Touvron et al. 2023)."""

    def __init__(self, width: int, heads: int, kv_heads: int, wide: int, epsilon: float) -> None:
        super().__init__()
        self.size = width // heads
        self.repeats = heads // kv_heads
        self.attn_norm = RmsNorm(width, epsilon)
        self.attn_q = nn.Linear(width, width, bias=False)
        self.attn_k = nn.Linear(width, kv_heads * self.size, bias=False)
        self.attn_v = nn.Linear(width, kv_heads * self.size, bias=False)
        self.attn_output = nn.Linear(width, width, bias=False)
        self.ffn_norm = RmsNorm(width, epsilon)
        self.ffn_gate = nn.Linear(width, wide, bias=False)
        self.ffn_up = nn.Linear(width, wide, bias=False)
        self.ffn_down = nn.Linear(wide, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        y = self.attn_norm(x)
        query, key, value = (
            layer(y).view(*x.shape[:2], -1, self.size).transpose(1, 2)
            for layer in (self.attn_q, self.attn_k, self.attn_v)
        )
        query, key = (v * cos + _rotate(v) * sin for v in (query, key))
        key, value = self.repeat(key), self.repeat(value)
        scores = query @ key.transpose(2, 3) * self.size**-0.5
        mixed = (scores + mask).softmax(-1) @ value
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(x.shape))
        y = self.ffn_norm(x)
        return x + self.ffn_down(functional.silu(self.ffn_gate(y)) * self.ffn_up(y))

    def repeat(self, x: Tensor) -> Tensor:
        """Each of the heads `[batch, kv_heads, seq, size]` `repeats` times in a row."""
        batch, kv_heads, tokens, size = x.shape
        wide = x[:, :, None].expand(batch, kv_heads, self.repeats, tokens, size)
        return wide.reshape(batch, kv_heads * self.repeats, tokens, size)


class Llama(nn.Module):
    """A Llama decoder whose head is its embedding, without a cache, as SmolLM2-135M.

    `input_ids` int64 `[batch, seq]` to logits `[batch, seq, vocabulary]`.
    """

    frequency: Tensor

    def __init__(
        self, width: int, blocks: int, heads: int, kv_heads: int, wide: int,
        vocabulary: int, epsilon: float, theta: float,
    ) -> None:  # fmt: skip
        super().__init__()
        size = width // heads
        self.token_embd = nn.Embedding(vocabulary, width)
        self.blk = nn.ModuleList(
            LlamaBlock(width, heads, kv_heads, wide, epsilon) for _ in range(blocks)
        )
        self.output_norm = RmsNorm(width, epsilon)
        frequency = theta ** -(torch.arange(0, size, 2).float() / size)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.token_embd(input_ids)
        position = torch.arange(input_ids.shape[1])
        angle = torch.outer(position.float(), torch.cat([self.frequency, self.frequency]))
        future = position[:, None] < position
        mask = torch.where(future, torch.finfo(x.dtype).min, 0.0)
        for block in self.blk:
            x = block(x, angle.cos(), angle.sin(), mask)
        return functional.linear(self.output_norm(x), self.token_embd.weight)


def _rotate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class TextGenerator(nn.Module):
    """textgenrnn: two LSTMs over characters and an attention-weighted mean of all their states.

    `ids` int64 `[batch, 40]` to logits `[batch, 465]`.
    """

    def __init__(self, vocabulary: int = 465, embedded: int = 100, units: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedded)
        self.rnn_1 = nn.LSTM(embedded, units, batch_first=True)
        self.rnn_2 = nn.LSTM(units, units, batch_first=True)
        self.attention = nn.Parameter(torch.zeros(embedded + 2 * units, 1))
        self.output = nn.Linear(embedded + 2 * units, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.embedding(ids)
        first, _ = self.rnn_1(embedded)
        second, _ = self.rnn_2(first)
        states = torch.cat([embedded, first, second], -1)
        weights = (states @ self.attention).softmax(1)
        return self.output((states * weights).sum(1))
