"""Fisher diagonals and Hessian traces against closed forms and exact Hessians."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from octavo.ir.errors import UnknownName, UsageError
from octavo.ir.read import read
from octavo.ir.torch_losses import SURE
from octavo.ir.torch_module import TorchGraph, differentiable
from octavo.ir.torch_traces import fisher_diagonal, hutchinson_trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((3, 4)).astype(np.float32)
SECOND = RNG.standard_normal((4, 2)).astype(np.float32)
# float32 sums of a few terms.
EXACT = 1e-5
# How many standard errors a seeded estimate may be off.
ERRORS = 4


def _graph(layers: int, first_size: int | str = "n") -> TorchGraph:
    """x·W, or tanh(x·W)·V."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a" if layers > 1 else "y"], name="m")]
    if layers > 1:
        nodes.append(helper.make_node("Tanh", ["a"], ["h"], name="t"))
        nodes.append(helper.make_node("MatMul", ["h", "v"], ["y"], name="m2"))
    constants = [onnx.numpy_helper.from_array(WEIGHT, "w")]
    constants += [onnx.numpy_helper.from_array(SECOND, "v")] if layers > 1 else []
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [first_size, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    opset = [helper.make_opsetid("", 21)]
    return differentiable(read(helper.make_model(graph, opset_imports=opset, ir_version=10)))


def _inputs(samples: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((samples, 3)).astype(np.float32)


def _softmax(x: NDArray[np.float32]) -> NDArray[np.float32]:
    raised = np.exp(x @ WEIGHT)
    chances: NDArray[np.float32] = raised / raised.sum(1, keepdims=True)
    return chances


@pytest.mark.parametrize("sizes", [(6,), (4, 2)])
def test_labels_give_the_squares_of_each_sample_s_gradient(sizes: tuple[int, ...]) -> None:
    x, labels = _inputs(6), np.array([0, 3, 1, 1, 2, 0])
    feeds = [{"x": part} for part in np.split(x, np.cumsum(sizes)[:-1])]
    found = fisher_diagonal(_graph(1), feeds, ["w"], likelihood="labels", labels=labels)["w"]
    # d(-log p)/dW = x ⊗ (p - onehot), of every sample.
    gradients = x[:, :, None] * (_softmax(x) - np.eye(4)[labels])[:, None, :]
    np.testing.assert_allclose(found.diagonal, (gradients**2).mean(0), rtol=EXACT, atol=1e-7)
    traces = (gradients**2).sum((1, 2))
    assert found.trace == pytest.approx(traces.mean(), rel=EXACT)
    assert found.error == pytest.approx(traces.std(ddof=1) / np.sqrt(6), rel=EXACT)
    assert (found.samples, found.diagonal.dtype.name) == (6, "float32")
    # The square of the batch's gradient is far from it.
    assert (gradients.mean(0) ** 2).sum() < 0.8 * found.trace


def test_own_labels_are_drawn_only_where_the_model_is_not_sure() -> None:
    """Against the closed form: the gradient of -log p of class k is x·(p - e_k)ᵀ."""
    x = 3 * _inputs(4000)
    found = fisher_diagonal(_graph(1), [{"x": x}], ["w"], likelihood="own", seed=3)["w"]
    p = _softmax(x)
    sure = p.max(1) >= SURE
    assert 0.2 < sure.mean() < 0.99
    squared = (p[:, None, :] - np.eye(4)[None]) ** 2
    chances = np.where(sure[:, None], np.eye(4)[p.argmax(1)], p)
    expected = np.einsum("ni,nk,nkj->ij", x**2, chances, squared) / len(x)
    true = np.einsum("ni,nk,nkj->ij", x**2, p, squared) / len(x)
    # Five standard errors of the mean over drawn labels.
    square = np.einsum("ni,nk,nkj->nij", x**4, chances, squared**2)
    each = np.einsum("ni,nk,nkj->nij", x**2, chances, squared)
    bound = 5 * np.sqrt((square - each**2).sum(0)) / len(x)
    assert (np.abs(found.diagonal - expected) <= bound + EXACT * expected).all()
    assert abs(found.trace - expected.sum()) < 0.2 * abs(found.trace - true.sum())


def test_sampled_labels_give_the_true_fisher() -> None:
    x = np.repeat(_inputs(2), 1500, axis=0)
    found = fisher_diagonal(_graph(1), [{"x": x}], ["w"], likelihood="sampled", seed=3)["w"]
    chances = _softmax(x)
    # E over y ~ p of (x ⊗ (p - onehot))² is x² ⊗ p·(1 - p).
    expected = ((x**2)[:, :, None] * (chances * (1 - chances))[:, None, :]).mean(0)
    assert abs(found.trace - expected.sum()) < ERRORS * found.error
    assert found.error < 0.05 * found.trace
    np.testing.assert_allclose(found.diagonal, expected, rtol=0.25, atol=0)
    again = fisher_diagonal(_graph(1), [{"x": x[:9]}], ["w"], likelihood="sampled", seed=3)["w"]
    same = fisher_diagonal(_graph(1), [{"x": x[:9]}], ["w"], likelihood="sampled", seed=3)["w"]
    other = fisher_diagonal(_graph(1), [{"x": x[:9]}], ["w"], likelihood="sampled", seed=4)["w"]
    np.testing.assert_array_equal(again.diagonal, same.diagonal)
    assert again.trace != other.trace


def test_gauss_newton_weighs_outputs_by_their_variance() -> None:
    x = np.repeat(_inputs(3), 800, axis=0)
    found = fisher_diagonal(_graph(1), [{"x": x}], ["w"], likelihood="gauss-newton")["w"]
    # y = x·W: E (Jᵀ·ε)² is x² for every column, over the variance of y.
    expected = np.repeat((x**2).mean(0)[:, None], 4, 1) / (x @ WEIGHT).var()
    assert abs(found.trace - expected.sum()) < ERRORS * found.error
    np.testing.assert_allclose(found.diagonal, expected, rtol=0.2, atol=0)


def test_a_graph_of_fixed_batch_takes_a_feed_as_one_sample() -> None:
    x, labels = _inputs(4), np.array([0, 1, 2, 3])
    graph = _graph(1, 2)
    assert not graph.batched
    feeds = [{"x": x[:2]}, {"x": x[2:]}]
    found = fisher_diagonal(graph, feeds, ["w"], likelihood="labels", labels=labels)["w"]
    each = x[:, :, None] * (_softmax(x) - np.eye(4)[labels])[:, None, :]
    pairs = each.reshape(2, 2, 3, 4).sum(1)
    np.testing.assert_allclose(found.diagonal, (pairs**2).mean(0), rtol=EXACT, atol=1e-7)
    assert found.samples == 2


def _mean_square(
    outputs: Mapping[str, torch.Tensor], feed: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    return ((outputs["y"] - feed["target"]) ** 2).mean()


def test_hutchinson_finds_the_trace_of_each_weight_s_block() -> None:
    x = _inputs(8)
    target = np.tanh(x @ WEIGHT) @ SECOND + np.float32(0.1)
    feeds = [{"x": x[k : k + 4], "target": target[k : k + 4]} for k in (0, 4)]
    found = hutchinson_trace(_graph(2), feeds, ["w", "v"], _mean_square, draws=400, seed=5)

    weights = {
        "w": torch.tensor(WEIGHT, requires_grad=True),
        "v": torch.tensor(SECOND, requires_grad=True),
    }
    y = torch.tanh(torch.from_numpy(x) @ weights["w"]) @ weights["v"]
    loss = ((y - torch.from_numpy(target)) ** 2).mean()
    for name, weight in weights.items():
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        rows = [torch.autograd.grad(g, weight, retain_graph=True)[0] for g in gradient.flatten()]
        exact = sum(float(row.flatten()[k]) for k, row in enumerate(rows))
        assert abs(found[name].trace - exact) < ERRORS * found[name].error, name
        assert found[name].error < 0.1 * exact, name


def test_hutchinson_is_exact_where_the_hessian_is_diagonal() -> None:
    feed = {"x": np.eye(3, dtype=np.float32)}

    def squares(
        outputs: Mapping[str, torch.Tensor], feed: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        return (outputs["y"] ** 2).sum()

    found = hutchinson_trace(_graph(1), [feed], ["w"], squares, draws=2)["w"]
    assert found.trace == pytest.approx(2 * WEIGHT.size, rel=EXACT)
    assert found.error == pytest.approx(0, abs=1e-4)


def test_a_loss_without_curvature_has_no_trace() -> None:
    found = hutchinson_trace(
        _graph(1), [{"x": _inputs(2)}], ["w"], lambda outputs, feed: outputs["y"].sum(), draws=2
    )
    assert (found["w"].trace, found["w"].error) == (0, 0)


def test_wrong_requests_are_refused() -> None:
    feeds = [{"x": _inputs(2)}]
    with pytest.raises(UnknownName, match="weight 'u'"):
        fisher_diagonal(_graph(1), feeds, ["u"], likelihood="sampled")
    with pytest.raises(UsageError, match="no labels"):
        fisher_diagonal(_graph(1), feeds, ["w"], likelihood="labels")
    with pytest.raises(UnknownName, match="weight 'u'"):
        hutchinson_trace(_graph(1), feeds, ["u"], _mean_square, draws=1)
