"""What the compiler makes of every Triton kernel of core, on a machine without a GPU.

    python -m benchmarks.compiled_code                # the guarded kernels against their budgets
    python -m benchmarks.compiled_code --all          # every op and shape, on every target
    python -m benchmarks.compiled_code --write        # measure again, and make that the budget

The ops run on tensors without data while launches are recorded instead of made, so what is
compiled is what a GPU would be asked to run: the same tiles, flags, strides and launch options.
Each recorded launch is then compiled for a target and its machine code read:

    registers       a thread; on AMD vector registers
    spilled         bytes of stack a thread, which is where registers spill to
    instructions    of the innermost loops, for each element and thread: what a warp issues for
                    one element of every lane. Elements of an iteration are the product of the
                    kernel's BLOCK* and WINDOW; a kernel without loops counts as a whole

Budgets are in `compiled_code.json`, by version of Triton, because layouts and spills differ
between releases. A change that is meant is written there by `--write`, once per version.
"""

import argparse
import importlib
import json
import math
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import scanweave.core.ops

from .machine_code import Code, read_code
from .ops import OPS
from .report import markdown
from .shapes import SHAPES, Shape

BUDGETS = Path(__file__).with_suffix(".json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# target, op, shape, pass: what CI compiles; a training step's kernels do all that others do
GUARDED = (
    ("sm_90", "selective_scan", "vim_s", "inference"),
    *((target, "selective_scan", "vim_s", "training") for target in TARGETS),
    ("sm_90", "selective_scan", "graph", "training"),
    ("sm_90", "bidirectional_selective_scan", "vim_s", "training"),
    ("sm_90", "path_selective_scan", "ss2d_56", "training"),
    ("sm_90", "causal_conv1d", "vim_s", "training"),
    *(("sm_90", "bidirectional_conv", shape, "training") for shape in ("vim_s", "graph")),
    ("sm_90", "selective_scan_step", "step_b64", "inference"),
    ("sm_90", "causal_conv1d_step", "step_b64", "inference"),
    ("sm_90", "gated_linear_scan_step", "step_b64", "inference"),
    ("sm_90", "ssd", "lm", "training"),
    ("sm_90", "bidirectional_ssd", "vim_s", "inference"),
    ("sm_90", "bidirectional_ssd", "vim_s", "training"),
    ("sm_90", "gated_linear_attention", "lm", "inference"),
    ("sm_90", "gated_linear_attention", "lm", "training"),
    ("sm_90", "rwkv6", "lm", "training"),
    ("sm_90", "linear_scan", "graph", "training"),
    ("sm_90", "linear_scan_constant", "graph", "training"),
    ("sm_90", "wkv", "lm", "training"),
    ("sm_90", "rms_norm_gated", "lm", "training"),
    ("sm_90", "layer_norm", "vmamba_56", "training"),
    ("sm_90", "layer_norm", "vmamba_7", "training"),
    ("sm_90", "rms_norm", "vim_s", "training"),
)
# mixers launch the same kernels, and long convolutions those of PyTorch
UNGUARDED = ("mixer", "fft_conv")
EVERYTHING = tuple(
    (target, op, shape.name, passes)
    for target in TARGETS
    for op in OPS
    if op not in UNGUARDED
    for shape in SHAPES[op]["cuda"]
    for passes in ("inference", "training")
    if OPS[op].backward or passes == "inference"
)
# what ops ask before they launch; tensors without data have no values to check
_ASKED = (
    *("on_kernels", "_on_kernels", "runs_kernels", "runs_now"),
    *("check_cu_seqlens_values", "check_paths_values"),
)
# another release than the budgets' may allocate registers and schedule a little differently
OTHER_RELEASE = 1.15
OTHER_RELEASE_SPILLS = 256
SAME_RELEASE = 1.02


@dataclass(frozen=True)
class Launch:
    """One launch as the op asked for it."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    grid: Any

    @property
    def name(self) -> str:
        """The kernel's, without the underscore of private names."""
        return self.kernel.__name__.strip("_")

    @property
    def named(self) -> dict[str, Any]:
        """Arguments and options by name."""
        names = self.kernel.arg_names
        return dict(zip(names, self.arguments, strict=False)) | self.options

    @property
    def elements(self) -> int:
        """Elements that one iteration computes."""
        named = self.named.items()
        return math.prod(int(v) for k, v in named if k.startswith("BLOCK") or k == "WINDOW")

    @property
    def form(self) -> tuple[Any, ...]:
        """What tells two launches of a kernel apart for the compiler, sizes included."""
        tensors = {k: v.dtype for k, v in self.named.items() if isinstance(v, torch.Tensor)}
        return self.kernel, self.named | tensors


class _OpsOfCpu(TorchDispatchMode):
    """Runs the code behind scanweave's ops on tensors of no device, instead of their fakes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace != "scanweave":
            return func(*args, **(kwargs or {}))
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        return func.redispatch(keys, *args, **(kwargs or {}))


class _Driver:
    """Says to Triton which GPU to compile for; one device per target, as kernels are cached."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_device = lambda: str(target)
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: target


def interpreted() -> bool:
    """Whether kernels are Python here (TRITON_INTERPRET=1), so that nothing can be compiled."""
    from scanweave.core.ops.selective.kernels import softplus

    return not isinstance(softplus, JITFunction)


def op_modules() -> list[ModuleType]:
    """Every module of `scanweave.core.ops`."""
    found = pkgutil.walk_packages(scanweave.core.ops.__path__, "scanweave.core.ops.")
    return [importlib.import_module(info.name) for info in found]


@contextmanager
def _as_on(backend: str) -> Iterator[None]:
    """Let launchers choose as they would on a GPU of this vendor."""
    with ExitStack() as stack:
        for vendor in ("cuda", "hip"):
            value = "0" if vendor == backend else None
            stack.enter_context(mock.patch.object(torch.version, vendor, value))
        for module in op_modules():
            for function in vars(module).keys() & set(_ASKED):
                stack.enter_context(mock.patch.object(module, function, return_value=True))
        yield


@contextmanager
def recorded(backend: str = "cuda") -> Iterator[list[Launch]]:
    """Note launches of kernels instead of making them; results of ops hold nothing."""
    launches: list[Launch] = []

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, arguments, options, grid))

    with _as_on(backend), mock.patch.object(JITFunction, "run", note), _OpsOfCpu():
        yield launches


