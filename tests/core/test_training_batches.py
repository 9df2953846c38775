"""Batches depend on seed, epoch and number only, and an epoch can be entered anywhere."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from scanweave.core.training.batches import ResumableLoader


class Noisy(Dataset[Tensor]):
    """Item i is (i, noise of all generators), as an augmenting data set would be."""

    def __init__(self, length: int = 11) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        noise = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
        return torch.tensor([index, *noise], dtype=torch.float64)


class NumpyBatches(Sampler[list[int]]):
    """A batch sampler that draws batch after batch from NumPy, of changing sizes."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[list[int]]:
        for size in range(1, 6):
            yield np.random.randint(0, 11, size).tolist()  # noqa: NPY002


class Counter(IterableDataset[Tensor]):
    def __init__(self) -> None:
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(7):
            yield torch.tensor([self.epoch, index, random.random()], dtype=torch.float64)


def own_generator() -> DataLoader[Any]:
    return DataLoader(Noisy(), 3, shuffle=True, generator=torch.Generator())


def replacement() -> DataLoader[Any]:
    data = Noisy()
    return DataLoader(data, 3, sampler=RandomSampler(data, replacement=True, num_samples=14))


def weighted() -> DataLoader[Any]:
    return DataLoader(Noisy(), 3, sampler=WeightedRandomSampler(list(range(11)), 12))


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(), 3, shuffle=True),
    "in order": lambda: DataLoader(Noisy(), 3),
    "drop last": lambda: DataLoader(Noisy(), 3, shuffle=True, drop_last=True),
    "own generator": own_generator,
    "replacement": replacement,
    "weighted": weighted,
    "batch sampler": lambda: DataLoader(Noisy(), batch_sampler=NumpyBatches()),
    "single items": lambda: DataLoader(Noisy(), batch_size=None, shuffle=True),
    "iterable": lambda: DataLoader(Counter(), 2),
}


