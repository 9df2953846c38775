"""Launches the Triton gradients of the selective scan, and adds what programs found in part.

Letters: S sequences, D channels, G groups, N state.
"""

# Triton's launch options
# pyright: reportCallIssue=false

from collections.abc import Sequence

import torch
from torch import Tensor

from ..launch import LOG2_E, adjacent, batch_stride, on_device
from .backward_kernel import backward_kernel
from .kernels import Direction, backward_plan, chunk_of, prepare, strides_and_flags
from .partials import add_partials
from .portable import ScanGradients
from .spans import entering, split

# steps whose states are recomputed together: their rows are all loaded before the first is used.
# Forward and backward at B128 L197 D768 N16 on an H100: 1059 us, 1104 us with 8
DEEP = 4


def backward(
    dout: Tensor,
    dfinal: Tensor | None,
    directions: Sequence[Direction],
    initial_state: bool,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: Sequence[bool],
    softplus: bool,
    y: Tensor,
    kept: Tensor,
    paths: Tensor | None = None,
) -> tuple[list[ScanGradients], Tensor | None]:
    """Gradients of every direction, and of the gate; with `paths` as in the forward.

    With `paths` the gradient of x is (B, L, K D) too, and not yet added up.
    """
    x, dt, A = directions[0][:3]
    batch, length, dim = dt.shape
    state = A.shape[1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dout = adjacent(dout)
    dz = None
    if z is not None:
        dz = torch.empty_like(z, memory_format=torch.contiguous_format)
        z = adjacent(z)
    grads = []
    for k, given in enumerate(directions):
        inputs = prepare(given)
        xk, dt, A, B, C, D, bias = inputs
        groups = B.shape[2]
        chunk, each = chunk_of(state)
        plan = backward_plan(dt, groups, state)
        programs = groups * plan.blocks
        strides, flags = strides_and_flags(inputs, z, cu_seqlens, paths, reverse[k], softplus)
        spans = split(dt, groups, state, sequences, cu_seqlens is not None)
        slots = sequences if spans is None else spans.slots
        dh = None if dfinal is None else dfinal[k].contiguous()
        if spans is not None:
            rates = A.t().float().contiguous() * LOG2_E.value
            dh = entering(
                inputs, dout, rates, dh, z, cu_seqlens, paths, reverse[k], softplus, spans, True
            )
        dx, ddt = (torch.empty(dt.shape, dtype=v.dtype, device=v.device) for v in (xk, dt))
        dA = x.new_empty(slots, dim, state, dtype=torch.float32)
        dh0 = x.new_empty(sequences, dim, state, dtype=torch.float32)
        dD, dbias = (
            None if v is None else x.new_empty(slots, dim, dtype=torch.float32) for v in (D, bias)
        )
        dB, dC = (
            x.new_empty(batch, length, groups, plan.blocks, state, dtype=torch.float32)
            for _ in range(2)
        )
        parked = slots * programs * (chunk // plan.window) if each == 1 else 0
        scratch = x.new_empty(parked, plan.block_d, plan.block_n, dtype=torch.float32)
        if dim > 0 and sequences > 0:
            with on_device(x):
                backward_kernel[(slots * programs,)](
                    xk,
                    dt,
                    A,
                    B,
                    C,
                    D,
                    bias,
                    z,
                    None if cu_seqlens is None else adjacent(cu_seqlens),
                    paths,
                    y,
                    dout,
                    dh,
                    kept[k],
                    scratch,
                    dx,
                    ddt,
                    dA,
                    dB,
                    dC,
                    dD,
                    dbias,
                    dz,
                    dh0,
                    length,
                    length,
                    dim,
                    dim // groups,
                    plan.blocks,
                    groups if paths is None else groups // paths.shape[0],
                    programs,
                    sequences,
                    0 if spans is None else spans.steps,
                    chunk,
                    **strides,
                    stride_ob=batch_stride(dout),
                    stride_ol=dout.stride(1),
                    **flags,
                    HAS_H0=initial_state,
                    HAS_DH=dfinal is not None,
                    WRITE_DZ=z is not None and k == 0,
                    EACH=each,
                    SPLIT=spans is not None,
                    EVEN_D=(dim // groups) % plan.block_d == 0,
                    BLOCK_N=plan.block_n,
                    BLOCK_D=plan.block_d,
                    WINDOW=plan.window,
                    DEEP=DEEP,
                    num_warps=1,
                    num_stages=1,
                    enable_fp_fusion=True,
                )
        dtypes = given[2].dtype, given[3].dtype, given[4].dtype
        sums = add_partials(dA, dB, dC, dD, dbias, dtypes)
        # not beside those of the next direction: as much as two activations where N is 16
        del dA, dB, dC, dD, dbias, scratch
        grads.append(ScanGradients(dx, ddt, *sums, dh0))
    return grads, dz