def record(op: str, shape: Shape, backend: str = "cuda") -> dict[str, list[Launch]]:
    """Launches of an op at a shape in bfloat16: those of "inference", and of "training"."""
    entry = OPS[op]
    # launchers may read where packed sequences end, and that row is small
    device = torch.device("cpu" if shape.is_packed else "meta")
    inputs = entry.make(shape, torch.bfloat16, device)
    with recorded(backend) as inference, torch.no_grad():
        entry.run(inputs)
    if not entry.backward:
        return {"inference": inference}
    with recorded(backend) as training:
        out = entry.run(inputs)
        torch.autograd.grad(out, list(inputs.tensors.values()), torch.empty_like(out))
    return {"inference": inference, "training": training}


def _compile(launch: Launch, target: GPUTarget) -> Any:
    before = driver._active
    driver.set_active(_Driver(target))  # type: ignore[arg-type]
    try:
        return launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)
    finally:
        driver._active = before


class _Accepted(Exception):
    """The compiler has read a kernel's source."""


def check_types(launch: Launch) -> None:
    """Let Triton read a kernel's source for the launch's types, and stop before machine code.

    Its interpreter knows no types: a variable that a loop makes float32 where it was bfloat16
    runs there.

    Raises:
        triton.compiler.CompilationError: the source is no program for these types.
    """
    after = "triton.backends.nvidia.compiler.CUDABackend.make_ttir"
    with mock.patch(after, side_effect=_Accepted), suppress(_Accepted):
        _compile(launch, TARGETS["sm_90"])


def shared_memory(launch: Launch, target: GPUTarget) -> int:
    """Bytes of shared memory that a program of a launch takes."""
    return _compile(launch, target).metadata.shared


def compile_for(launch: Launch, target: GPUTarget) -> Code:
    """Machine code of a launch.

    Raises:
        FileNotFoundError: the tools that read it are not installed.
    """
    compiled = _compile(launch, target)
    lanes = target.warp_size * compiled.metadata.num_warps
    return read_code(compiled.asm, launch.elements / lanes)


def measure(target: str, op: str, shape: str, passes: str) -> dict[str, Code]:
    """Compile what a pass of an op launches at a shape; by "target/op/shape/pass/kernel".

    A kernel that is launched again with other flags has its number behind its name; one that is
    launched again in the same form is there once.
    """
    (size,) = (s for s in SHAPES[op]["cuda"] if s.name == shape)
    rows: dict[str, Code] = {}
    seen: dict[str, int] = {}
    forms = []
    for launch in record(op, size, TARGETS[target].backend)[passes]:
        if launch.form in forms:
            continue
        forms.append(launch.form)
        count = seen[launch.name] = seen.get(launch.name, 0) + 1
        suffix = f"_{count}" if count > 1 else ""
        key = f"{target}/{op}/{shape}/{passes}/{launch.name}{suffix}"
        rows[key] = compile_for(launch, TARGETS[target])
    return rows