def read(loader: ResumableLoader, epoch: int, skip: int = 0) -> list[Any]:
    return [batch for batch, _ in loader.epoch(epoch, skip)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
def test_epoch_can_be_entered_anywhere(make: Any) -> None:
    whole = read(ResumableLoader(make(), 3), 2)
    assert len(whole) >= 3
    for skip in (0, 1, len(whole) - 1, len(whole)):
        fresh = ResumableLoader(make(), 3)
        torch.rand(5)  # what the model draws must not matter
        assert same(read(fresh, 2, skip), whole[skip:])


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
def test_epochs_and_seeds_differ_and_repeat(make: Any) -> None:
    loader = ResumableLoader(make(), 3)
    first = read(loader, 0)
    assert not same(read(loader, 1), first)
    assert same(read(loader, 0), first)
    assert not same(read(ResumableLoader(make(), 4), 0), first)


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
def test_global_generators_are_left_alone(make: Any) -> None:
    loader = ResumableLoader(make(), 3)
    torch.manual_seed(0)
    expected = [torch.rand(()).item() for _ in range(4)]
    torch.manual_seed(0)
    got = [torch.rand(()).item() for _, _ in zip(loader.epoch(0), range(4), strict=False)]
    assert got[:3] == expected[:3]


def test_shuffling_covers_the_data_and_counts_samples() -> None:
    loader = ResumableLoader(DataLoader(Noisy(), 3, shuffle=True), 0)
    batches = list(loader.epoch(0))
    assert sorted(i for batch, _ in batches for i in batch[:, 0].tolist()) == list(range(11))
    assert [count for _, count in batches] == [3, 3, 3, 2]
    assert loader.length == 4


def test_no_noise_is_drawn_twice() -> None:
    loader = ResumableLoader(DataLoader(Noisy(), 3, shuffle=True), 0)
    noise = torch.cat([batch[:, 1:] for epoch in (0, 1) for batch in read(loader, epoch)])
    assert all(len(column.unique()) == 22 for column in noise.T)
    # a stream draws between batches, a lazy batch sampler draws every batch's order
    stream = torch.cat(read(ResumableLoader(DataLoader(Counter(), 2), 0), 0))
    assert len(stream[:, 2].unique()) == 7
    drawn = read(ResumableLoader(DataLoader(Noisy(), batch_sampler=NumpyBatches()), 0), 0)
    assert not torch.equal(drawn[4][:4, 0], drawn[3][:, 0])


@pytest.mark.parametrize("name", ["shuffled", "own generator", "batch sampler"])
def test_workers_change_nothing(name: str) -> None:
    expected = read(ResumableLoader(LOADERS[name](), 3), 1)
    loader = LOADERS[name]()
    loader.num_workers, loader.prefetch_factor = 2, 2
    parallel = ResumableLoader(loader, 3)
    assert same(read(parallel, 1), expected)
    assert same(read(parallel, 1, 2), expected[2:])


def test_given_loader_is_not_changed() -> None:
    loader = DataLoader(Noisy(), 3, shuffle=True)
    before = dict(vars(loader))
    read(ResumableLoader(loader, 0), 0)
    assert vars(loader) == before


@pytest.mark.parametrize("length", [12, 11, 7, 3])
def test_processes_share_the_batches(length: int) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(Noisy(length), 2, shuffle=True)

    whole = read(ResumableLoader(make(), 1), 0)
    shares = [read(ResumableLoader(make(), 1, processes=3, rank=rank), 0) for rank in range(3)]
    rounds = -(-len(whole) // 3)
    assert [len(share) for share in shares] == [rounds] * 3
    mixed = [share[number] for number in range(rounds) for share in shares]
    assert same(mixed[: len(whole)], whole)
    # the last round is filled with the first samples, under noise of its own
    for number, batch in enumerate(mixed[len(whole) :]):
        assert torch.equal(batch[:, 0], whole[number % len(whole)][:, 0])
    late = ResumableLoader(make(), 1, processes=3, rank=1)
    assert same(read(late, 0, 1), shares[1][1:])


def test_geometric_loader_keeps_its_batches() -> None:
    geometric = pytest.importorskip("torch_geometric.loader")
    from torch_geometric.data import Data

    graphs = [Data(x=torch.full((i + 1, 1), float(i)), y=torch.tensor([i])) for i in range(7)]
    loader = ResumableLoader(geometric.DataLoader(graphs, 3, shuffle=True), 0)
    batches = list(loader.epoch(0))
    assert [batch.num_graphs for batch, _ in batches] == [3, 3, 1] == [n for _, n in batches]
    assert sorted(y for batch, _ in batches for y in batch.y.tolist()) == list(range(7))
    assert [b.y.tolist() for b in read(loader, 0, 1)] == [b.y.tolist() for b, _ in batches[1:]]


def test_fetching_many_at_once_and_init_of_workers() -> None:
    class Fast(Noisy):
        def __getitems__(self, indices: list[int]) -> list[Tensor]:
            return [torch.tensor([index * 10.0]) for index in indices]

    seen: list[int] = []
    loader = DataLoader(Fast(4), 2)
    loader.worker_init_fn = seen.append
    resumable = ResumableLoader(loader, 0)
    assert torch.cat(read(resumable, 0)).flatten().tolist() == [0, 10, 20, 30]
    # attributes that a worker_init_fn may look for
    inner: Any = resumable._loader.dataset
    assert (inner.length, len(inner)) == (4, 4)
    with pytest.raises(AttributeError):
        inner.absent  # noqa: B018


def test_iterable_without_length_and_with_epochs() -> None:
    loader = ResumableLoader(DataLoader(Counter(), 2), 0)
    assert loader.length is None
    batches = list(loader.epoch(4))
    assert {e for batch, _ in batches for e in batch[:, 0].tolist()} == {4}
    assert [count for _, count in batches][:3] == [2, 2, 2]


class Repeating(DataLoader[Any]):
    """Keeps an iterator of its own, as some loaders do to keep workers alive."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        super().__init__(dataset, 2)
        self.endless = iter([1, 2, 3])

    def __iter__(self) -> Any:
        return iter(self.endless)


def test_errors() -> None:
    data = TensorDataset(torch.zeros(4))
    with pytest.raises(ValueError, match="loader must be a torch DataLoader, got list"):
        ResumableLoader([1, 2], 0)  # type: ignore[arg-type]
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    for loader in (
        DataLoader(data, 2, sampler=sampler),
        DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False)),
    ):
        with pytest.raises(ValueError, match="loader must not use a DistributedSampler"):
            ResumableLoader(loader, 0)
    with pytest.raises(ValueError, match="must have a map-style dataset with 2 processes, got C"):
        ResumableLoader(DataLoader(Counter(), 2), 0, processes=2)
    with pytest.raises(ValueError, match="must yield at least one batch per epoch, got 0"):
        ResumableLoader(DataLoader(data, 8, drop_last=True), 0)
    with pytest.raises(ValueError, match=r"must read its batch sampler anew.*Repeating does not"):
        list(ResumableLoader(Repeating(data), 0).epoch(0))
