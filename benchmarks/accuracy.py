"""Errors against float64 for each dtype and length: the output and every gradient."""

from collections.abc import Iterator

import torch

from .check import TOLERANCES, errors, exact, output_gradient
from .ops import OPS
from .peers import ours
from .report import AccuracyRow
from .shapes import Shape

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (197, 1024, 16384)
TOY_LENGTHS = (1, 5, 17)


def measure_accuracy(device: torch.device, toy: bool) -> Iterator[AccuracyRow]:
    """Both scans, one length after the other: one row per output and gradient."""
    dim = 8 if toy else 64
    for op in (OPS["selective_scan"], OPS["bidirectional_selective_scan"]):
        for length in TOY_LENGTHS if toy else LENGTHS:
            for dtype in DTYPES:
                inputs = op.make(Shape("accuracy", 2, length, dim), dtype, device)
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
    return [r for r in rows if not r.relative_l2 <= TOLERANCES[getattr(torch, r.dtype)]]
