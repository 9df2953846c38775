"""Batches that depend on nothing but the seed, the epoch and their number in it.

A loader of torch draws its order and its workers' seeds from global generators, so that a run
cannot go on in the middle of an epoch. Here every batch gets a seed of its own: its order is drawn
and its samples are fetched (augmented, collated) under that seed, in whichever process. Skipping
to a batch then needs no work but drawing the indices, and neither the number of workers nor what
the model draws changes a batch.
"""

import copy
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from .runtime import derive_seed, isolated_random_state, seed_host

# first element of derived seeds: independent streams for different purposes
_ORDER, _SAMPLES, _ITERATION = 1, 2, 3


class ResumableLoader:
    """A torch DataLoader whose epochs can be entered at any batch.

    The given loader is copied, not changed, and the copy keeps its class, collate function and
    workers. Its samplers must draw from the global generators of torch, NumPy and Python or from
    an attribute `generator`, which is seeded anew; or take `set_epoch(epoch)`. Samplers with
    other hidden state give another order after resuming. An IterableDataset has no order to
    skip in: its batches are read and dropped.

    With several processes, each takes every n-th batch; a last incomplete round is filled with
    the epoch's first batches so that all take the same number.
    """

    def __init__(
        self, loader: DataLoader[Any], seed: int, *, processes: int = 1, rank: int = 0
    ) -> None:
        """Copy a loader.

        Args:
            loader: Any torch DataLoader, for instance PyTorch Geometric's.
            seed: Decides the order of every epoch.
            processes: How many processes share the batches.
            rank: This process, 0 <= rank < processes.

        Raises:
            ValueError: `loader` is no DataLoader, is empty, splits its data among processes
                itself, or splits an IterableDataset.
        """
        if not isinstance(loader, DataLoader):
            raise ValueError(f"loader must be a torch DataLoader, got {type(loader).__name__}")
        samplers = [loader.batch_sampler, loader.sampler]
        samplers += [getattr(loader.batch_sampler, "sampler", None)]
        if any(isinstance(sampler, DistributedSampler) for sampler in samplers):
            raise ValueError("loader must not use a DistributedSampler: the trainer splits batches")
        self._owners = [loader, loader.dataset, *samplers]
        self._seed = seed
        self._counts: deque[int] = deque()
        self._schedule: _Schedule | None = None
        self._fixed_count = loader.batch_size or 1
        self._loader = copy.copy(loader)
        # DataLoader forbids setting these once it is built; a copy by constructor would lose what
        # subclasses add
        attributes = vars(self._loader)
        attributes["_iterator"] = None
        attributes["in_order"] = True
        attributes["worker_init_fn"] = _WorkerInit(loader.worker_init_fn)
        if isinstance(loader.dataset, IterableDataset):
            if processes > 1:
                raise ValueError(
                    f"loader must have a map-style dataset with {processes} processes, got "
                    f"{type(loader.dataset).__name__}"
                )
        else:
            name = "sampler" if loader.batch_sampler is None else "batch_sampler"
            sampler = getattr(loader, name)
            self._schedule = _Schedule(sampler, seed, processes, rank, self._counts)
            attributes[name] = self._schedule
            attributes["dataset"] = _SeededDataset(loader.dataset)
        self.length = self._length()
        """Batches per epoch and process; None where the loader cannot tell."""
        if self.length == 0:
            raise ValueError("loader must yield at least one batch per epoch, got 0")

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[Any, int]]:
        """The batches of one epoch, each with its number of samples.

        Args:
            epoch: Number of the epoch; decides the order.
            skip: Batches to leave out at the start.

        Raises:
            ValueError: the loader's class does not read its batch sampler when iterated.
        """
        self._counts.clear()
        with isolated_random_state(derive_seed(self._seed, _ITERATION, epoch)):
            self._start_epoch(epoch)
            if self._schedule is not None:
                self._schedule.epoch, self._schedule.skip = epoch, skip
            iterator = iter(self._loader)
        number = skip if self._schedule is not None else 0
        while True:
            with isolated_random_state(derive_seed(self._seed, _ITERATION, epoch, number)):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            number += 1
            if number <= skip:
                continue
            yield batch, self._count()

    def _count(self) -> int:
        if self._schedule is None:
            return self._fixed_count
        if not self._counts:
            raise ValueError(
                "loader must read its batch sampler anew in every epoch, "
                f"{type(self._loader).__name__} does not"
            )
        return self._counts.popleft()

    def _length(self) -> int | None:
        try:
            return len(self._loader)
        except (TypeError, NotImplementedError):
            return None

    def _start_epoch(self, epoch: int) -> None:
        seeded: set[int] = set()
        for owner in self._owners:
            if owner is None or id(owner) in seeded:
                continue
            seeded.add(id(owner))
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(derive_seed(self._seed, _ORDER, epoch))
            set_epoch = getattr(owner, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)


class _Schedule(Sampler[Any]):
    """What a sampler yields in one epoch for one process, each with the seed for fetching it."""

    def __init__(
        self,
        sampler: Any,
        seed: int,
        processes: int,
        rank: int,
        counts: deque[int],
    ) -> None:
        self.sampler, self.seed, self.counts = sampler, seed, counts
        self.processes, self.rank = processes, rank
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.processes)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, indices in enumerate(self._filled()):
            if number % self.processes == self.rank and number // self.processes >= self.skip:
                self.counts.append(len(indices) if isinstance(indices, Sized) else 1)
                yield derive_seed(self.seed, _SAMPLES, self.epoch, number), indices

    def _filled(self) -> Iterator[Any]:
        first: list[Any] = []
        number = 0
        for number, indices in enumerate(self._drawn(), 1):
            if number <= self.processes:
                first.append(indices)
            yield indices
        for missing in range(-number % self.processes):
            yield first[missing % len(first)]

    def _drawn(self) -> Iterator[Any]:
        number = 0
        iterator: Iterator[Any] | None = None
        while True:
            with isolated_random_state(derive_seed(self.seed, _ORDER, self.epoch, number)):
                iterator = iter(self.sampler) if iterator is None else iterator
                try:
                    indices = next(iterator)
                except StopIteration:
                    return
            number += 1
            yield indices


class _SeededDataset(Dataset[Any]):
    """A dataset that is asked for (seed, indices) and draws under that seed."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        # worker_init_fn may look for the dataset's own attributes; pickling must not
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, job: tuple[int, Any]) -> Any:
        seed, index = job
        seed_host(seed)
        return self.dataset[index]

    def __getitems__(self, job: tuple[int, list[Any]]) -> Any:
        seed, indices = job
        seed_host(seed)
        fetch = getattr(self.dataset, "__getitems__", None)
        return fetch(indices) if callable(fetch) else [self.dataset[index] for index in indices]


class _WorkerInit:
    """Leave Ctrl-C to the main process, which still wants the batches in flight."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)
