"""Four small tasks of three domains, where mixers are compared at equal numbers of parameters.

    digits          8 x 8 pixels in rows, a token each; ssm_vit, two layers, % of test digits right
    digit graphs    the same as pixel graphs, breadth first; two GIN layers with the mixer, % right
    Peptides        Peptides-func; such layers with bonds (GINE), mean average precision, %
    Pendulum        300 recorded episodes; DecisionMamba, two blocks, mean return asked for 0

    TASKS           name -> class of a task
    make_task       name, device, folder of files -> the task
    match_width     task, mixer -> the width at which the model has the task's parameters
    learn           train a model on a task
    refusal         why a mixer cannot do a task, or nothing

Nothing here was tuned for any mixer: all have their default options (but for `OPTIONS`, so that
they fit), the same optimiser with `param_groups`, schedule, batches and number of steps. Causal
mixers read images in turns from layer to layer forward and backward, and graphs with a second mixer
for the other direction.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import global_mean_pool

import scanweave.vision  # noqa: F401 (registers the models)
from scanweave.core import mixer_info
from scanweave.core.training import param_groups
from scanweave.graph import GraphMamba, gin_conv
from scanweave.graph.batches import PackedGraphs
from scanweave.graph.datasets import load_splits
from scanweave.graph.digits import digit_graphs
from scanweave.graph.precompute import add_order
from scanweave.graph.tasks import Meter
from scanweave.rl import Agent, DecisionMamba, TrajectoryWindows, evaluate_agent, record_episodes

# widths are multiples of it: rotary positions need pairs
_STEP = 2
# the network that makes Hyena's filters would by itself have more parameters than the others
_NARROW = {"filter_width": 16}
OPTIONS: dict[str, dict[str, Any]] = {"hyena": _NARROW, "hyena_bidirectional": _NARROW}
DATA_DIR = Path("data")
_TEST_SHARE = 0.25
_LAYERS = 2


class Task(Protocol):
    """A task.

    Attributes:
        metric: What `score` measures.
        parameters: Of every model, as near as widths allow.
        size: Examples to train on.
        batch: Examples of a step.
        steps: Of a run.
        lr: Highest learning rate.
        device: Of the examples; models are moved there once they are built.
    """

    metric: str
    parameters: int
    size: int
    batch: int
    steps: int
    lr: float
    device: torch.device

    def build(self, mixer: str, width: int) -> nn.Module:
        """An untrained model."""
        ...

    def loss(self, model: nn.Module, examples: list[int]) -> Tensor:
        """The training loss of a batch."""
        ...

    def score(self, model: nn.Module) -> float:
        """The metric, of a model in evaluation mode."""
        ...


def _split(count: int) -> tuple[list[int], list[int]]:
    """Numbers of the training and the test examples, the same in every run."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([round(_TEST_SHARE * count)])
    return train.tolist(), test.tolist()


class Digits:
    """scikit-learn's digits as sequences of 64 pixels."""

    metric, parameters = "test accuracy, %", 20_000
    batch, steps, lr = 32, 300, 4e-3

    def __init__(self, device: torch.device | str = "cpu") -> None:
        from sklearn.datasets import load_digits

        self.device = torch.device(device)
        pixels, numbers = load_digits(return_X_y=True)
        images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
        labels = torch.as_tensor(numbers, dtype=torch.int64)
        train, test = _split(len(labels))
        images = ((images - images[train].mean()) / images[train].std()).to(self.device)
        labels = labels.to(self.device)
        self.images, self.labels = images[train], labels[train]
        self.test_images, self.test_labels = images[test], labels[test]
        self.size = len(train)

    def build(self, mixer: str, width: int) -> nn.Module:
        """A stack over pixels, with mean pooling and learned positions."""
        return timm.create_model(
            "ssm_vit_tiny_patch16_224",
            img_size=8,
            patch_size=1,
            in_chans=1,
            num_classes=10,
            embed_dim=width,
            depth=_LAYERS,
            path="bidirectional" if mixer_info(mixer).causal else "raster",
            mixer=mixer,
            mixer_args=OPTIONS.get(mixer),
        )

    def loss(self, model: nn.Module, examples: list[int]) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(model(self.images[examples]), self.labels[examples])

    def score(self, model: nn.Module) -> float:
        """Percent of the test digits right."""
        guesses = torch.cat([model(part).argmax(1) for part in self.test_images.split(150)])
        return 100 * (guesses == self.test_labels).float().mean().item()


