"""Time, memory and state of every mixer at one vision, one graph and one RL shape.

    OMP_NUM_THREADS=1 python -m benchmarks.mixers --device cpu --threads 1
    python -m benchmarks.mixers --out benchmarks/results/mixers_h100.csv --limit 600

    vision   a batch of images, 197 tokens each, as ssm_vit's layers see them
    graph    many graphs of different sizes, packed into one row of tokens
    rl       windows of 20 steps, three tokens each; causal mixers only
    step     one token of many running episodes; recurrent mixers only

A mixer alone is timed, with its default options: the layers around it (a second mixer for causal
ones in graphs, alternating directions in images) are not. `attention` and
`attention_bidirectional` are the ones to compare with. Forward is without gradients;
forward+backward gives those of the input and of every parameter. On a GPU weights are float32 under
bfloat16 autocast, on a CPU all is float32. State bytes are those that one sequence carries after
the shape's tokens, 60 for `step` (attention keeps all keys and values, so that its state grows).

No time without a check: outputs of the first sequences are compared with those of a float64 copy of
the mixer. The CSV grows by the rows of one mixer and shape at a time, and what it already holds of
a device is not measured again. `tokens_per_s` is by the least of the times: the kernels' or a
graph's replay on a GPU, the processor's on a CPU, where those are known.
"""

import argparse
import copy
import csv
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scanweave.core import Mixer, create_mixer, list_mixers

from .report import Environment, environment, write_csv
from .timing import Call, graph_time, kernel_time, measure, peak_memory

# largest relative L2 error of an output: that of ops, and eight times as much for whole blocks
_TOLERANCE = {torch.float32: 8 * 2e-5, torch.bfloat16: 8 * 6e-3}
_CHECKED = 2


@dataclass(frozen=True)
class Shape:
    """What is timed.

    Attributes:
        batch: Sequences; graphs when packed.
        length: Tokens of one; the mean when packed.
        dim: Channels.
        packed: One row of tokens with borders.
        causal: Only mixers that do not read the future.
        step: One token of running sequences.
    """

    batch: int
    length: int
    dim: int
    packed: bool = False
    causal: bool = False
    step: bool = False


SHAPES: dict[str, dict[str, Shape]] = {
    "cuda": {
        "vision": Shape(128, 197, 384),
        "graph": Shape(128, 150, 96, packed=True),
        "rl": Shape(64, 60, 128, causal=True),
        "step": Shape(64, 1, 128, causal=True, step=True),
    },
    "cpu": {
        "vision": Shape(2, 197, 192),
        "graph": Shape(16, 60, 96, packed=True),
        "rl": Shape(16, 60, 128, causal=True),
        "step": Shape(64, 1, 128, causal=True, step=True),
    },
    "toy": {
        "vision": Shape(2, 9, 16),
        "graph": Shape(3, 5, 16, packed=True),
        "rl": Shape(2, 6, 16, causal=True),
        "step": Shape(2, 1, 16, causal=True, step=True),
    },
}


@dataclass(frozen=True)
class MixerRow:
    """One mixer, one shape, one pass; times are microseconds, None where not measured."""

    shape: str
    mixer: str
    passes: str
    batch: int
    length: int
    dim: int
    dtype: str
    parameters: int
    state_bytes: int | None
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    samples: int = 0
    cpu_us: float | None = None
    kernel_us: float | None = None
    graph_us: float | None = None
    tokens_per_s: float | None = None
    peak_mb: float | None = None
    error: float | None = None
    note: str = ""


def sizes(shape: Shape) -> list[int]:
    """Tokens of every graph: log-normal with the shape's mean, at least one."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(shape.batch, generator=generator).mul(0.5).exp()
    scaled = drawn * (shape.length / drawn.mean())
    return scaled.round().clamp(min=1).int().tolist()


def make_inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Tokens, and borders when packed.

    Drawn by the CPU, as weights are: a recording that failed leaves the GPU's generator unusable.
    """
    torch.manual_seed(0)
    if not shape.packed:
        dims = (shape.batch, shape.dim) if shape.step else (shape.batch, shape.length, shape.dim)
        return torch.randn(dims).to(device), None
    lengths = sizes(shape)
    borders = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    return torch.randn(1, sum(lengths), shape.dim).to(device), borders


def state_bytes(mixer: Mixer, length: int) -> int | None:
    """Bytes that a sequence carries after `length` tokens; None for a mixer without states."""
    if not mixer.causal:
        return None
    with torch.no_grad():
        x = torch.zeros(1, length, mixer.d_model, device=next(mixer.parameters()).device)
        _, state = mixer(x, return_state=True)
    return sum(v.numel() * v.element_size() for v in state.values())


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check(mixer: Mixer, shape: Shape, x: Tensor, borders: Tensor | None) -> float:
    """Relative L2 error of the first sequences' outputs.

    Raises:
        ValueError: it is larger than rounding explains.
    """
    exact = copy.deepcopy(mixer).double()
    with torch.no_grad():
        if shape.step:
            few = x[:_CHECKED]
            expected = exact.step(few.double(), exact.init_state(_CHECKED))[0]
            with _cast(x.device):
                actual = mixer.step(few, mixer.init_state(_CHECKED))[0]
        else:
            if borders is None:
                few, cut = x[:_CHECKED], None
            else:
                cut = borders[: _CHECKED + 1]
                few = x[:, : int(cut[-1])]
            expected = exact(few.double(), cu_seqlens=cut)
            with _cast(x.device):
                actual = mixer(few, cu_seqlens=cut)
    error = _relative(actual, expected)
    limit = _TOLERANCE[_dtype(x.device)]
    if not error <= limit:
        raise ValueError(f"error must be at most {limit:.2g}, got {error:.2g}")
    return error


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _cast(device: torch.device) -> AbstractContextManager[object]:
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def make_calls(mixer: Mixer, shape: Shape, x: Tensor, borders: Tensor | None) -> dict[str, Call]:
    """What is timed, by pass."""
    if shape.step:
        held = [mixer.init_state(shape.batch)]

        @torch.no_grad()
        def step() -> None:
            with _cast(x.device):
                _, held[0] = mixer.step(x, held[0])

        return {"step": step}
    leaf = x.clone().requires_grad_()
    given = [leaf, *mixer.parameters()]

    def run(v: Tensor) -> Tensor:
        with _cast(x.device):
            return mixer(v, cu_seqlens=borders)

    @torch.no_grad()
    def forward() -> None:
        run(x)

    g = x.cos().to(run(x[:, :1] if borders is None else x).dtype)

    def both() -> None:
        torch.autograd.grad(run(leaf), given, g)

    return {"forward": forward, "forward+backward": both}


