"""Settings of a training run.

Config   everything that `python -m scanweave.graph.train` takes
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scanweave.core.training import TrainConfig

from .mixing import Ties


def _train_defaults() -> TrainConfig:
    return TrainConfig(
        output_dir=Path("runs/graph"),
        epochs=12,
        batch_size=32,
        lr=4e-3,
        weight_decay=0.01,
        warmup_steps=40,
        clip_grad=1.0,
    )


@dataclass(frozen=True)
class Config:
    """Settings of one run."""

    dataset: str = "digits"
    """`digits`; any set of PyG, such as `PROTEINS`, `Cora`, `Minesweeper`, `Peptides-func`; or its
    class and name, `Amazon:Photo`."""
    data_dir: Path = Path("data")
    """Folder with `<dataset>/raw`, or with a folder such as `planetoid` that has it."""
    cache_dir: Path = Path("runs/data")
    """Folder for what is made of the files: PyG's `processed`, node orders, encodings."""
    download: bool = False
    """Let PyG download a set that is not there, into `data_dir`."""
    task: Literal["auto", "graph", "node", "link"] = "auto"
    """What is predicted: labels as the set has them, or `link`, missing edges of a graph."""
    metric: Literal["auto", "accuracy", "f1", "ap", "auroc", "mae"] = "auto"
    """What is measured; `auto` takes the one that the set's authors use."""
    coordinates: Literal[0, 1, 2] = 0
    """Coordinates that a pixel of `digits` knows: none, its row, or both."""
    val_fraction: float = 0.1
    """Share of each class (or of the edges) for validation, which picks the epoch; unused where
    the set has official splits."""
    test_fraction: float = 0.2
    """The same for the test."""
    folds: int = 0
    """Cut the graphs into so many parts instead: number `split_seed` is the test, the next one
    validation, the rest training."""
    split_seed: int = 0
    """Seed of the split, apart from the training's seed; or number of the official split, where
    a set has several, or of the fold."""
    rwse: int = 0
    """Steps of return probabilities put behind the node features."""
    lap_pe: int = 0
    """Laplacian eigenvectors put behind the node features."""

    model: Literal["graph_mamba", "gmn", "gps"] = "graph_mamba"
    """`graph_mamba`, layers as PyG's GPS with a mixer; `gmn`, Graph Mamba Networks with subgraph
    tokens; `gps`, PyG's `GPSConv` to compare with."""
    hidden_channels: int = 48
    """Channels of the layers."""
    num_layers: int = 3
    """Number of layers."""
    conv: Literal["gin", "gcn", "none"] = "gin"
    """Local convolution; `gin` uses edge features where the set has them."""
    mixer: str = "bimamba"
    """Registered mixer, or `none` for the same model without mixers."""
    d_state: int = 0
    """State size of Mamba mixers, unused by others; 0 leaves the mixer's default."""
    mixer_args: tuple[str, ...] = ()
    """Further arguments of the mixer as name=value, such as `pattern=griffin` of a `stack`."""
    order: tuple[str, ...] = ("degree",)
    """Node order; several names are compared one after another."""
    precompute_order: bool = False
    """Compute the order once per graph, not in every layer; ties are then the same in all."""
    bidirectional: bool = True
    """Give a causal mixer a partner that reads backwards."""
    num_perms: int = 1
    """Node orders to average, in training."""
    eval_perms: int = 0
    """Node orders to average, in evaluation; 0 takes as many as in training."""
    ties: Ties = "noise"
    """How nodes of equal score are ordered."""
    walk_length: int = 4
    """`gmn`: steps of the longest walks; 0 for no subgraph tokens."""
    num_walks: int = 4
    """`gmn`: walks of a token."""
    num_repeats: int = 2
    """`gmn`: tokens of one length."""
    encoder: Literal["mean", "gin", "rwf"] = "mean"
    """`gmn`: from a token's nodes to a vector."""
    token_chunk_size: int = 0
    """`gmn`: nodes whose tokens are encoded at once; 0 for all."""
    attn_type: Literal["multihead", "performer"] = "multihead"
    """`gps`: kind of attention."""
    heads: int = 4
    """`gps`: attention heads."""
    dropout: float = 0.0
    """Dropout probability."""
    norm: str = "batch_norm"
    """Normalization; `none` for none."""
    pool: Literal["mean", "add", "max"] = "mean"
    """From node vectors to a graph vector."""
    head_layers: int = 1
    """Linear layers behind it, or behind node vectors; for links those of the pairs' MLP."""
    link_score: Literal["dot", "hadamard", "concat"] = "dot"
    """`link`: product of two node vectors, an MLP on their elementwise product, or on both."""

    loader: Literal["auto", "packed", "collate", "full", "random", "cluster", "neighbor"] = "auto"
    """Batches of many graphs: `packed`, kept on the device and gathered there, or `collate`, by
    PyG's DataLoader. Of one graph: `full`; `random` nodes or `cluster`s of neighbours with the
    edges among them; `neighbor`, PyG's NeighborLoader, which needs pyg-lib. `auto` is `packed` or
    `full`."""
    num_parts: int = 10
    """`random`, `cluster`: parts that a graph is cut into; a step sees one, with `cluster` a
    tenth of them if there are more."""
    num_neighbors: tuple[int, ...] = (10, 10)
    """`neighbor`: neighbours sampled at every hop."""

    train: TrainConfig = field(default_factory=_train_defaults)
    """The training loop."""

    def __post_init__(self) -> None:
        if self.folds < 0 or self.folds in (1, 2):
            raise ValueError(f"folds must be 0 or at least 3, got {self.folds}")
        for name in ("rwse", "lap_pe"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("num_parts", "head_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