def read_budgets() -> dict[str, dict[str, Code]]:
    """Budgets by version of Triton and row."""
    table = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    return {
        version: {key: Code(**row) for key, row in rows.items()} for version, rows in table.items()
    }


def over_budget(key: str, code: Code, budgets: Mapping[str, Mapping[str, Code]]) -> str:
    """What is over its budget, in words; empty if nothing is.

    A version of Triton without budgets of its own is held to the worst of the others, with room.
    """
    same = triton.__version__ in budgets
    tables = [budgets[triton.__version__]] if same else list(budgets.values())
    known = [table[key] for table in tables if key in table]
    if not known:
        return f"{key} has no budget: python -m benchmarks.compiled_code --write"
    factor = SAME_RELEASE if same else OTHER_RELEASE
    limits = {
        "registers": max(b.registers for b in known) * (1.0 if same else factor),
        "spilled": max(b.spilled for b in known) + (0 if same else OTHER_RELEASE_SPILLS),
        "instructions": max((b.instructions or math.inf) for b in known) * factor,
    }
    found = asdict(code)
    over = [
        f"{name} {found[name]:g} of {limit:g}"
        for name, limit in limits.items()
        if (found[name] or 0) > limit
    ]
    return f"{key}: {', '.join(over)}" if over else ""


def write_budgets(rows: Mapping[str, Code]) -> None:
    """Make these rows this Triton's budgets, in place of those of the same op, shape and pass."""
    budgets = read_budgets()
    measured = {key.rpartition("/")[0] for key in rows}
    kept = {
        key: code
        for key, code in budgets.get(triton.__version__, {}).items()
        if key.rpartition("/")[0] not in measured
    }
    budgets[triton.__version__] = dict(sorted({**kept, **rows}.items()))
    # one row a line, so that a change reads well
    lines = [
        f'"{version}": {{\n'
        + ",\n".join(f'  "{key}": {json.dumps(asdict(code))}' for key, code in table.items())
        + "\n}"
        for version, table in sorted(budgets.items())
    ]
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _show(rows: Mapping[str, Code], budgets: Mapping[str, Code]) -> str:
    header = ["target", "op", "shape", "pass", "kernel", "registers", "spilled", "instructions"]
    lines = []
    for key, code in rows.items():
        budget = budgets.get(key)
        values = []
        for name, value in asdict(code).items():
            was = None if budget is None else getattr(budget, name)
            shown = "-" if value is None else f"{value:g}"
            values.append(shown if was is None or was == value else f"{shown} (was {was:g})")
        lines.append([*key.split("/"), *values])
    return markdown(header, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 1 if a kernel is over its budget or has none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled_code")
    parser.add_argument("--all", action="store_true", help="every op and shape on every target")
    parser.add_argument("--targets", help=f"only these, with commas between: {','.join(TARGETS)}")
    parser.add_argument("--shapes", help="only these, by name, with commas between")
    parser.add_argument("--write", action="store_true", help="make what is measured the budget")
    args = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET must be unset: interpreted kernels are not compiled")
    chosen = EVERYTHING if args.all else GUARDED
    for index, given in ((0, args.targets), (2, args.shapes)):
        if given is not None:
            wanted = set(given.split(","))
            unknown = wanted - {case[index] for case in chosen}
            if unknown:
                parser.error(f"must be among {sorted({c[index] for c in chosen})}, got {unknown}")
            chosen = tuple(case for case in chosen if case[index] in wanted)
    rows: dict[str, Code] = {}
    for case in chosen:
        sys.stderr.write(" ".join(case) + "\n")
        rows |= measure(*case)
    budgets = read_budgets()
    sys.stdout.write(f"triton {triton.__version__}\n\n")
    sys.stdout.write(_show(rows, budgets.get(triton.__version__, {})) + "\n")
    if args.write:
        write_budgets(rows)
        return 0
    # only the guarded ones have to have a budget
    known = {key for table in budgets.values() for key in table}
    failed = [
        over_budget(k, code, budgets) for k, code in rows.items() if not args.all or k in known
    ]
    for line in filter(None, failed):
        sys.stderr.write(line + "\n")
    return 1 if any(failed) else 0


if __name__ == "__main__":
    sys.exit(main())