class _Graphs:
    """Convolutions beside mixers over the breadth-first order of every graph."""

    graphs: PackedGraphs
    test: PackedGraphs
    in_channels, out_channels = 1, 10
    edge_dim: int | None = None

    def build(self, mixer: str, width: int) -> nn.Module:
        """Two layers and mean pooling."""
        return GraphMamba(
            self.in_channels,
            width,
            _LAYERS,
            self.out_channels,
            conv=partial(gin_conv, edge_dim=self.edge_dim),
            mixer=mixer,
            mixer_kwargs=OPTIONS.get(mixer),
            pool=global_mean_pool,
        )

    def _run(self, model: nn.Module, batch: Any) -> Tensor:
        known = {"batch_size": batch.num_graphs, "node_order": batch.node_order}
        if self.edge_dim is not None:
            known["edge_attr"] = batch.edge_attr
        return model(batch.x, batch.edge_index, batch=batch.batch, **known)


class DigitGraphs(_Graphs):
    """The same digits as graphs of their inked pixels, without coordinates."""

    metric, parameters = "test accuracy, %", 20_000
    batch, steps, lr = 32, 300, 4e-3

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        graphs = digit_graphs()
        add_order(graphs, ("bfs",))
        train, test = _split(len(graphs))
        self.graphs = PackedGraphs([graphs[i] for i in train], self.device)
        self.test = PackedGraphs([graphs[i] for i in test], self.device)
        self.size = len(train)

    def loss(self, model: nn.Module, examples: list[int]) -> Tensor:
        """Cross-entropy."""
        batch: Any = self.graphs.__getitems__(examples)
        return F.cross_entropy(self._run(model, batch), batch.y)

    def score(self, model: nn.Module) -> float:
        """Percent of the test graphs right."""
        batches: list[Any] = self.test.batches(150)
        right = sum(int((self._run(model, b).argmax(1) == b.y).sum()) for b in batches)
        return 100 * right / len(self.test)


class Peptides(_Graphs):
    """Peptides-func: ten labels of molecules, official split, `examples` of its training part.

    Args:
        device: Of the examples.
        data_dir: Folder of the files, as in `load_splits`.

    Raises:
        ValueError: the files are not there.
    """

    metric, parameters = "test average precision, %", 20_000
    batch, steps, lr = 32, 500, 4e-3
    examples = 4_000

    def __init__(self, device: torch.device | str = "cpu", data_dir: Path = DATA_DIR) -> None:
        self.device = torch.device(device)
        splits = load_splits("Peptides-func", data_dir)
        self.target = splits.target
        self.in_channels, self.edge_dim = splits.in_channels, splits.edge_dim
        # from anywhere in the part, the same in every run
        order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))
        chosen = [splits.train[i] for i in order[: self.examples].tolist()]
        for graphs in (chosen, splits.test):
            add_order(graphs, ("bfs",))
        self.graphs = PackedGraphs(chosen, self.device)
        self.test = PackedGraphs(splits.test, self.device)
        self.size = len(chosen)

    def loss(self, model: nn.Module, examples: list[int]) -> Tensor:
        """Binary cross-entropy, the mean over labels."""
        batch: Any = self.graphs.__getitems__(examples)
        return self.target.loss(self._run(model, batch), batch.y)

    def score(self, model: nn.Module) -> float:
        """Average precision on all test graphs, the mean over labels, in percent."""
        meter = Meter(self.target, self.device)
        batches: list[Any] = self.test.batches(128)
        for batch in batches:
            meter.update(self._run(model, batch), batch.y)
        return 100 * meter.compute()["ap"]


