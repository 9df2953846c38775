"""What the Triton kernels of the matrix-state scan share: chunks, sums of decays, precision.

Tokens are cut into chunks at natural positions of every sequence, whatever the direction, so that
both directions share tiles: a reverse scan walks the chunks from the last to the first, and its
masks and sums are mirrored. Nothing is flipped, padded or permuted in memory.

    sums   log2 decays of a chunk added up to each token, in scan order, `sums_kernel.py`
    walk   the state that enters every chunk (or the gradient that leaves it), `walk_kernel.py`
    mix    outputs of a chunk from its own tokens and that state, `mix_kernel.py`
    pair   gradients of q, k, decays and factors, `pair_kernel.py`
    short  outputs and gradients of a few chunks without states, `short_*.py`

The gradient of v is a scan as well, from the other end, with q and k in each other's place: the
flag BACK of `walk` and `mix`. No atomics: what several programs add to is partial results.

Letters: S sequences, M chunks of Q tokens, H heads, G groups, K keys, V values.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ceil_div, power_of_2

# steps of a chunk: with operands of 16 bits, and of 32, of which half as many fit in registers
CHUNK, WIDE_CHUNK = 64, 32
# keys or values of a block, at least: Triton 3.6 and later compile products of 32 16-bit columns
# for Hopper so that they read outside of shared memory (its issues 10573 and 11366)
LEAST_BLOCK, LEAST_HALF_BLOCK = 16, 64


@triton.jit
def chunk_of(slot, cu_ptr, table_ptr, chunks, length, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """Sequence of a chunk, its batch row, first token, number of tokens, and place in it."""
    if PACKED:
        seq = tl.load(table_ptr + slot).to(tl.int64)
        first = tl.load(cu_ptr + seq).to(tl.int64)
        size = (tl.load(cu_ptr + seq + 1).to(tl.int64) - first).to(tl.int32)
        return seq, seq * 0, first, size, (slot - first // CHUNK - seq).to(tl.int32)
    else:
        seq = slot // chunks
        return seq, seq, seq * 0, length, (slot % chunks).to(tl.int32)


@triton.jit
def token_rows(place, size, SHIFT: tl.constexpr, REVERSE: tl.constexpr):
    """Tokens that rows of a tile show and whether they exist; shifted, those scanned before."""
    if SHIFT:
        if REVERSE:
            return place + 1, place + 1 < size
        else:
            return place - 1, (place >= 1) & (place < size)
    else:
        return place, place < size


@triton.jit
def load_sums(s_ptr, offs, CHUNK: tl.constexpr, REVERSE: tl.constexpr, EXCLUSIVE: tl.constexpr):
    """Sums of a chunk's decays at its tokens, or at those scanned before."""
    if EXCLUSIVE:
        if REVERSE:
            return tl.load(s_ptr + offs + 1, mask=offs + 1 < CHUNK, other=0.0)
        else:
            return tl.load(s_ptr + offs - 1, mask=offs >= 1, other=0.0)
    else:
        return tl.load(s_ptr + offs)


@triton.jit
def load_total(s_ptr, CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """The sum over a whole chunk."""
    if REVERSE:
        return tl.load(s_ptr)
    else:
        return tl.load(s_ptr + CHUNK - 1)


@triton.jit
def dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """A matrix product with operands of one dtype, summed in float32."""
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


class Frame(NamedTuple):
    """Chunks of all sequences, and what every kernel takes of them."""

    chunk: int  # Q
    sequences: int
    chunks: int  # of a dense row
    slots: int  # chunks in all; packed, an upper bound
    length: int
    cu_seqlens: Tensor | None
    table: Tensor | None  # (M,) sequence of every chunk
    single: bool  # no sequence has more than one chunk

    def arguments(self) -> tuple[Tensor | None, Tensor | None, int, int]:
        """cu_ptr, table_ptr, chunks, length."""
        return self.cu_seqlens, self.table, self.chunks, self.length


def frame_of(v: Tensor, cu_seqlens: Tensor | None, chunk: int) -> Frame:
    """Chunks of a dense batch (B, L), or of packed sequences; no size depends on values."""
    batch, length = v.shape[:2]
    if cu_seqlens is None:
        chunks = ceil_div(length, chunk)
        return Frame(chunk, batch, chunks, batch * chunks, length, None, None, chunks <= 1)
    # sequence s owns the chunks from cu[s] // Q + s on, at least as many as it needs
    count = cu_seqlens.shape[0] - 1
    slots = length // chunk + count
    starts = torch.div(cu_seqlens, chunk, rounding_mode="floor")
    many = starts.diff() + 1
    table = torch.repeat_interleave(many, output_size=slots)
    return Frame(chunk, count, 0, slots, length, cu_seqlens, table.int(), False)


class Direction(NamedTuple):
    """One direction's tensors: inputs, sums (M, H, Q) of decays and factors as laid out."""

    q: Tensor
    k: Tensor
    sums: Tensor | None
    factors: Tensor | None
    reverse: bool


def strides(v: Tensor | None, count: int) -> tuple[int, ...]:
    """The first strides of a tensor, zeros where there is none."""
    return (0,) * count if v is None else v.stride()[:count]


class Precision(NamedTuple):
    """Operands of matrix products, how float32 ones multiply, dtype of states, steps of a chunk."""

    operand: Any
    name: str
    state: torch.dtype
    chunk: int


def precision_of(q: list[Tensor], k: list[Tensor], v: Tensor) -> Precision:
    """bfloat16 products for bfloat16 inputs, close to float32 ones for float32 inputs.

    Products of float16 run in TF32, as many digits and the range of float32: states of a long
    memory pass 65504.
    """
    dtypes = {u.dtype for u in (*q, *k, v)}
    if os.environ.get("TRITON_INTERPRET") == "1":
        # the interpreter multiplies bfloat16 operands as if they were integers
        return Precision(tl.float32, "ieee", torch.float32, WIDE_CHUNK)
    if dtypes == {torch.bfloat16}:
        return Precision(tl.bfloat16, "tf32", torch.bfloat16, CHUNK)
    if torch.version.hip is not None:
        return Precision(tl.float32, "ieee", torch.float32, WIDE_CHUNK)
    exact = torch.float32 in dtypes
    return Precision(tl.float32, "tf32x3" if exact else "tf32", torch.float32, WIDE_CHUNK)


class Plan(NamedTuple):
    """Tiles: keys and values of a block, and how many blocks."""

    block_k: int
    block_v: int
    key_blocks: int
    value_blocks: int


def plan_of(q: Tensor, v: Tensor, precision: Precision, most_k: int, most_v: int) -> Plan:
    """Blocks of powers of 2; half as many float32 keys fit."""
    half = precision.operand == tl.bfloat16
    if not half:
        most_k, most_v = min(most_k, 64), min(most_v, 64)
    least = LEAST_HALF_BLOCK if half else LEAST_BLOCK
    keys, width = q.shape[3], v.shape[3]
    block_k = max(least, min(most_k, power_of_2(keys)))
    block_v = max(least, min(most_v, power_of_2(width)))
    return Plan(block_k, block_v, ceil_div(keys, block_k), ceil_div(width, block_v))
