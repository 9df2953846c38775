"""The least time a pass can take on a device, from its bytes and its exponentials.

    floor = max(bytes / copy rate, exponentials / exponential rate)

Bytes: every input and output tensor moved once (`ops.py` counts them). Copy rate: measured in the
run, by copying a buffer that no cache holds, the best time, bytes read and written counted.

Exponentials: a decay for every state, two special-function results for a softplus, two for a gate;
once in the forward and twice in the backward, which recomputes states. On a GPU their rate is
    multiprocessors x results per multiprocessor and clock x the reported clock,
132 x 16 x 1.98 GHz = 4.2e12 a second on an H100 SXM. The reported clock is the highest one; under
load a card runs below it (about 1.75 GHz there), so a fraction of the floor errs on the low side.
On a CPU exponentials are ordinary arithmetic, whose rate is not known here, so only bytes count;
what fits the caches may then take less than its floor.

Forward and backward have a floor each; forward+backward is their sum.
"""

from dataclasses import dataclass

import torch

from .timing import measure

# special-function results a multiprocessor gives per clock; 16 on every NVIDIA GPU since 2017 but
# Blackwell Ultra, which doubled it. Other vendors' are not known here: only bytes count there
_RESULTS_PER_CLOCK = {(10, 3): 32}
_NVIDIA = 16


@dataclass(frozen=True)
class Work:
    """What a pass cannot avoid."""

    bytes: int
    exponentials: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.exponentials + other.exponentials)


@dataclass(frozen=True)
class Ceilings:
    """Rates of a device, per second; `exponentials` is 0 where not known."""

    bytes: float
    exponentials: float

    def floor_us(self, *passes: Work) -> float:
        """Least time of these passes one after the other, in microseconds."""
        total = 0.0
        for work in passes:
            compute = work.exponentials / self.exponentials if self.exponentials else 0.0
            total += max(work.bytes / self.bytes, compute)
        return 1e6 * total


def ceilings(device: torch.device, toy: bool) -> Ceilings:
    """Measure the copy rate and find the rate of exponentials."""
    # 1 GB on a GPU and 256 MB on a CPU: several times the caches
    elements = (1 << 28) if device.type == "cuda" else (1 << 26)
    source = torch.ones(elements // (256 if toy else 1), device=device)
    target = torch.empty_like(source)
    time = measure({"copy": lambda: target.copy_(source)}, device, toy)["copy"]
    copied = 2 * source.numel() * source.element_size() / (1e-6 * time.best)
    return Ceilings(copied, _gpu_exponentials(device) if device.type == "cuda" else 0.0)


def _gpu_exponentials(device: torch.device) -> float:
    if torch.version.hip is not None:
        return 0.0
    # Triton needs no library beside the driver for this, and every version has it
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    found = driver.active.utils.get_device_properties(index)  # type: ignore[attr-defined]
    per_clock = _RESULTS_PER_CLOCK.get(torch.cuda.get_device_capability(index), _NVIDIA)
    return found["multiprocessor_count"] * per_clock * 1e3 * found["sm_clock_rate"]
