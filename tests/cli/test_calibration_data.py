"""Calibration data from every source, and what is said of data that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.parser
import pytest
from PIL import Image

from octavo.cli.calibration_data import CalibrationData, load_calibration
from octavo.cli.preprocess import Preprocess
from octavo.ir.errors import CalibrationError, UnknownName, UsageError
from octavo.ir.read_onnx import from_proto

if TYPE_CHECKING:
    from octavo.ir.model import Model

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((20, 3, 8, 6)).astype(np.float32)


# Logits of 49152 words for every token.
_IDS, _LOGITS = "int64[B, S] ids", "float[B, S, 49152] logits"
_HEAD = "f = Cast <to = 1> (ids) a = Constant <value_ints = [2]> () u = Unsqueeze (f, a)"
_HEAD += " r = Constant <value_ints = [1, 1, 49152]> () logits = Tile (u, r)"


def model_of(inputs: str, body: str) -> Model:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => (out) {{ out = {body} }}'
    return from_proto(onnx.parser.parse_model(text))


@pytest.fixture(scope="module")
def vision() -> Model:
    return model_of("float[N, 3, 8, 6] image", "Relu (image)")


@pytest.fixture(scope="module")
def text() -> Model:
    return model_of(
        "int64[B, S] input_ids, int64[B, S] attention_mask", "Add (input_ids, attention_mask)"
    )


def load(spec: Any, model: Model, *options: Any, **named: Any) -> CalibrationData:
    data = load_calibration(spec, model, *options, **named)
    assert isinstance(data, CalibrationData)
    return data


def stacked(data: CalibrationData, name: str = "image") -> np.ndarray[Any, Any]:
    return np.concatenate([feed[name] for feed in data])


# Sources


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_by_input_name_with_labels(vision: Model, tmp_path: Path, save: Any) -> None:
    save(tmp_path / "data.npz", image=IMAGES, labels=np.arange(20))
    data = load(tmp_path / "data.npz", vision)
    assert np.array_equal(stacked(data), IMAGES)
    assert data.labels is not None
    assert data.labels.tolist() == list(range(20))
    assert data.samples == 20
    assert data.warnings == ()
    assert [len(feed["image"]) for feed in data] == [8, 8, 4]


@pytest.mark.parametrize(("tokens", "feed"), [(16, 8), (64, 5), (256, 1), (1024, 1)])
def test_feeds_of_a_language_model_hold_as_many_texts_as_their_logits_allow(
    tokens: int, feed: int
) -> None:
    """The logits of 64 tokens take 12.6 MB here; a feed's may take 64 MiB."""
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({_IDS}) => ({_LOGITS}) {{ {_HEAD} }}'
    model = from_proto(onnx.parser.parse_model(text))
    data = load({"ids": np.ones((10, tokens), np.int64)}, model)
    assert next(iter(data))["ids"].shape == (feed, tokens)
    assert sum(len(each["ids"]) for each in data) == 10