class Pendulum:
    """Windows of five steps from episodes of players of mixed quality; then played."""

    metric, parameters = "return", 20_000
    batch, steps, lr = 64, 400, 2e-3
    recordings, episodes = 300, 20

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.recorded = record_episodes(
            "Pendulum-v1", self.recordings, noise=0.75, action_noise=0.1, seed=0
        )
        self.windows = TrajectoryWindows(self.recorded, 5)
        self.size = len(self.windows)

    def build(self, mixer: str, width: int) -> nn.Module:
        """An agent that is asked for the best return there is, 0."""
        model = DecisionMamba(
            3,
            1,
            width,
            _LAYERS,
            5,
            mixer=mixer,
            mixer_kwargs=OPTIONS.get(mixer),
            dropout=0.0,
            remove_act_embs=True,
            timestep_embedding=False,
        )
        return Agent.from_episodes(
            model,
            self.recorded,
            action_low=[-2.0],
            action_high=[2.0],
            targets=[0.0],
            env_id="Pendulum-v1",
        )

    def loss(self, model: nn.Module, examples: list[int]) -> Tensor:
        """Squared error of the actions."""
        batch = self.windows.__getitems__(examples)
        return model({name: part.to(self.device) for name, part in batch.items()})[0]

    def score(self, model: nn.Module) -> float:
        """Mean return of 20 episodes, 0 the best possible."""
        assert isinstance(model, Agent)
        return evaluate_agent(model, episodes=self.episodes).results[0].mean


TASKS: dict[str, type[Digits] | type[Pendulum] | type[DigitGraphs] | type[Peptides]] = {
    "digits": Digits,
    "Pendulum": Pendulum,
    "digit graphs": DigitGraphs,
    "Peptides": Peptides,
}


def make_task(name: str, device: torch.device | str = "cpu", data_dir: Path = DATA_DIR) -> Task:
    """Read what a task needs.

    Args:
        name: A key of `TASKS`.
        device: Where its models run.
        data_dir: Folder of the files of tasks that need some.

    Raises:
        ValueError: files are not there.
    """
    made = TASKS[name]
    return made(device, data_dir) if issubclass(made, Peptides) else made(device)


def refusal(task: Task, mixer: str) -> str:
    """Why the task's model refuses the mixer, empty if it takes it."""
    try:
        task.loss(task.build(mixer, 8 * _STEP).to(task.device), [0, 1]).backward()
    except ValueError as reason:
        return str(reason)
    return ""


def match_width(task: Task, mixer: str) -> int:
    """The width whose number of parameters is nearest to the task's."""

    def count(steps: int) -> int:
        return sum(p.numel() for p in task.build(mixer, _STEP * steps).parameters())

    low, high = 1, 2
    while count(high) < task.parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < task.parameters else (low, middle)
    return _STEP * min((low, high), key=lambda steps: abs(count(steps) - task.parameters))


def learn(task: Task, model: nn.Module, seed: int, steps: int = 0) -> list[float]:
    """Train: AdamW, linear warm-up over a tenth, then a cosine; the loss of every step.

    Args:
        task: What is learned.
        model: In training mode.
        seed: Of the batches.
        steps: 0 for those of the task.
    """
    steps = steps or task.steps
    warm = max(1, steps // 10)
    optimizer = torch.optim.AdamW(param_groups(model, 0.01, lr=task.lr), lr=task.lr)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator, waiting, losses = torch.Generator().manual_seed(seed), [], []
    for _ in range(steps):
        if len(waiting) < task.batch:
            waiting = torch.randperm(task.size, generator=generator).tolist()
        examples, waiting = waiting[: task.batch], waiting[task.batch :]
        loss = task.loss(model, examples)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses
