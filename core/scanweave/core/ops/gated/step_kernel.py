"""One token of the matrix-state scan in one launch, the state moved on in place.

A program holds the state of one head, or a block of its values. Letters: `reference.py`.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LOG2_E, adjacent, ceil_div, on_device, power_of_2
from .kernels import strides

# states of a program's tile
TILE = 2048


@triton.jit
def _gated_step_kernel(
    h_ptr,  # (B, H, K, V), updated
    q_ptr,  # (B, G, K)
    k_ptr,
    v_ptr,  # (B, H, V)
    g_ptr,  # (B, H) or (B, H, K)
    write_ptr,  # (B, H)
    skip_ptr,
    out_ptr,  # (B, H, V)
    heads,
    per_group,
    stride_hb,
    stride_hh,
    stride_hk,
    stride_hv,
    stride_qb,
    stride_qg,
    stride_kb,
    stride_kg,
    stride_vb,
    stride_vh,
    stride_gb,
    stride_gh,
    stride_gk,
    stride_wb,
    stride_wh,
    stride_sb,
    stride_sh,
    HAS_G: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid_b = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_k, mask_v = offs_k < KEYS, offs_v < WIDTH
    mask = mask_k[:, None] & mask_v[None, :]
    group = head // per_group
    state = h_ptr + pid_b * stride_hb + head.to(tl.int64) * stride_hh
    state += offs_k[:, None] * stride_hk + offs_v[None, :] * stride_hv
    h = tl.load(state, mask=mask, other=0.0).to(tl.float32)
    row_q = q_ptr + pid_b * stride_qb + group * stride_qg + offs_k
    row_k = k_ptr + pid_b * stride_kb + group * stride_kg + offs_k
    q = tl.load(row_q, mask=mask_k, other=0.0).to(tl.float32)
    k = tl.load(row_k, mask=mask_k, other=0.0).to(tl.float32)
    row_v = v_ptr + pid_b * stride_vb + head * stride_vh + offs_v
    v = tl.load(row_v, mask=mask_v, other=0.0).to(tl.float32)
    out = tl.zeros([BLOCK_V], tl.float32)
    if EXCLUSIVE:
        out = tl.sum(q[:, None] * h, 0)
    if HAS_G:
        of_keys = g_ptr + pid_b * stride_gb + head * stride_gh + offs_k * stride_gk
        g = tl.load(of_keys, mask=mask_k, other=0.0).to(tl.float32)
        h *= tl.exp2(g * LOG2_E)[:, None]
    written = v
    if HAS_W:
        written *= tl.load(write_ptr + pid_b * stride_wb + head * stride_wh).to(tl.float32)
    h += k[:, None] * written[None, :]
    if not EXCLUSIVE:
        out = tl.sum(q[:, None] * h, 0)
    if HAS_SKIP:
        out += tl.load(skip_ptr + pid_b * stride_sb + head * stride_sh).to(tl.float32) * v
    tl.store(state, h.to(h_ptr.dtype.element_ty), mask=mask)
    at = out_ptr + tl.program_id(0).to(tl.int64) * WIDTH + offs_v
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=mask_v)


def gated_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    write: Tensor | None,
    skip: Tensor | None,
    exclusive: bool,
) -> Tensor:
    """Outputs (B, H, V); arguments as the public step's."""
    (batch, heads, width), (groups, keys) = v.shape, q.shape[1:]
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    block_k = power_of_2(keys)
    block_v = max(1, min(power_of_2(width), TILE // block_k))
    # a decay of the head is one of every key
    of_g = strides(g, 3) if g is None or g.ndim == 3 else (*g.stride(), 0)
    if out.numel():
        with on_device(v):
            _gated_step_kernel[(batch * heads, ceil_div(width, block_v))](
                state,
                q,
                k,
                v,
                g,
                write,
                skip,
                out,
                heads,
                heads // groups,
                *state.stride(),
                *q.stride()[:2],
                *k.stride()[:2],
                *v.stride()[:2],
                *of_g,
                *strides(write, 2),
                *strides(skip, 2),
                HAS_G=g is not None,
                HAS_W=write is not None,
                HAS_SKIP=skip is not None,
                EXCLUSIVE=exclusive,
                KEYS=keys,
                WIDTH=width,
                BLOCK_K=block_k,
                BLOCK_V=block_v,
                num_warps=4 if block_k * block_v > 256 else 1,
                enable_fp_fusion=True,
            )
    return out