def test_the_same_content_has_the_same_digest_from_every_source(
    vision: Model, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", image=IMAGES)
    np.save(tmp_path / "data.npy", IMAGES)
    for folder in ("arrays", "feeds"):
        (tmp_path / folder).mkdir()
    for k, image in enumerate(IMAGES):
        np.save(tmp_path / "arrays" / f"{k:02}.npy", image)
        np.savez(tmp_path / "feeds" / f"{k:02}.npz", image=image[None])
    specs = (
        tmp_path / "data.npz",
        str(tmp_path / "data.npy"),
        tmp_path / "arrays",
        tmp_path / "feeds",
        {"image": IMAGES},
        IMAGES,
        list(IMAGES),
        ({"image": image[None]} for image in IMAGES),
    )
    loaded = [load(spec, vision) for spec in specs]
    assert len({data.sha256 for data in loaded}) == 1
    for data in loaded:
        assert np.array_equal(stacked(data), IMAGES)
        assert np.array_equal(stacked(data), IMAGES)
    assert load(IMAGES + 1, vision).sha256 != loaded[0].sha256


def test_any_key_serves_a_single_input_with_a_note(vision: Model) -> None:
    data = load({"x": IMAGES, "label": np.zeros(20)}, vision)
    assert data.warnings == ("'x' is taken as the model's only input 'image'",)
    assert data.labels is not None


def test_a_python_function(vision: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import numpy as np\ndef feeds():\n    for k in range(9):\n"
    source += (
        "        yield {'image': np.full((1, 3, 8, 6), k, np.float32) + np.eye(8, 6, dtype='f')}\n"
    )
    (tmp_path / "my_feeds.py").write_text(source + "def nothing():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    assert load("my_feeds:feeds", vision).samples == 9
    with pytest.raises(CalibrationError, match="no function 'fed'"):
        load("my_feeds:fed", vision)
    with pytest.raises(CalibrationError, match="returns int"):
        load("my_feeds:nothing", vision)
    with pytest.raises(CalibrationError, match="'my_fed' cannot be imported"):
        load("my_fed:feeds", vision)


def test_texts_of_different_length_stay_apart(text: Model, tmp_path: Path) -> None:
    lengths = [4, 4, 7, 7, 7, 4, 9, 9]
    for k, length in enumerate(lengths):
        ids = np.arange(length) + k
        np.savez(
            tmp_path / f"{k}.npz", input_ids=ids, attention_mask=np.ones((1, length), np.int64)
        )
    data = load(tmp_path, text)
    assert [feed["input_ids"].shape for feed in data] == [(2, 4), (3, 7), (1, 4), (2, 9)]
    assert (data.samples, data.warnings) == (8, ())


def test_data_larger_than_memory_allows_is_read_again(
    vision: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(IMAGES, vision)
    monkeypatch.setattr("octavo.cli.calibration_data._KEPT_BYTES", 1000)
    streamed = load(IMAGES, vision)
    assert streamed.kept is None
    assert streamed.sha256 == whole.sha256
    assert np.array_equal(stacked(streamed), IMAGES)


def test_what_exceeds_the_limit_is_drawn_by_seed(vision: Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", image=IMAGES, label=np.arange(20))
    few = [load(tmp_path / "data.npz", vision, limit=9, seed=s) for s in (0, 0, 1)]
    assert few[0].sha256 == few[1].sha256 != few[2].sha256
    labels = few[0].labels
    assert labels is not None
    assert sorted(set(labels.tolist())) == labels.tolist() != list(range(9))
    assert np.array_equal(stacked(few[0]), IMAGES[labels])


def test_a_fixed_batch_is_filled(tmp_path: Path) -> None:
    model = model_of("float[6, 3, 8, 6] image", "Relu (image)")
    data = load(IMAGES, model)
    assert [feed["image"].shape[0] for feed in data] == [6, 6, 6]
    assert (data.samples, data.warnings) == (
        18, ("2 samples do not fill a batch and are left out",)
    )  # fmt: skip
    with pytest.raises(CalibrationError, match="holds 5 samples") as error:
        load(IMAGES[:5], model)
    assert "batches of 6" in error.value.why


def test_a_scalar_input_keeps_items_apart() -> None:
    model = model_of("float[N, 4] x, float scale", "Mul (x, scale)")
    data = load({"x": IMAGES[:9, 0, 0, :4], "scale": np.arange(9, dtype=np.float32)}, model)
    assert [(f["x"].shape, f["scale"].shape) for f in data] == [((1, 4), ())] * 9


# Images


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(9):
        pixels = RNG.integers(0, 256, (10, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    (folder / "README.txt").write_text("not an image")
    return folder


def test_images_without_preprocess_are_refused(vision: Model, pictures: Path) -> None:
    with pytest.raises(CalibrationError, match="need --preprocess") as error:
        load(pictures, vision)
    assert "size=" in error.value.hint


def test_images_take_the_size_of_the_model(vision: Model, pictures: Path) -> None:
    data = load(pictures, vision, Preprocess.parse("mean=127,std=128"))
    assert stacked(data).shape == (9, 3, 8, 6)
    assert stacked(data).dtype == np.float32
    with pytest.raises(CalibrationError, match=r"\[1, 3, 8, 8\] does not fit") as error:
        load(pictures, vision, Preprocess.parse("size=8,mean=127,std=128"))
    assert "0.png" in error.value.where
    assert "[N, 3, 8, 6]" in error.value.why


def test_an_image_that_cannot_be_read_is_named(vision: Model, pictures: Path) -> None:
    (pictures / "3.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(CalibrationError, match=r"3\.png cannot be read"):
        load(pictures, vision, Preprocess())


def test_pixels_equal_numpy(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (4, 5, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    expected = (pixels.astype(np.float32) - [1, 2, 3]) / [4, 5, 6]
    how = Preprocess.parse("mean=1;2;3,std=4;5;6,layout=nhwc")
    np.testing.assert_allclose(how.load(path)[0], expected, rtol=1e-6)
    bgr = Preprocess.parse("layout=nchw,color=bgr").load(path)
    assert np.array_equal(bgr[0], pixels[..., ::-1].transpose(2, 0, 1))
    raw = Preprocess.parse("dtype=uint8,layout=nhwc").load(path)
    assert raw.dtype == np.uint8
    assert np.array_equal(raw[0], pixels)
    gray = Preprocess.parse("color=gray").load(path)
    assert gray.shape == (1, 1, 4, 5)


@pytest.mark.parametrize(
    ("resize", "columns"),
    [("fit", [True, False, False, True]), ("crop", [False] * 4), ("stretch", [False] * 4)],
)
def test_resizing(resize: str, columns: list[bool], tmp_path: Path) -> None:
    """A tall black image on white: `fit` leaves the background at its sides."""
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 8), "black").save(path)
    image = Preprocess.parse(f"size=4,resize={resize}").load(path)[0, 0]
    assert (image == 255).all(axis=0).tolist() == columns
    assert (image == 0).all(axis=0).tolist() == [not white for white in columns]


@pytest.mark.parametrize(("background", "value"), [("white", 255), ("#102030", 16)])
def test_transparent_pixels_show_the_background(
    background: str, value: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGBA", (3, 3), (9, 9, 9, 0)).save(path)
    image = Preprocess.parse(f"background={background}").load(path)
    assert (image[0, 0] == value).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise=3", "did you mean size"),
        ("layout=ncwh", "did you mean nchw"),
        ("background=whit", "did you mean .*white"),
        ("mean=1;2", "one number or three"),
        ("std=0", "std is not zero"),
        ("size=axb", "'axb' is not a size"),
        ("size=0", "'0' is not a size"),
        ("mean", "has no value"),
    ],
)
def test_preprocess_errors(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Preprocess.parse(text)


# What does not fit


def test_unknown_and_missing_names(text: Model) -> None:
    ids = np.ones((9, 4), np.int64)
    with pytest.raises(UnknownName, match="input_id'") as unknown:
        load({"input_id": ids, "attention_mask": ids}, text)
    assert "input_ids" in unknown.value.hint
    with pytest.raises(CalibrationError, match="lacks the input 'attention_mask'"):
        load({"input_ids": ids}, text)
    with pytest.raises(UnknownName, match="without a 'name'"):
        load(ids, text)


def test_the_sample_with_the_wrong_shape_is_named(vision: Model) -> None:
    items = [*IMAGES[:4], IMAGES[0, :, :5]]
    with pytest.raises(CalibrationError, match=r"\[1, 3, 5, 6\] does not fit") as error:
        load(items, vision)
    assert "item 4" in error.value.where
    with pytest.raises(CalibrationError, match="does not fit"):
        load(IMAGES[:, 0, 0], vision)


def test_symbols_agree_within_a_sample(text: Model) -> None:
    feeds = {"input_ids": np.ones((9, 4), np.int64), "attention_mask": np.ones((9, 5), np.int64)}
    with pytest.raises(CalibrationError, match="'S' is 4 in 'input_ids' and 5"):
        load(feeds, text)


def test_dtypes_are_cast_with_a_warning_or_refused(vision: Model, text: Model) -> None:
    data = load(IMAGES.astype(np.float64), vision)
    assert data.warnings == ("input 'image' is cast from float64 to float32",)
    assert stacked(data).dtype == np.float32
    ids = np.arange(36, dtype=np.int32).reshape(9, 4)
    cast = load({"input_ids": ids, "attention_mask": ids.astype(np.int64)}, text)
    assert cast.warnings == ("input 'input_ids' is cast from int32 to int64",)
    with pytest.raises(CalibrationError, match="dtype float32 does not fit"):
        load({"input_ids": ids.astype(np.float32), "attention_mask": ids}, text)
    huge = np.full((9, 4), 2**63, np.uint64)
    with pytest.raises(CalibrationError, match="dtype uint64 does not fit"):
        load({"input_ids": huge, "attention_mask": ids}, text)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(vision: Model, bad: float) -> None:
    images = IMAGES.copy()
    images[7, 0, 0, 0] = bad
    with pytest.raises(CalibrationError, match="NaN or infinite") as error:
        load(images, vision)
    assert "sample 7" in error.value.where


def test_few_constant_and_identical_samples_are_warned_of(vision: Model) -> None:
    assert load(IMAGES[:3], vision).warnings == (
        "only 3 samples: ranges from fewer than 8 are not reliable",
    )
    images = IMAGES[:9].copy()
    images[2] = 0.5
    assert load(images, vision).warnings == ("1 of 9 samples are constant: sample 2",)
    images[:] = images[0]
    assert load(images, vision).warnings == ("all 9 samples are identical",)


def test_no_samples(vision: Model, tmp_path: Path) -> None:
    nothing: list[Any] = [IMAGES[:0], [], {"image": IMAGES[:0]}]
    for spec in nothing:
        with pytest.raises(CalibrationError, match="holds no samples"):
            load(spec, vision)
    with pytest.raises(CalibrationError, match="no calibration data"):
        load(tmp_path, vision)


def test_arrays_of_different_length(text: Model, tmp_path: Path) -> None:
    ids = np.ones((9, 4), np.int64)
    arrays: dict[str, Any] = {"input_ids": ids, "attention_mask": ids[:8]}
    np.savez(tmp_path / "data.npz", **arrays)
    for spec in (arrays, tmp_path / "data.npz"):
        with pytest.raises(CalibrationError, match="different numbers") as error:
            load(spec, text)
        assert "attention_mask 8" in error.value.why


def test_pickled_and_broken_files_are_refused(vision: Model, tmp_path: Path) -> None:
    objects = np.array([{"a": 1}, None], dtype=object)
    np.savez(tmp_path / "pickled.npz", image=objects)
    np.save(tmp_path / "pickled.npy", objects)
    np.savez(tmp_path / "whole.npz", image=IMAGES)
    data = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.npz").write_text("image")
    (tmp_path / "text.npy").write_text("image")
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)
    for name in (
        "pickled.npz", "pickled.npy", "cut.npz", "flipped.npz", "text.npz", "text.npy"
    ):  # fmt: skip
        with pytest.raises(CalibrationError, match="cannot be read"):
            load(tmp_path / name, vision)


def test_paths_that_are_no_calibration_data(vision: Model, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CalibrationError, match=r"from a \.txt file"):
        load(tmp_path / "notes.txt", vision)
    with pytest.raises(CalibrationError, match="no such calibration data"):
        load(tmp_path / "absent.npz", vision)
    np.save(tmp_path / "a.npy", IMAGES[0])
    np.savez(tmp_path / "b.npz", image=IMAGES[0])
    with pytest.raises(CalibrationError, match="npy and npz"):
        load(tmp_path, vision)
    with pytest.raises(CalibrationError, match="cannot be read from int"):
        load(3, vision)
