"""Losses and metrics, compared with scikit-learn's and with what PyTorch gives for one batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scanweave.graph import tasks
from scanweave.graph.tasks import Meter, Task, infer_task

pytest.importorskip("torchmetrics")


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flags(*shape: int, seed: int = 1) -> torch.Tensor:
    return (draws(*shape, seed=seed) > 0.3).float()


def test_losses_are_those_of_torch():
    scores, classes = draws(9, 4), torch.arange(9) % 4
    multiclass = Task("graph", "multiclass", 4, "accuracy")
    torch.testing.assert_close(multiclass.loss(scores, classes), F.cross_entropy(scores, classes))
    multilabel = Task("graph", "multilabel", 4, "ap")
    expected = F.binary_cross_entropy_with_logits(scores, flags(9, 4))
    torch.testing.assert_close(multilabel.loss(scores, flags(9, 4)), expected)
    regression = Task("graph", "regression", 4, "mae")
    torch.testing.assert_close(regression.loss(scores, flags(9, 4)), F.l1_loss(scores, flags(9, 4)))


@pytest.mark.parametrize("shape", [(9,), (9, 1)])
def test_binary_targets_may_have_another_shape(shape):
    task = Task("node", "binary", 1, "auroc")
    target = torch.arange(9) % 2
    expected = F.binary_cross_entropy_with_logits(draws(9), target.float())
    torch.testing.assert_close(task.loss(draws(9).view(shape), target), expected)


def test_unknown_labels_do_not_count():
    task = Task("graph", "multilabel", 3, "ap")
    scores, target = draws(8, 3).requires_grad_(), flags(8, 3)
    target[1, 2] = target[5, 0] = torch.nan
    known = ~target.isnan()
    loss = task.loss(scores, target)
    expected = F.binary_cross_entropy_with_logits(scores[known], target[known])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[~known].eq(0).all()
    assert scores.grad[known].ne(0).all()


@pytest.mark.parametrize("metric", ["ap", "auroc"])
def test_multilabel_metrics_are_scikit_learns(metric):
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, target = draws(60, 5), flags(60, 5)
    meter = Meter(Task("graph", "multilabel", 5, metric))
    for part in range(0, 60, 25):
        meter.update(scores[part : part + 25], target[part : part + 25])
    score = sklearn.average_precision_score if metric == "ap" else sklearn.roc_auc_score
    found = meter.compute()
    assert found[metric] == pytest.approx(score(target.numpy(), scores.numpy()), abs=1e-6)
    whole = F.binary_cross_entropy_with_logits(scores, target)
    assert found["loss"] == pytest.approx(float(whole), rel=1e-6)
    assert next(iter(found)) == metric  # picks the best epoch


@pytest.mark.parametrize("metric", ["auroc", "ap", "accuracy"])
def test_binary_metrics_are_scikit_learns(metric):
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, target = draws(50), flags(50)
    meter = Meter(Task("node", "binary", 1, metric))
    meter.update(scores.unsqueeze(1), target.long())
    expected = {
        "auroc": lambda: sklearn.roc_auc_score(target, scores),
        "ap": lambda: sklearn.average_precision_score(target, scores),
        "accuracy": lambda: sklearn.accuracy_score(target, scores > 0),
    }[metric]()
    assert meter.compute()[metric] == pytest.approx(float(expected), abs=1e-6)


def test_class_metrics_and_their_order():
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, target = draws(50, 3), torch.arange(50) % 3
    found = {}
    for metric in ("accuracy", "f1"):
        meter = Meter(Task("node", "multiclass", 3, metric))
        meter.update(scores, target)
        found[metric] = meter.compute()
    guess = scores.argmax(1)
    assert found["accuracy"]["accuracy"] == pytest.approx(float((guess == target).float().mean()))
    f1 = sklearn.f1_score(target, guess, average="macro")
    assert found["f1"]["f1"] == pytest.approx(float(f1), abs=1e-6)
    # accuracies of few samples are often equal
    assert [next(iter(metrics)) for metrics in found.values()] == ["loss", "f1"]


def test_absolute_error():
    meter = Meter(Task("graph", "regression", 2, "mae"))
    meter.update(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))
    assert meter.compute() == {"mae": 1.5, "loss": 1.5}


def test_labels_that_are_nan_are_not_measured():
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, target = draws(40), flags(40)
    target[::5] = torch.nan
    meter = Meter(Task("graph", "binary", 1, "auroc"))
    meter.update(scores, target)
    known = ~target.isnan()
    expected = sklearn.roc_auc_score(target[known], scores[known])
    assert meter.compute()["auroc"] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(
    ("y", "metric", "expected"),
    [
        (torch.tensor([0, 2, 1]), "auto", ("multiclass", 3, "accuracy")),
        (torch.tensor([0, 1, 1]), "auto", ("multiclass", 2, "accuracy")),
        (torch.tensor([0, 1, 1]), "auroc", ("binary", 1, "auroc")),
        (torch.tensor([[0.0, 1.0], [1.0, 1.0]]), "auto", ("multilabel", 2, "ap")),
        (torch.tensor([[0, 1], [1, 1]]), "auto", ("multilabel", 2, "ap")),
        (torch.tensor([[0.0, torch.nan], [1.0, 1.0]]), "auroc", ("multilabel", 2, "auroc")),
        (torch.tensor([[0.5, 1.0]]), "auto", ("regression", 2, "mae")),
        (torch.tensor([0.5, 1.5]), "mae", ("regression", 1, "mae")),
        (torch.tensor([0.0, torch.nan, 1.0]), "auto", ("binary", 1, "auroc")),
    ],
    ids=str,
)
def test_task_is_seen_from_the_labels(y, metric, expected):
    task = infer_task("graph", y, metric)
    assert (task.kind, task.outputs, task.metric) == expected
    assert task.level == "graph"


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="metric must be one of mae for regression, got 'ap'"):
        Task("graph", "regression", 1, "ap")
    with pytest.raises(ValueError, match="outputs must be at least 1, got 0"):
        Task("graph", "multiclass", 0, "accuracy")
    with pytest.raises(ValueError, match="graphs must hold at least one graph, got none"):
        Meter(Task("graph", "binary", 1, "auroc")).compute()
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs torchmetrics: pip install"):
        Meter(Task("graph", "binary", 1, "auroc"))


def test_no_numpy_is_left_behind():
    """Metrics come back as plain numbers, which JSON can hold."""
    meter = Meter(Task("graph", "regression", 1, "mae"))
    meter.update(torch.ones(2, 1), torch.zeros(2, 1))
    assert not any(isinstance(value, np.generic) for value in meter.compute().values())
