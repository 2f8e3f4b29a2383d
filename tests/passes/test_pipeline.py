"""The runner: checks before it runs, private copies, verification, records, facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import pytest

from octavo.ir.errors import PassFailed, UsageError, VerificationFailed
from octavo.ir.facts import Norms, Plan
from octavo.ir.model import Model
from octavo.passes.base import Pass, PassContext
from octavo.passes.pipeline import Pipeline


@final
@dataclass(frozen=True)
class DropRelu(Pass):
    """Remove every Relu."""

    name = "drop-relu"
    preserves = (Norms,)

    def run(self, model: Model, ctx: PassContext) -> Model:
        for node in list(model.graph):
            source = node.inputs[0]
            if node.op_type == "Relu" and source is not None:
                node.outputs[0].replace_all_uses_with(source)
                model.graph.remove(node, safe=True)
                ctx.count("dropped")
                ctx.remark("applied", node.name or "", "a Relu went", inputs=1)
        return model


@final
@dataclass(frozen=True)
class LearnPlan(Pass):
    """Produce an empty plan."""

    name = "learn-plan"
    produces = (Plan,)
    preserves = (Norms,)

    def run(self, model: Model, ctx: PassContext) -> Model:
        return model.with_fact(Plan({}, "test"))


@final
@dataclass(frozen=True)
class NeedPlan(Pass):
    """Do nothing, given a plan."""

    name = "need-plan"
    requires = (Plan,)

    def run(self, model: Model, ctx: PassContext) -> Model:
        return model


@final
@dataclass(frozen=True)
class BreakOrder(Pass):
    """Leave the graph in an order in which it cannot run."""

    name = "break-order"

    def run(self, model: Model, ctx: PassContext) -> Model:
        last = model.graph[-1]
        model.graph.remove(last)
        model.graph.insert_before(model.graph[0], last)
        return model


@final
@dataclass(frozen=True)
class Crash(Pass):
    """Raise what no pass should."""

    name = "crash"

    def run(self, model: Model, ctx: PassContext) -> Model:
        raise KeyError("surprise")


def test_a_missing_fact_names_the_pass_that_produces_it() -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline.parse("canonicalize,insert-fake-quant").check(())
    error = caught.value
    assert error.what == "insert-fake-quant needs Plan, and no pass before it produces it"
    assert error.where == "pass 2 of 'canonicalize,insert-fake-quant'"
    assert (
        error.hint
        == "put allocate or apply-structure or choose-kernels or refine before insert-fake-quant"
    )


def test_a_fact_that_a_later_pass_drops_is_missing() -> None:
    Pipeline((LearnPlan(), NeedPlan())).check(())
    with pytest.raises(UsageError, match="need-plan needs Plan"):
        Pipeline((LearnPlan(), DropRelu(), NeedPlan())).check(())


def test_nothing_runs_when_the_check_fails(tiny_model: Model, pass_context: PassContext) -> None:
    with pytest.raises(UsageError, match="need-plan"):
        Pipeline((Crash(), NeedPlan())).run(tiny_model, pass_context)


def test_the_source_model_never_changes(tiny_model: Model, pass_context: PassContext) -> None:
    before = [node.op_type for node in tiny_model.graph]
    result = Pipeline((DropRelu(),)).run(tiny_model, pass_context)
    assert "Relu" in before
    assert [node.op_type for node in tiny_model.graph] == before
    assert [n.op_type for n in result.model.graph] == [op for op in before if op != "Relu"]


def test_a_record_tells_what_a_pass_did(tiny_model: Model, pass_context: PassContext) -> None:
    passes = (LearnPlan(), DropRelu(), DropRelu())
    learned, dropped, again = Pipeline(passes).run(tiny_model, pass_context).records
    assert (learned.status, learned.facts_added, learned.diff.removed) == ("changed", ("Plan",), ())
    assert (dropped.status, dropped.facts_dropped) == ("changed", ("Plan",))
    assert (dropped.diff.removed, dropped.diff.changed) == (("relu",), ("pool",))
    assert dropped.before.nodes["Relu"] == 1
    assert "Relu" not in dropped.after.nodes
    assert dropped.counters == {"dropped": 1}
    assert [(r.kind, r.where, r.values) for r in dropped.remarks] == [
        ("applied", "relu", {"inputs": 1})
    ]
    assert (again.status, again.remarks, again.index) == ("unchanged", (), 2)
    assert again.before.fingerprint == again.after.fingerprint == dropped.after.fingerprint


def test_a_broken_graph_is_found_at_the_pass_that_broke_it(
    tiny_model: Model, pass_context: PassContext
) -> None:
    pipeline = Pipeline((LearnPlan(), BreakOrder()))
    with pytest.raises(VerificationFailed, match="after break-order: node 'dense' reads 'row'"):
        pipeline.run(tiny_model, pass_context)


def test_an_unexpected_error_is_wrapped_once(tiny_model: Model, pass_context: PassContext) -> None:
    with pytest.raises(PassFailed, match="crash: KeyError: 'surprise'") as caught:
        Pipeline((LearnPlan(), Crash())).run(tiny_model, pass_context)
    assert caught.value.where.startswith("pass 2, ")
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_parts_of_a_split_pipeline_count_on(
    tiny_model: Model, pass_context: PassContext
) -> None:
    before, after = Pipeline((LearnPlan(), DropRelu(), DropRelu())).split("drop-relu")
    assert [p.name for p in before.passes] == ["learn-plan"]
    model = before.run(tiny_model, pass_context).model
    records = after.run(model, pass_context).records
    assert [record.index for record in records] == [1, 2]
