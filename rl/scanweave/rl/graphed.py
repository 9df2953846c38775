"""Acting on a GPU as one recorded graph: a step is dozens of small launches, a replay is one.

    graphed         memory -> the same, replayed where it can be
    GraphedMemory   a `RecurrentMemory` whose step is recorded once and replayed
    record_cuda     function -> function that replays what it launched

A replay reads and writes the tensors of the recording, so that inputs are copied into fixed places,
and what a step makes anew is copied back to where it was read. Rows that begin are marked in an
input, not chosen on the host, and every step launches the same.
"""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from .acting import Memory, RecurrentMemory, Step

Run = Callable[[], Tensor]
_WARM_UP = 3


def graphed(memory: Memory) -> Memory:
    """A fresh memory that replays its steps; a window stays as it is, since it grows at first."""
    return GraphedMemory(memory) if isinstance(memory, RecurrentMemory) else memory


def record_cuda(run: Run) -> Run:
    """Record what `run` launches on the current GPU; the result replays it.

    `run` is called a few times before, so that kernels are compiled and workspaces are there.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class GraphedMemory:
    """A recurrent memory whose every step replays one recording.

    The recording is made at the first step, where every row begins, so that what the memory holds
    after it does not count.

    Args:
        memory: Without a step taken.
        record: See `record_cuda`.

    Raises:
        RuntimeError: at the first step, if the model's cannot be recorded.
    """

    def __init__(self, memory: RecurrentMemory, record: Callable[[Run], Run] = record_cuda) -> None:
        self.memory, self.record = memory, record
        self.fixed: Step | None = None
        self.replay: Run | None = None

    def __call__(self, step: Step) -> Tensor:
        """Actions (N, A) after this step's tokens."""
        if self.fixed is None or self.replay is None:
            assert bool(step.first.all())
            self.fixed = Step(*(getattr(step, field.name).clone() for field in fields(Step)))
            # makes the ages' tensor, which the recording then writes to
            self.memory(self.fixed)
            try:
                self.replay = self.record(self._run)
            except RuntimeError as reason:
                raise RuntimeError(
                    "cuda_graph must be False for this agent, whose step cannot be recorded: "
                    f"{str(reason).splitlines()[0]}"
                ) from reason
        for field in fields(Step):
            getattr(self.fixed, field.name).copy_(getattr(step, field.name))
        # the next replay writes over it
        return self.replay().clone()

    def _run(self) -> Tensor:
        """One step on the fixed tensors, which hold what comes after it when it is done."""
        memory, step = self.memory, self.fixed
        assert memory.age is not None
        assert step is not None
        carried, age = memory.carried, memory.age
        predictions = memory(step)
        for before, after in zip(carried, memory.carried, strict=True):
            for name, place in before.items():
                if after[name] is not place:
                    place.copy_(after[name])
        age.copy_(memory.age)
        memory.carried, memory.age = carried, age
        return predictions
