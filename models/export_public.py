"""Turn the weights of a public model into ONNX: `python -m octavo.models.export_public NAME …`.

Runs in a process of its own, so that the readers it needs (`gguf`, `h5py`) can come from a
temporary folder and its memory is given back. No file is unpickled beyond plain tensors.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import typer

from octavo.models.export import to_onnx, to_onnx_external
from octavo.models.public_networks import Bert, EfficientNetLite0, Llama, TextGenerator

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_BERT_NAMES = (
    ("embeddings.word_embeddings", "word"),
    ("embeddings.position_embeddings", "position"),
    ("embeddings.token_type_embeddings", "kind"),
    ("embeddings.LayerNorm", "norm"),
    ("encoder.layer", "blocks"),
    ("attention.self.", ""),
    ("attention.output.dense", "out"),
    ("attention.output.LayerNorm", "norm1"),
    ("intermediate.dense", "up"),
    ("output.dense", "down"),
    ("output.LayerNorm", "norm2"),
)


def efficientnet_lite0(weights: Path, out: Path) -> None:
    """`input` float32 `[batch, 3, 224, 224]`, `logits` `[batch, 1000]`; BatchNormalization kept."""
    stored = torch.load(weights, weights_only=True)
    network = EfficientNetLite0()
    # Both list the same layers in the same order, only under other names.
    network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=True)))
    example = torch.zeros(2, 3, 224, 224)
    to_onnx(network, {"input": example}, "logits", out / "model.onnx", keep_norms=True)


def minilm(weights: Path, out: Path) -> None:
    """`input_ids`, `attention_mask` int64 `[batch, seq]`; `last_hidden_state` `[…, 384]`."""
    network = Bert()
    stored = {_bert_name(name): value for name, value in _read_safetensors(weights).items()}
    network.load_state_dict({name: stored[name] for name in network.state_dict()})
    ids = torch.ones(2, 16, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": ids}
    path = out / "model.onnx"
    to_onnx(network, inputs, "last_hidden_state", path, axes=("batch", "seq"))


def textgenrnn(weights: Path, out: Path) -> None:
    """`ids` int64 `[batch, 40]`, `logits` `[batch, 465]`."""
    import h5py

    network = TextGenerator()
    with h5py.File(weights) as file:

        def read(layer: str, name: str) -> Tensor:
            return torch.from_numpy(np.array(file[f"{layer}/{layer}/{name}:0"]))

        state = {
            "embedding.weight": read("embedding", "embeddings"),
            "attention": read("attention", "attention_W"),
            "output.weight": read("output", "kernel").T,
            "output.bias": read("output", "bias"),
        }
        for layer in ("rnn_1", "rnn_2"):
            bias = read(layer, "bias").chunk(2)
            state[f"{layer}.weight_ih_l0"] = _cudnn_kernel(read(layer, "kernel"))
            state[f"{layer}.weight_hh_l0"] = torch.cat(read(layer, "recurrent_kernel").chunk(4, 1))
            state[f"{layer}.bias_ih_l0"], state[f"{layer}.bias_hh_l0"] = bias
    network.load_state_dict(state)
    ids = torch.ones(2, 40, dtype=torch.int64)
    to_onnx(network, {"ids": ids}, "logits", out / "model.onnx")


def smollm2_135m(weights: Path, out: Path) -> None:
    """`input_ids` int64 `[batch, seq]`, `logits` `[batch, seq, 49152]`; data beside the graph."""
    from gguf import GGUFReader

    reader = GGUFReader(weights)
    network = _llama(reader)
    ids = torch.ones(2, 16, dtype=torch.int64)
    to_onnx_external(network, {"input_ids": ids}, "logits", out / "model.onnx", ("batch", "seq"))
    tokenizer = _byte_level_tokenizer(reader)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))


EXPORTS: dict[str, Callable[[Path, Path], None]] = {
    "efficientnet-lite0": efficientnet_lite0,
    "minilm": minilm,
    "textgenrnn": textgenrnn,
    "smollm2-135m": smollm2_135m,
}


def _bert_name(name: str) -> str:
    for old, new in _BERT_NAMES:
        name = name.replace(old, new)
    return name


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of a safetensors file: u64 header length, JSON header, data."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", content)
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return {
        name: torch.frombuffer(
            content,
            dtype=torch.float32,
            count=math.prod(entry["shape"]),
            offset=8 + length + entry["data_offsets"][0],
        ).view(entry["shape"])
        for name, entry in header.items()
        if entry.get("dtype") == "F32"
    }


def _cudnn_kernel(kernel: Tensor) -> Tensor:
    """Keras' `[inputs, 4 * units]` of a CuDNNLSTM to torch's `[4 * units, inputs]`.

    cuDNN stores each gate as `[units, inputs]`, which Keras only labels the other way round.
    """
    inputs, columns = kernel.shape
    return torch.cat([gate.reshape(columns // 4, inputs) for gate in kernel.chunk(4, 1)])


def _llama(reader: Any) -> Llama:
    def number(key: str) -> Any:
        return reader.get_field(f"llama.{key}").contents()

    heads, kv_heads = number("attention.head_count"), number("attention.head_count_kv")
    network = Llama(
        width=number("embedding_length"),
        blocks=number("block_count"),
        heads=heads,
        kv_heads=kv_heads,
        wide=number("feed_forward_length"),
        vocabulary=number("vocab_size"),
        epsilon=number("attention.layer_norm_rms_epsilon"),
        theta=number("rope.freq_base"),
    )
    state = {tensor.name: _dequantized(tensor) for tensor in reader.tensors}
    for name in state:
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            state[name] = _split_rotary(state[name], heads if "attn_q" in name else kv_heads)
    network.load_state_dict(state)
    return network


def _dequantized(tensor: Any) -> Tensor:
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(values, np.float32).reshape(tensor.shape[::-1]))


def _split_rotary(weight: Tensor, heads: int) -> Tensor:
    """GGUF rotates neighbours, this network rotates halves: put even rows before odd ones."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _byte_level_tokenizer(reader: Any) -> dict[str, Any]:
    """The `tokenizer.json` of a byte-level BPE vocabulary stored in a GGUF file."""

    def field(key: str) -> Any:
        return reader.get_field(f"tokenizer.ggml.{key}").contents()

    tokens, control = field("tokens"), 3
    start = tokens[field("bos_token_id")]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = {start: {"id": start, "ids": [field("bos_token_id")], "tokens": [start]}}
    first = {"SpecialToken": {"id": start, "type_id": 0}}
    text = [{"Sequence": {"id": side, "type_id": 0}} for side in "AB"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": tokens[index], "special": True, **plain}
            for index, kind in enumerate(field("token_type"))
            if kind == control
        ],
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text[0]],
            "pair": [first, text[0], first, text[1]],
            "special_tokens": special,
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "unk_token": tokens[field("unknown_token_id")],
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in field("merges")],
        },
    }


def main(name: str, weights: Path, out: Path) -> None:
    """Export model NAME from WEIGHTS into the folder OUT."""
    EXPORTS[name](weights, out)


if __name__ == "__main__":
    typer.run(main)
