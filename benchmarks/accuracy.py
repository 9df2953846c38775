"""Errors against float64 for each dtype and length: the output and every gradient."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from .check import TOLERANCES, errors, exact, output_gradient
from .ops import OPS
from .peers import ours
from .report import AccuracyRow
from .shapes import Shape

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (197, 1024, 16384)
TOY_LENGTHS = (1, 5, 17)
_SCAN = Shape("accuracy", 2, 0, 64)
_HEADS = Shape("accuracy", 2, 0, 128, state=64, gate=False, head=32)
SHAPES = {
    "selective_scan": _SCAN,
    "bidirectional_selective_scan": _SCAN,
    "ssd": _HEADS,
    "bidirectional_ssd": _HEADS,
    "linear_scan": _SCAN,
    "linear_scan_constant": _SCAN,
    "wkv": _SCAN,
}
# a constant decay is rounded once, the same way at every step, and so its error adds up over its
# memory: float32 rows of up to 5e-5 on a CPU
CONSTANT_DECAYS = ("linear_scan_constant", "wkv")
CONSTANT_FACTOR = 5.0


def measure_accuracy(device: torch.device, toy: bool) -> Iterator[AccuracyRow]:
    """Every scan, one length after the other: one row per output and gradient."""
    for name, size in SHAPES.items():
        op = OPS[name]
        for length in TOY_LENGTHS if toy else LENGTHS:
            shape = replace(size.toy() if toy else size, length=length)
            for dtype in DTYPES:
                inputs = op.make(shape, dtype, device)
                dout = output_gradient(op, inputs)
                reference = exact(op, inputs, dout)
                found = errors(reference, ours(op, inputs), dout)
                for tensor, (relative, largest) in found.items():
                    yield AccuracyRow(
                        op.name,
                        str(dtype).removeprefix("torch."),
                        *(length, tensor, relative, largest, reference.by),
                    )


def beyond(rows: list[AccuracyRow]) -> list[AccuracyRow]:
    """Rows whose error is over the tolerance of `check.py`, or NaN."""

    def limit(row: AccuracyRow) -> float:
        factor = CONSTANT_FACTOR if row.op in CONSTANT_DECAYS else 1.0
        return factor * TOLERANCES[getattr(torch, row.dtype)]

    return [row for row in rows if not row.relative_l2 <= limit(row)]
