"""What a model is trained for: its loss, and the metric that the data set's authors use.

Task            level, kind, number of scores and metric
Meter           loss and metric over many batches, through torchmetrics
infer_task      what labels look like -> Task
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Level = Literal["graph", "node", "link"]
Kind = Literal["multiclass", "multilabel", "binary", "regression"]
MetricName = Literal["accuracy", "f1", "ap", "auroc", "mae"]

_METRICS: dict[str, tuple[MetricName, ...]] = {
    "multiclass": ("accuracy", "f1"),
    "multilabel": ("ap", "auroc"),
    "binary": ("auroc", "ap", "accuracy"),
    "regression": ("mae",),
}


@dataclass(frozen=True)
class Task:
    """A level, a kind of target, and a metric.

    Attributes:
        level: What has a label: graphs, nodes, or pairs of nodes (`link`: is there an edge).
        kind: `multiclass`, one of many; `multilabel`, any of many; `binary`, one yes or no;
            `regression`, numbers.
        outputs: Scores that the model returns.
        metric: `accuracy`; `f1`, the mean over classes; `ap`, average precision, the mean over
            labels; `auroc`, area under the ROC curve, the mean over labels; `mae`, mean absolute
            error.

    Raises:
        ValueError: the metric is none of the kind's, or there are no outputs.
    """

    level: Level
    kind: Kind
    outputs: int
    metric: MetricName

    def __post_init__(self) -> None:
        if self.metric not in _METRICS[self.kind]:
            known = ", ".join(_METRICS[self.kind])
            raise ValueError(f"metric must be one of {known} for {self.kind}, got {self.metric!r}")
        if self.outputs < 1:
            raise ValueError(f"outputs must be at least 1, got {self.outputs}")

    def loss(self, scores: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross-entropy, or mean absolute error; labels that are NaN do not count.

        Args:
            scores: (n, outputs); (n,) or (n, 1) when binary.
            target: Classes (n,) int64, else numbers of the shape of `scores`.
            reduction: `mean` or `sum`, over rows and labels.
        """
        if self.kind == "multiclass":
            return F.cross_entropy(scores, target, reduction=reduction)
        target = target.reshape(scores.shape).to(scores.dtype)
        known = ~target.isnan()
        # a plain mask would make the device count its entries and wait for the number
        target = target.nan_to_num(0.0)
        if self.kind == "regression":
            each = (scores - target).abs()
        else:
            each = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
        total = (each * known).sum()
        return total if reduction == "sum" else total / known.sum().clamp(min=1)


class Meter:
    """Loss and metric over many batches, without waiting for the device until `compute`."""

    def __init__(self, task: Task, device: torch.device | str = "cpu"):
        """Start at nothing.

        Args:
            task: The task.
            device: Where scores will be.

        Raises:
            ImportError: torchmetrics is not installed.
        """
        self.task = task
        self.metric = _metric(task).to(device)
        self.sum = torch.zeros((), device=device)
        self.count = 0

    @torch.no_grad()
    def update(self, scores: Tensor, target: Tensor) -> None:
        """Add a batch; arguments as those of `Task.loss`."""
        kind = self.task.kind
        scores = scores.float()
        if kind != "multiclass":
            target = target.reshape(scores.shape)
        self.sum += self.task.loss(scores, target, reduction="sum")
        self.count += target.numel()
        if kind in ("multilabel", "binary"):
            target = target.float().nan_to_num(-1.0).long()
            # given logits, torchmetrics looks at all of them to see that they are no chances
            scores = scores.sigmoid()
        self.metric.update(scores, target)

    def compute(self) -> dict[str, float]:
        """`loss` and the metric under its name; accuracies go behind the loss.

        The first of them picks the best epoch: accuracies of few samples are often equal.

        Raises:
            ValueError: nothing was added.
        """
        if not self.count:
            raise ValueError("graphs must hold at least one graph, got none")
        found = {self.task.metric: float(self.metric.compute())}
        loss = {"loss": float(self.sum) / self.count}
        return {**loss, **found} if self.task.metric == "accuracy" else {**found, **loss}


def _metric(task: Task) -> Any:
    if find_spec("torchmetrics") is None:
        raise ImportError(
            "scanweave.graph.train needs torchmetrics: pip install 'scanweave[train]'"
        )
    from torchmetrics import MeanAbsoluteError
    from torchmetrics.classification import (
        BinaryAccuracy,
        BinaryAUROC,
        BinaryAveragePrecision,
        MulticlassAccuracy,
        MulticlassF1Score,
        MultilabelAUROC,
        MultilabelAveragePrecision,
    )

    # of several processes one alone may evaluate: the others would not come to meet it
    alone: dict[str, Any] = {"sync_on_compute": False}
    if task.kind == "regression":
        return MeanAbsoluteError(**alone)
    if task.kind == "multiclass":
        if task.metric == "f1":
            return MulticlassF1Score(task.outputs, average="macro", validate_args=False, **alone)
        return MulticlassAccuracy(task.outputs, average="micro", validate_args=False, **alone)
    fast: dict[str, Any] = {"ignore_index": -1, "validate_args": False, **alone}
    if task.kind == "multilabel":
        make = {"ap": MultilabelAveragePrecision, "auroc": MultilabelAUROC}[task.metric]
        return make(task.outputs, average="macro", **fast)
    return {"ap": BinaryAveragePrecision, "auroc": BinaryAUROC, "accuracy": BinaryAccuracy}[
        task.metric
    ](**fast)


def infer_task(level: Level, y: Tensor, metric: str = "auto") -> Task:
    """A task from all labels.

    Whole numbers in one column are classes, two of them `binary` where the metric asks for it;
    several columns of zeros and ones are labels; other numbers are regressed.

    Args:
        level: What has a label.
        y: Labels of all samples, (n,) or (n, k).
        metric: A metric, or `auto` for the kind's first.

    Raises:
        ValueError: the metric is none of the kind's.
    """
    columns = 1 if y.dim() == 1 else y.size(1)
    known = y[~y.isnan()] if y.is_floating_point() else y
    flags = bool(((known == 0) | (known == 1)).all())
    kind: Kind
    if y.is_floating_point() and not (flags and (columns > 1 or known.numel() < y.numel())):
        kind, outputs = "regression", columns
    elif columns > 1:
        kind, outputs = "multilabel", columns
    elif (metric in ("auroc", "ap") and flags) or y.is_floating_point():
        kind, outputs = "binary", 1
    else:
        kind, outputs = "multiclass", int(y.max()) + 1
    chosen: Any = _METRICS[kind][0] if metric == "auto" else metric
    return Task(level, kind, outputs, chosen)