def rows(
    name: str, mixer_name: str, shape: Shape, device: torch.device, toy: bool
) -> list[MixerRow]:
    """All passes of one mixer at one shape; one row with a note where it is refused or wrong."""
    x, borders = make_inputs(shape, device)
    torch.manual_seed(0)
    mixer = create_mixer(mixer_name, shape.dim).to(device)
    common = {
        "shape": name,
        "mixer": mixer_name,
        "batch": shape.batch,
        "length": shape.length,
        "dim": shape.dim,
        "dtype": str(_dtype(device)).removeprefix("torch."),
        "parameters": sum(p.numel() for p in mixer.parameters()),
    }
    try:
        error = check(mixer, shape, x, borders)
        carried = state_bytes(mixer, 60 if shape.step else shape.length)
        calls = make_calls(mixer, shape, x, borders)
        timings = measure(calls, device, toy)
    except (RuntimeError, ValueError) as reason:
        text = str(reason).splitlines()[0]
        return [MixerRow(**common, passes="", state_bytes=None, note=text)]
    tokens = x.numel() // shape.dim
    found = []
    for passes, timing in timings.items():
        kernel = _on_gpu(kernel_time, calls[passes], device, timing.median)
        replay = _on_gpu(graph_time, calls[passes], device) if shape.step else None
        busy = min(t for t in (timing.median, timing.cpu, kernel, replay) if t is not None)
        found.append(
            MixerRow(
                **common,
                passes=passes,
                state_bytes=carried,
                median_us=timing.median,
                p20_us=timing.p20,
                p80_us=timing.p80,
                samples=timing.samples,
                cpu_us=timing.cpu,
                kernel_us=kernel,
                graph_us=replay,
                tokens_per_s=1e6 * tokens / busy,
                peak_mb=peak_memory(calls[passes], device),
                error=error,
            )
        )
    return found


def _on_gpu(
    time_it: Callable[..., float], call: Call, device: torch.device, *rest: float
) -> float | None:
    """A figure of a GPU; None elsewhere, or where it cannot be had."""
    if device.type != "cuda":
        return None
    try:
        return time_it(call, device, *rest)
    except RuntimeError:
        return None


def wanted(mixers: Sequence[str], shapes: dict[str, Shape]) -> Iterator[tuple[str, str, Shape]]:
    """Shape, mixer pairs that make sense; shapes outermost."""
    causal, recurrent = list_mixers(causal=True), list_mixers(recurrent=True)
    for name, shape in shapes.items():
        for mixer in mixers:
            if (shape.causal and mixer not in causal) or (shape.step and mixer not in recurrent):
                continue
            yield name, mixer, shape


def measured(path: Path, where: Environment) -> set[tuple[str, str]]:
    """Shapes and mixers that the CSV already holds of this device."""
    if not path.is_file():
        return set()
    with path.open(newline="") as file:
        return {
            (line["shape"], line["mixer"])
            for line in csv.DictReader(file)
            if line["device"] == where.device
        }


def main(given: Sequence[str] | None = None) -> list[MixerRow]:
    """Measure what is missing, print as it goes, append to the CSV."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mixers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--mixers", default=",".join(list_mixers()), help="names with commas")
    add("--shapes", default="", help="names with commas; default: all")
    add("--out", type=Path, help="CSV that rows are added to (default: none is written)")
    add("--threads", type=int, default=0, help="of torch; 0 leaves what it has")
    add("--limit", type=float, default=float("inf"), help="seconds, then nothing is begun")
    add("--commit", help="of the code, where there is no git checkout")
    add("--toy", action="store_true", help="sizes that cost nothing, two samples")
    options = parser.parse_args(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    shapes = SHAPES["toy" if options.toy else device.type]
    if options.shapes:
        unknown = sorted(set(options.shapes.split(",")) - set(shapes))
        if unknown:
            raise ValueError(f"shapes must be among {', '.join(shapes)}, got {unknown}")
        shapes = {name: shapes[name] for name in options.shapes.split(",")}
    end = time.monotonic() + options.limit
    where = environment(device, options.commit)
    done = measured(options.out, where) if options.out else set()
    found = []
    for name, mixer, shape in wanted(options.mixers.split(","), shapes):
        if (name, mixer) in done or time.monotonic() > end:
            continue
        new = rows(name, mixer, shape, device, options.toy)
        if options.out:
            write_csv(options.out, environment(device, where.commit), new)
        for row in new:
            text = row.note or f"{row.median_us:10.1f} us, state {row.state_bytes} B"
            sys.stdout.write(f"{name:7} {mixer:24} {row.passes:17} {text}\n")
        sys.stdout.flush()
        found += new
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
