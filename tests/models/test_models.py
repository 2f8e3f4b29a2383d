"""The shipped networks, their data, and what trains and exports them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

from octavo.ir.errors import UnknownName, UsageError
from octavo.ir.read import read
from octavo.models import fashion, make_data, names, networks, shipped, train
from octavo.models.export import to_onnx, to_onnx_external
from octavo.models.public_networks import Bert, EfficientNetLite0, Llama

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

# Share of right answers on fashion_test.npz, as stated in models/README.md.
ACCURACY = {
    "fashion-lstm": 0.8935,
    "fashion-mobile": 0.9270,
    "fashion-resnet": 0.9205,
    "fashion-vit": 0.9140,
}
# float32 networks of a few layers, summed in another order.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Small tensors: threads that wait for each other cost more than they give."""
    torch.set_num_threads(1)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options)


def logits(path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    (output,) = session(path).run(None, {"input": images})
    return np.asarray(output)


@pytest.fixture(scope="module")
def labelled() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    with np.load(shipped("fashion-test")) as data:
        return data["input"], data["label"]


@pytest.mark.parametrize("name", names())
def test_a_shipped_network_reaches_its_stated_accuracy(
    name: str, labelled: tuple[NDArray[np.float32], NDArray[np.int64]]
) -> None:
    images, labels = labelled
    accuracy = (logits(shipped(name), images).argmax(1) == labels).mean()
    assert accuracy == pytest.approx(ACCURACY[name], abs=5e-4)
    readme = shipped(name).with_name("README.md").read_text()
    row = next(line for line in readme.splitlines() if shipped(name).name in line)
    assert f"{ACCURACY[name]:.4f}".removeprefix("0") in row
    assert f"{shipped(name).stat().st_size:,}" in row


@pytest.mark.parametrize("name", names())
def test_the_torch_network_computes_what_the_file_computes(
    name: str, labelled: tuple[NDArray[np.float32], NDArray[np.int64]]
) -> None:
    images = labelled[0][:64]
    network = networks.trained(name.removeprefix("fashion-"))
    with torch.no_grad():
        computed = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(computed, logits(shipped(name), images), atol=TOLERANCE)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert f"| {count:,} |" in shipped(name).with_name("README.md").read_text()


@pytest.mark.parametrize("name", names())
def test_octavo_reads_a_shipped_network(name: str) -> None:
    model = read(shipped(name))
    assert [value.name for value in model.graph.inputs] == ["input"]


def test_calibration_images_fit_the_networks_and_the_folder_stays_small() -> None:
    with np.load(shipped("fashion")) as data:
        assert list(data) == ["input"]
        assert data["input"].shape == (256, 1, 28, 28)
        assert data["input"].dtype == np.float32
    files = [shipped(name) for name in (*names(), "fashion", "fashion-test")]
    assert sum(file.stat().st_size for file in files) <= 6_000_000


def test_unknown_names_are_near_misses() -> None:
    with pytest.raises(UnknownName, match="did you mean fashion-resnet"):
        shipped("fashion-resnt")
    with pytest.raises(UnknownName, match="unknown network 'rnn'"):
        networks.build("rnn")


@pytest.mark.skipif(not fashion.FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_data_files_can_be_made_again(tmp_path: Path) -> None:
    make_data.write(tmp_path)
    for name in ("fashion", "fashion-test"):
        with np.load(shipped(name)) as kept, np.load(tmp_path / shipped(name).name) as made:
            assert list(kept) == list(made)
            for key in kept:
                np.testing.assert_array_equal(made[key], kept[key])


def test_a_missing_data_set_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="apt-get install dataset-fashion-mnist"):
        fashion.images("train", tmp_path)


def test_training_learns_and_the_export_keeps_batch_normalization(
    labelled: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    images, labels = (torch.from_numpy(part[: train.BATCH]) for part in labelled)
    torch.manual_seed(0)
    network = networks.build("mobile")
    before = functional.cross_entropy(network(images), labels)
    train.fit(network, images, labels, epochs=8, peak_rate=3e-3)
    assert functional.cross_entropy(network(images), labels) < 0.8 * before
    path = tmp_path / "mobile.onnx"
    to_onnx(network, {"input": images[:2]}, "logits", path, keep_norms=True)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("BatchNormalization") == kinds.count("Conv")
    with torch.no_grad():
        expected = network(images[:7]).numpy()
    np.testing.assert_allclose(logits(path, images[:7].numpy()), expected, atol=TOLERANCE)


def test_bert_block_is_the_post_norm_encoder_layer_of_torch() -> None:
    torch.manual_seed(0)
    block = Bert(width=24, blocks=1, heads=3, wide=40, vocabulary=9, positions=8).blocks[0]
    layer = nn.TransformerEncoderLayer(24, 3, 40, activation="gelu", batch_first=True)
    layer.norm1.eps = layer.norm2.eps = 1e-12
    rename = {"out": "self_attn.out_proj", "up": "linear1", "down": "linear2"}
    state = {
        f"{rename.get(name.split('.')[0], name.split('.')[0])}.{name.split('.')[1]}": value
        for name, value in block.state_dict().items()
    }
    for kind in ("weight", "bias"):
        parts = [state.pop(f"{name}.{kind}") for name in ("query", "key", "value")]
        state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
    layer.load_state_dict(state)
    x = torch.randn(2, 5, 24)
    hidden = torch.tensor([[False] * 5, [False, False, False, True, True]])
    bias = hidden[:, None, None] * torch.finfo(x.dtype).min
    with torch.no_grad():
        expected = layer.eval()(x, src_key_padding_mask=hidden)
        torch.testing.assert_close(block(x, bias)[~hidden], expected[~hidden], rtol=0, atol=1e-5)


def test_a_decoder_is_causal_and_ties_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Llama(
        width=12, blocks=1, heads=3, kv_heads=1, wide=20, vocabulary=3000, epsilon=1e-5, theta=1e4
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    ids = torch.ones(2, 4, dtype=torch.int64)
    to_onnx_external(network, {"input_ids": ids}, "logits", path, ("batch", "seq"))
    shapes = [tuple(tensor.dims) for tensor in onnx.load(path).graph.initializer]
    assert [shape for shape in shapes if 3000 in shape] == [(3000, 12)]
    run = session(path)
    tokens = np.random.default_rng(0).integers(0, 3000, (3, 6))
    (output,) = run.run(None, {"input_ids": tokens})
    with torch.no_grad():
        expected = network(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(output, expected, atol=TOLERANCE)
    changed = tokens.copy()
    changed[:, 4:] = (tokens[:, 4:] + 1) % 3000
    (other,) = run.run(None, {"input_ids": changed})
    np.testing.assert_allclose(other[:, :4], output[:, :4], atol=1e-6)
    assert np.abs(other[:, 4:] - output[:, 4:]).max() > 1e-2


def test_efficientnet_lite0_has_the_published_size_and_grid() -> None:
    network = EfficientNetLite0().eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    assert len(convolutions) == 49
    assert sum(part.groups > 1 for part in convolutions) == 16
    with torch.no_grad():
        assert network.blocks(network.stem(torch.zeros(1, 3, 224, 224))).shape == (1, 320, 7, 7)
