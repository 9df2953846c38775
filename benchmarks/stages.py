"""Where a scan kernel's time goes: the kernel timed with one part left out at a time.

`python -m benchmarks.stages --shapes vim_s,ss2d_56` on a GPU. What a kernel without a part computes
is wrong on purpose; only its time is read, by the profiler, for that kernel alone. The parts
overlap in time, so their shares need not add up to one: a part that costs nothing when it is left
out was hidden behind another.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch.profiler import ProfilerActivity, profile

from scanweave.core.ops.selective import backward, backward_kernel, forward_kernel

from .ops import OPS
from .shapes import SHAPES, Shape
from .timing import Call

_REPEATS = 4


@dataclass(frozen=True)
class Part:
    """One part of a kernel, and how to leave it out of the source.

    Attributes:
        name: What the table calls it.
        cuts: Text of the source and what stands in its place; every place is changed, and one that
            is not found is an error.
    """

    name: str
    cuts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Kernel:
    """A kernel: the module with its source, where its launcher looks it up, and its parts."""

    module: ModuleType
    launcher: ModuleType
    name: str
    parts: tuple[Part, ...]


_EXPONENTIALS = ("tl.exp2(A * delta[", "(A * delta[")
_SOFTPLUS = ("= softplus(delta)", "= delta * delta")

KERNELS = {
    "forward": Kernel(
        forward_kernel,
        forward_kernel,
        "_forward_kernel",
        (
            Part("exponentials of the decays", (_EXPONENTIALS,)),
            Part("softplus", (_SOFTPLUS,)),
            Part("gate", (("y *= z * sigmoid(z)", "y *= z"),)),
            Part(
                "sum over the state",
                (("tl.sum(h * C_now[i].to(tl.float32)[:, None], 0)", "delta"),),
            ),
            Part(
                "input rows from memory (always the first row, which stays in the cache)",
                (
                    ("tl.minimum((w + 1) * WINDOW + i, count - 1)", "0"),
                    ("at_now[i] if PATH else t * ahead", "t * ahead"),
                    ("at = at_ahead[i]", "at = 0"),
                ),
            ),
            Part(
                "output rows to memory (always the first row)",
                (("at = at_now[i] if PATH else t * ahead", "at = 0"),),
            ),
        ),
    ),
    "backward": Kernel(
        backward_kernel,
        backward,
        "backward_kernel",
        (
            Part("exponentials of the decays", (_EXPONENTIALS,)),
            Part("softplus and its derivative", (_SOFTPLUS, ("ddt * sigmoid(raw)", "ddt * raw"))),
            Part("gate", (("gate = sigmoid(z)", "gate = z"),)),
            Part(
                "first recomputation of the states",
                (("for w in range(tl.cdiv(recomputed, DEEP)):", "for w in range(0):"),),
            ),
            Part(
                "dB and dC: sums over channels, and their rows",
                (
                    ("dC = tl.sum(states[WINDOW - j] * g[:, None], 0)", "pass"),
                    ("dB = tl.sum(s * (delta * x)[:, None], 0)", "pass"),
                    (
                        "tl.store(dC_ptr + part + (at * next_part + offs_n), dC, mask=mask_p)",
                        "pass",
                    ),
                    (
                        "tl.store(dB_ptr + part + (at * next_part + offs_n), dB, mask=mask_p)",
                        "pass",
                    ),
                ),
            ),
            Part(
                "dx and ddt: sums over the state",
                (
                    ("tl.sum(s * B[None, :], 1)", "g"),
                    ("tl.sum(q * A, 1) * LN_2", "delta"),
                ),
            ),
            Part("dA", (("dA += q * delta[:, None]", "pass"),)),
            Part(
                "input rows from memory (always the first row, which stays in the cache)",
                (
                    ("tl.maximum((w - 1) * WINDOW + i, 0)", "0"),
                    ("t = tl.minimum(w * DEEP + i, count - 1)", "t = 0"),
                    ("at = at_ahead[i]", "at = 0"),
                ),
            ),
        ),
    ),
}


def without(kernel: Kernel, part: Part, folder: Path) -> ModuleType:
    """The kernel's module with a part left out, imported from a copy of its source.

    Raises:
        ValueError: the source has no such place: the kernel has changed since.
    """
    source = Path(str(kernel.module.__file__)).read_text()
    for old, new in part.cuts:
        if old not in source:
            raise ValueError(f"{kernel.name} has no {old!r}, which {part.name!r} would change")
        source = source.replace(old, new)
    number = len(list(folder.iterdir()))
    path = folder / f"variant{number}.py"
    path.write_text(source)
    # in the package of the original, so that its relative imports hold
    name = f"{kernel.module.__package__}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _launching(kernel: Kernel, variant: ModuleType) -> Iterator[None]:
    usual = getattr(kernel.launcher, kernel.name)
    setattr(kernel.launcher, kernel.name, getattr(variant, kernel.name))
    try:
        yield
    finally:
        setattr(kernel.launcher, kernel.name, usual)


def _kernel_us(kernel: Kernel, call: Call) -> float:
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
        for _ in range(_REPEATS):
            call()
        torch.cuda.synchronize()
    times = [e.self_device_time_total for e in record.key_averages() if e.key == kernel.name]
    return sum(times) / _REPEATS


def measure(op: str, shape: Shape) -> Iterator[tuple[str, str, float]]:
    """Kernel, part that is left out ("" for none), microseconds of the kernel in one call."""
    entry = OPS[op]
    inputs = entry.make(shape, torch.bfloat16, torch.device("cuda"))
    wanted = [v for v in inputs.tensors.values() if v.requires_grad]
    dout = torch.randn_like(entry.run(inputs))

    def call() -> None:
        torch.autograd.grad(entry.run(inputs), wanted, dout, allow_unused=True)

    with tempfile.TemporaryDirectory() as folder:
        for which, kernel in KERNELS.items():
            yield which, "", _kernel_us(kernel, call)
            for part in kernel.parts:
                with _launching(kernel, without(kernel, part, Path(folder))):
                    yield which, part.name, _kernel_us(kernel, call)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of every shape."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages", description=__doc__)
    parser.add_argument("--op", default="selective_scan", choices=sorted(OPS))
    parser.add_argument("--shapes", default="vim_s", help="names, separated by commas")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    shapes = {s.name: s for s in SHAPES[chosen.op]["cuda"]}
    for name in chosen.shapes.split(","):
        if name not in shapes:
            parser.error(f"--shapes must be of {', '.join(shapes)}, got {name}")
        whole = {}
        sys.stdout.write(f"\n| {chosen.op} {name} | left out | us | saved |\n|---|---|---|---|\n")
        for kernel, part, us in measure(chosen.op, shapes[name]):
            whole.setdefault(kernel, us)
            saved = f"{100 * (1 - us / whole[kernel]):.0f} %" if part else ""
            sys.stdout.write(f"| {kernel} | {part or 'nothing'} | {us:.0f} | {saved} |\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
