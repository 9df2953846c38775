"""Random splits, with a seed of their own.

split_numbers     class by class, of samples of any kind
cut_folds         parts of equal size, for cross-validation
split_one_graph   the nodes of one graph, by its own masks where it has some
split_links       the edges of one graph
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import RandomLinkSplit
from torch_geometric.utils import is_undirected

from .packing import edges_of

Parts = tuple[list[Data], list[Data], list[Data]]


def split_numbers(
    labels: Tensor, fractions: tuple[float, float], seed: int
) -> tuple[list[int], list[int], list[int]]:
    """Numbers of samples, class by class: every part has each class in nearly equal share.

    Args:
        labels: Class of every sample, (n,) int64.
        fractions: Shares of the second and the third part; the first gets the rest.
        seed: Seed of the split.

    Raises:
        ValueError: the fractions are negative or leave nothing for the first part.
    """
    if min(fractions) < 0 or sum(fractions) >= 1:
        raise ValueError(f"fractions must be at least 0 with a sum below 1, got {fractions}")
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)].tolist()
        one = round(len(members) * fractions[0])
        two = one + round(len(members) * fractions[1])
        for part, chosen in zip(
            parts, (members[two:], members[:one], members[one:two]), strict=True
        ):
            part.extend(chosen)
    return parts


def cut_folds(graphs: Sequence[Data], folds: int, number: int) -> Parts:
    """Cross-validation: fold `number` is the test, the next chooses the epoch, the rest train.

    The folds are the same for every number, and have each class in nearly equal share.

    Args:
        graphs: Graphs with `y` (1,).
        folds: How many parts.
        number: Which of them, taken modulo `folds`.

    Raises:
        ValueError: there are fewer than three folds.
    """
    if folds < 3:
        raise ValueError(f"folds must be at least 3, got {folds}")
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([int(graph["y"]) for graph in graphs])
    # shuffled, then by class: dealt out like cards, so that classes and sizes come out even
    order = torch.randperm(len(graphs), generator=generator)
    order = order[torch.argsort(labels[order], stable=True)]
    of = torch.empty_like(order)
    of[order] = torch.arange(len(graphs)) % folds
    test, val = number % folds, (number + 1) % folds
    parts: Parts = ([], [], [])
    for graph, fold in zip(graphs, of.tolist(), strict=True):
        parts[2 if fold == test else 1 if fold == val else 0].append(graph.clone())
    return parts


def split_one_graph(data: Data, fractions: tuple[float, float], seed: int) -> Parts:
    """The graph three times, with `mask` (n,) for the nodes of each part.

    Args:
        data: A graph; of several splits in its masks (n, S), number `seed` modulo S is taken.
        fractions: Shares for validation and test where it has no masks.
        seed: Seed or number of the split.

    Raises:
        ValueError: as `split_numbers`.
    """
    names = ("train_mask", "val_mask", "test_mask")
    if all(name in data for name in names):
        masks = [data[name].bool() for name in names]
        masks = [mask if mask.dim() == 1 else mask[:, seed % mask.size(1)] for mask in masks]
    else:
        chosen = split_numbers(data["y"].long(), fractions, seed)
        masks = [torch.zeros(int(data.num_nodes or 0), dtype=torch.bool) for _ in names]
        for mask, part in zip(masks, chosen, strict=True):
            mask[part] = True
    kept = {key: value for key, value in data.to_dict().items() if key not in names}
    train, val, test = ([Data(**kept, mask=mask)] for mask in masks)
    return train, val, test


def split_links(data: Data, fractions: tuple[float, float], seed: int) -> Parts:
    """The graph three times, with edges to predict and as many pairs that are none.

    Training sees the edges of the training part alone, and predicts them; validation sees the same
    edges, the test those of validation too. Training has no pairs that are none: draw new ones in
    every step.

    Args:
        data: A graph.
        fractions: Shares of the edges for validation and test.
        seed: Seed of the split.

    Returns:
        Graphs with `edge_label_index` (2, L) int64 and `edge_label` (L,) float32.

    Raises:
        ValueError: as `split_numbers`.
    """
    from scanweave.core.training import isolated_random_state

    if min(fractions) < 0 or sum(fractions) >= 1:
        raise ValueError(f"fractions must be at least 0 with a sum below 1, got {fractions}")
    kept = {key: data[key] for key in ("x", "edge_attr", "node_order") if key in data}
    edges = edges_of(data.edge_index)
    plain = Data(edge_index=edges, **kept)
    cut = RandomLinkSplit(
        fractions[0],
        fractions[1],
        is_undirected=is_undirected(edges, num_nodes=plain.num_nodes),
        add_negative_train_samples=False,
    )
    with isolated_random_state(seed):
        parts = cut(plain)
    train, val, test = ([part] for part in parts)
    return train, val, test
