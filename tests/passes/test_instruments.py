"""Instruments: the log reads back, dumps parse, a crash leaves a folder that crashes again."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
import onnx.parser
import onnx_ir
import pytest

from octavo.ir.errors import PassFailed, UsageError, VerificationFailed
from octavo.ir.facts import Norm, Norms, Range, Ranges
from octavo.ir.model import Model
from octavo.ir.text import model_text
from octavo.passes.base import Pass, PassContext
from octavo.passes.instruments import (
    DumpText,
    JsonLog,
    PeakMemory,
    ShowProgress,
    peak_resident_bytes,
)
from octavo.passes.pipeline import Pipeline
from octavo.passes.record import Header, PassRecord, read_records, write_records
from octavo.passes.reproducer import Reproducer, StoredFeeds, read_reproduction


@final
@dataclass(frozen=True)
class Rename(Pass):
    """Rename one node."""

    name = "rename"
    preserves = (Norms,)

    to: str = "renamed"

    def run(self, model: Model, ctx: PassContext) -> Model:
        model.graph[0].name = self.to
        ctx.remark("note", self.to, "has a new name", length=len(self.to))
        ctx.count("renamed")
        return model


@final
@dataclass(frozen=True)
class Crash(Pass):
    """Raise what no pass should, or break the graph."""

    name = "crash"

    verified: bool = False

    def run(self, model: Model, ctx: PassContext) -> Model:
        ctx.remark("note", "here", "the last words")
        if not self.verified:
            raise KeyError(ctx.seed)
        model.graph[0].name = model.graph[1].name
        return model


@pytest.fixture
def header(tiny_model: Model) -> Header:
    return Header("rename", tiny_model.source, "ort-cpu", 3)


def test_the_log_reads_back_what_ran(
    tiny_model: Model, pass_context: PassContext, tmp_path: Path, header: Header
) -> None:
    path = tmp_path / "passes.jsonl"
    instruments = [JsonLog(path, header), PeakMemory()]
    records = Pipeline((Rename(), Rename())).run(tiny_model, pass_context, instruments).records
    assert read_records(path) == (header, records)
    assert records[0].peak_bytes > 1 << 20
    assert records[1].peak_bytes >= records[0].peak_bytes


def test_a_log_written_whole_is_the_log_written_as_it_goes(
    tiny_model: Model, pass_context: PassContext, tmp_path: Path, header: Header
) -> None:
    log = JsonLog(tmp_path / "live.jsonl", header)
    records = Pipeline((Rename(),)).run(tiny_model, pass_context, [log]).records
    write_records(tmp_path / "whole.jsonl", header, records)
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "live.jsonl").read_bytes()


def test_the_schema_of_the_log(
    tiny_model: Model, pass_context: PassContext, tmp_path: Path, header: Header
) -> None:
    path = tmp_path / "passes.jsonl"
    Pipeline((Rename(),)).run(tiny_model, pass_context, [JsonLog(path, header)])
    first, line = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert first.keys() == {"pipeline", "source", "target", "seed", "versions", "format"}
    assert first["versions"].keys() >= {"octavo", "onnx", "onnxruntime", "numpy"}
    assert first["source"].keys() == {"name", "sha256", "bytes"}
    assert line.keys() == set(PassRecord.__dataclass_fields__)
    assert (line["spec"], line["status"], line["counters"]) == ("rename", "changed", {"renamed": 1})
    assert line["diff"] == {"added": ["renamed"], "removed": ["conv"], "changed": []}
    assert line["remarks"] == [
        {"kind": "note", "where": "renamed", "text": "has a new name", "values": {"length": 7}}
    ]
    assert line["before"].keys() == {"fingerprint", "nodes", "weight_bytes", "bytes_by_dtype"}


@pytest.mark.parametrize("content", ["", "nonsense\n", "[1]\n", '{"format": 99}\n', "{}\n"])
def test_what_is_no_log_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "passes.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError):
        read_records(path)


def test_the_log_does_not_say_where_the_source_lay(tiny_model: Model, tmp_path: Path) -> None:
    source = replace(tiny_model.source, name="/home/somebody/net.onnx")
    write_records(tmp_path / "log", Header("rename", source, "ort-cpu", 0), ())
    assert read_records(tmp_path / "log")[0].source.name == "net.onnx"


def test_progress_names_the_pass_that_runs(tiny_model: Model, pass_context: PassContext) -> None:
    calls: list[tuple[str, int, int]] = []
    show = ShowProgress(lambda label, done, total: calls.append((label, done, total)))
    Pipeline((Rename(),)).run(tiny_model, pass_context, [show])
    assert calls == [("rename", 0, 1), ("rename", 1, 1)]


def test_dumps_are_onnx_text_and_only_of_changes(
    tiny_model: Model, pass_context: PassContext, tmp_path: Path
) -> None:
    passes = (Rename("other"), Rename("other"), Rename("third"))
    Pipeline(passes).run(tiny_model, pass_context, [DumpText(tmp_path / "ir")])
    dumps = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert dumps == ["000_source.onnx.txt", "001_rename.onnx.txt", "003_rename.onnx.txt"]
    text = (tmp_path / "ir" / "003_rename.onnx.txt").read_text(encoding="utf-8")
    nodes = onnx.parser.parse_model(text).graph.node
    assert [node.name for node in nodes] == ["third", "relu", "pool", "flat", "dense"]


def test_text_shows_small_tensors_and_the_digest_of_large_ones(tiny_model: Model) -> None:
    text = model_text(tiny_model.ir)
    assert text.count('"sha256:') == 2
    assert len(text) < 2000
    kernel = tiny_model.graph.initializers["kernel"]
    assert kernel.const_value is not None
    changed = tiny_model.clone()
    array = kernel.const_value.numpy().copy()
    array[0, 0, 0, 0] += 1
    changed.graph.initializers["kernel"].const_value = onnx_ir.Tensor(array)
    assert model_text(changed.ir) != text


def test_a_crash_can_be_run_again(
    tiny_model: Model, pass_context: PassContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = Norm("layer", np.ones(3, np.float32), np.zeros(3, np.float32))
    model = tiny_model.with_fact(Norms({"y": norm}))
    feeds = StoredFeeds(({"x": np.zeros((2, 3, 8, 8), np.float32)},))
    ctx = replace(pass_context, seed=11, calibration=feeds)
    pipeline = Pipeline((Rename(), Crash(), Rename("later")))
    log = JsonLog(tmp_path / "log.jsonl", Header(str(pipeline), model.source, "ort-cpu", 11))
    with pytest.raises(PassFailed) as caught:
        pipeline.run(model, ctx, [Reproducer(tmp_path / "crashes"), log])
    (folder,) = (tmp_path / "crashes").iterdir()
    assert folder.name.startswith("002_crash-")
    assert caught.value.hint == f"octavo replay {folder} runs it again"

    found = read_reproduction(folder)
    assert (found.pipeline, found.seed, found.target) == ("crash,rename{to=later}", 11, "ort-cpu")
    assert found.error.rstrip().endswith("KeyError: 11")
    assert found.model.graph[0].name == "renamed"
    assert found.model.source == model.source
    before_crash = Pipeline((Rename(),)).run(model, pass_context).model
    assert found.model.fingerprint == before_crash.fingerprint
    np.testing.assert_array_equal(found.model.fact(Norms).by_value["y"].gamma, norm.gamma)
    assert found.calibration is not None
    assert (found.calibration.samples, found.calibration.sha256) == (2, feeds.sha256)
    again = replace(pass_context, seed=found.seed)
    with pytest.raises(PassFailed, match="crash: KeyError: 11"):
        Pipeline((Crash(),)).run(found.model, again)

    failed = read_records(tmp_path / "log.jsonl")[1][-1]
    assert (failed.status, failed.index) == ("failed", 1)
    assert [remark.text for remark in failed.remarks] == ["the last words", "KeyError: 11"]


def test_a_failed_verification_leaves_a_reproducer_too(
    tiny_model: Model, pass_context: PassContext, tmp_path: Path
) -> None:
    pipeline = Pipeline((Crash(verified=True),))
    with pytest.raises(VerificationFailed, match="2 nodes are called 'relu'") as caught:
        pipeline.run(tiny_model, pass_context, [Reproducer(tmp_path)])
    assert caught.value.hint.startswith(f"octavo replay {tmp_path}")
    assert len(list(tmp_path.glob("001_crash-*/replay.json"))) == 1


def test_a_reproducer_that_cannot_be_written_hides_no_error(
    tiny_model: Model, pass_context: PassContext, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way", encoding="utf-8")
    with pytest.raises(PassFailed, match="KeyError") as caught:
        Pipeline((Crash(),)).run(tiny_model, pass_context, [Reproducer(blocked)])
    assert caught.value.hint == ""


def test_a_model_with_wrong_shapes_is_reproduced_as_it_is(
    tiny_model: Model, pass_context: PassContext, tmp_path: Path
) -> None:
    pooled = tiny_model.graph[2].outputs[0]
    assert (pooled.name, pooled.shape) == ("pooled", onnx_ir.Shape(["N", 8, 1, 1]))
    pooled.shape = onnx_ir.Shape([7])
    with pytest.raises(PassFailed):
        Pipeline((Crash(),)).run(tiny_model, pass_context, [Reproducer(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert read_reproduction(folder).model.graph[2].outputs[0].shape == onnx_ir.Shape([7])


def test_what_is_no_reproducer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a reproducer folder"):
        read_reproduction(tmp_path)


def test_peak_memory_follows_allocations() -> None:
    before = peak_resident_bytes()
    block = np.ones(before // 8 + (64 << 20) // 8)
    assert peak_resident_bytes() >= before + (32 << 20)
    assert block[0] == 1.0


def test_ranges_survive_a_reproducer(
    tiny_model: Model, pass_context: PassContext, tmp_path: Path
) -> None:
    ranges = Ranges({"y": Range(-1.0, 2.0, -1.5, 2.5)}, "mse", 4, "0" * 64)
    model = tiny_model.with_fact(ranges)
    with pytest.raises(PassFailed):
        Pipeline((Crash(),)).run(model, pass_context, [Reproducer(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert read_reproduction(folder).model.fact(Ranges) == ranges
