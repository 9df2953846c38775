"""Registers, spills and instructions of compiled kernels, read from their machine code.

NVIDIA: `cuobjdump`, which the wheels of Triton bring along. AMD: the assembly text.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton


@dataclass(frozen=True)
class Code:
    """What a kernel costs; `instructions` is None where they are not counted (AMD)."""

    registers: int
    spilled: int
    instructions: float | None


def cuobjdump() -> str | None:
    """Path of the program, from Triton's wheel or else from PATH."""
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


def read_code(asm: Mapping[str, Any], elements: float) -> Code:
    """Read what Triton compiled.

    Args:
        asm: Triton's products by kind: "cubin" or "amdgcn" are read.
        elements: Elements that each thread computes in an iteration.

    Raises:
        FileNotFoundError: cuobjdump is not installed.
    """
    if "amdgcn" in asm:
        return read_amd(asm["amdgcn"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", str(path))
        listing = _cuobjdump("--dump-sass", str(path))
    registers, stack = (_number(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
    return Code(registers, stack, round(sum(loop_sizes(listing)) / elements, 2))


def _cuobjdump(*arguments: str) -> str:
    program = cuobjdump()
    if program is None:
        raise FileNotFoundError("cuobjdump is neither in Triton's wheel nor in PATH")
    # it calls the nvdisasm beside it
    path = os.pathsep.join([str(Path(program).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [program, *arguments],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in {text[-500:]}"
    return int(found[1])


def read_amd(assembly: str) -> Code:
    """Vector registers (with those of the matrix unit) and bytes of scratch."""
    registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
    return Code(registers, _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly), None)


def loop_sizes(listing: str) -> list[int]:
    """Instructions of every innermost loop of a SASS listing; of all of it without loops."""
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", listing)
    # padding does not run
    code = [(int(at, 16), text) for at, text in lines if not text.startswith("NOP")]
    loops = []
    for at, text in code:
        jump = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        # a jump to itself fills the end of a kernel
        if jump is not None and int(jump[1], 16) < at:
            loops.append((int(jump[1], 16), at))
    innermost = [
        (start, end)
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]
    if not innermost:
        return [len(code)]
    return [sum(start <= at <= end for at, _ in code) for start, end in innermost]
