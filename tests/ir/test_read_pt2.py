"""`.pt2` files that would run code when torch loads them, and broken ones."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from octavo.ir.errors import ModelError, UnsafeModel
from octavo.ir.read_torch import read_torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Members = dict[str, bytes]

GRAPH, WEIGHTS = "net/models/model.json", "net/data/weights/model_weights_config.json"
SAMPLES = "net/data/sample_inputs/model.pt"


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        batch = {0: torch.export.Dim.DYNAMIC}
        program = torch.export.export(nn.Linear(4, 2), (torch.ones(3, 4),), dynamic_shapes=(batch,))
    torch.export.save(program, path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(folder: Path, members: Members) -> Path:
    path = folder / "net.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def edited(members: Members, name: str, edit: Callable[[Any], None]) -> Members:
    content = json.loads(members[name])
    edit(content)
    return {**members, name: json.dumps(content).encode()}


class TouchWhenUnpickled:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def hostile_pickle(target: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(((TouchWhenUnpickled(target),), {}), buffer)
    return buffer.getvalue()


def refuse(path: Path, why: str) -> None:
    with pytest.raises(UnsafeModel) as caught:
        read_torch(path)
    assert why in caught.value.why
    assert caught.value.where == str(path)


def test_an_archive_written_again_still_loads(members: Members, tmp_path: Path) -> None:
    model = read_torch(write(tmp_path, members))
    assert [node.op_type for node in model.graph] == ["Gemm"]


def test_hostile_sample_inputs_are_refused_and_not_run(members: Members, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    path = write(tmp_path, {**members, SAMPLES: hostile_pickle(touched)})
    refuse(path, "unpickles more than tensors")
    assert not touched.exists()
    # The danger is real: torch itself runs what this file says.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(io.BytesIO(hostile_pickle(touched)), weights_only=False)
    assert touched.exists()


def test_pickled_weights_are_refused(members: Members, tmp_path: Path) -> None:
    def pickled(config: Any) -> None:
        config["config"]["weight"]["use_pickle"] = True

    refuse(write(tmp_path, edited(members, WEIGHTS, pickled)), "use_pickle = 'True'")


@pytest.mark.parametrize(
    "name", ["data/constants/opaque_obj_0", "data/weights/model.pt", "data/aotinductor/model/a.so"]
)
def test_members_that_are_code_or_pickles_are_refused(
    name: str, members: Members, tmp_path: Path
) -> None:
    refuse(write(tmp_path, {**members, f"net/{name}": b"x"}), name)


def node(graph: Any) -> Any:
    return graph["graph_module"]["graph"]["nodes"][0]


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda g: node(g).update(target="torch.hub.load"), "torch.hub.load"),
        (lambda g: node(g).update(target="torch.ops.aten.__class__.mro"), "__class__"),
        (lambda g: node(g).update(target="_operator.methodcaller"), "methodcaller"),
        (lambda g: node(g).update(name="x): import os #"), "import os"),
        (lambda g: g["graph_module"].update(x={"expr_str": "exec('1')"}), "exec"),
        (lambda g: g["graph_module"].update(x={"expr_str": "().__class__"}), "__class__"),
        (lambda g: g["graph_module"].update(x={"expr_str": "Symbol('a()')"}), "a()"),
        (lambda g: g["graph_module"].update(x={"in_spec": "f(x)"}), "f(x)"),
        (lambda g: g["graph_module"].update(x={"forward_arg_names": ["a=b()"]}), "a=b()"),
    ],
)
def test_code_in_the_graph_is_refused(
    edit: Callable[[Any], None], why: str, members: Members, tmp_path: Path
) -> None:
    refuse(write(tmp_path, edited(members, GRAPH, edit)), why)


def test_a_tensor_without_data_is_refused(members: Members, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="8 elements and no data"):
        read_torch(write(tmp_path, {**members, "net/data/weights/weight_0": b""}))


@pytest.mark.parametrize("damage", ["no archive", "cut", "no graph", "no weights", "bad json"])
def test_a_broken_file_is_one_clear_error(damage: str, members: Members, tmp_path: Path) -> None:
    without = {
        "no graph": GRAPH,
        "no weights": "net/data/weights/weight_0",
    }
    kept = {name: data for name, data in members.items() if name != without.get(damage)}
    if damage == "bad json":
        kept[GRAPH] = b"{"
    path = write(tmp_path, kept)
    if damage == "no archive":
        path.write_bytes(b"no archive at all")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ModelError) as caught:
        read_torch(path)
    assert caught.value.where == str(path)
