"""The registered ops in PyTorch's own operators, for runtimes that know no others.

ONNX, AOTInductor's packages without Python, and every other consumer of `torch.export` take an
exported program in which these replace `torch.ops.scanweave.*`:

    program = torch.export.export(model, (image,))
    program = program.run_decompositions(decompositions())
    torch.onnx.export(program, f="model.onnx", dynamo=True)

A recurrence h[t] = a[t] h[t-1] + b[t] becomes log2(L) passes over all tokens (`doubling.py`).
No exponent is above 0 and nothing is divided, so it is as exact as the loop. It costs log2(L)
times the memory traffic of the states of all tokens; the matrix-state scan with one decay a head
does so once a chunk only (`gated/decomposed.py`). The length of the sequence must be fixed, the
batch need not be. The composites have gradients: a decomposed program trains.

Letters: B batch, L length, D channels, N state, G groups, H heads, K key width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import computing_dtype
from .dense.op import double
from .doubling import moved, recurrence
from .gated.bonus import with_bonus
from .gated.decomposed import matrix_chunks, matrix_states
from .linear.reference import state_dtype
from .mamba.op import in_parts
from .norm.reference import rms_norm_gated_ref
from .rotate.reference import rotate_pairs_ref
from .wkv.reference import power, ratio


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """Make a table for `torch.export.ExportedProgram.run_decompositions`.

    Merge it with `torch.export.default_decompositions()` to lower PyTorch's operators as well.
    Single steps (`*_step`), which change a state in place, and the backward ops are not in it.

    Returns:
        A new dict: registered op -> function of the same arguments.

    Raises:
        ValueError: (from the functions) the length is symbolic, or `cu_seqlens` is given.
    """
    ops = torch.ops.scanweave
    return {
        ops.short_conv.default: _short_conv,
        ops.mamba_block.default: in_parts,
        ops.selective_scan.default: _selective_scan,
        ops.path_selective_scan.default: _path_selective_scan,
        ops.gated_linear_scan.default: _gated_linear_scan,
        ops.linear_scan.default: _linear_scan,
        ops.wkv.default: _wkv,
        ops.dense_scan.default: _dense_scan,
        ops.chunk_layout.default: _chunk_layout,
        ops.rms_norm_gated.default: _rms_norm_gated,
        ops.rotate_pairs.default: _rotate_pairs,
    }


def _check_length(length: int | torch.SymInt) -> None:
    if not isinstance(length, int):
        raise ValueError(f"the length must be static in a decomposed program, got {length}")


def _check_packed(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise ValueError(
            f"cu_seqlens must be None in a decomposed program, got {tuple(cu_seqlens.shape)}"
        )


def _check(x: Tensor, cu_seqlens: Tensor | None) -> None:
    _check_packed(cu_seqlens)
    _check_length(x.shape[1])


def _short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    reverse: bool,
    silu: bool,
) -> Tensor:
    _check(x, cu_seqlens)
    dtype = computing_dtype(x, weight, bias, state)
    v, taps = x.to(dtype), weight.to(dtype)
    right = weight.shape[1] - 1 - left
    if reverse:
        # mirrored taps instead of mirrored tokens
        taps = taps.flip(1)
        left, right = right, left
    if state is None:
        v = F.pad(v, [0, 0, left, right])
    else:
        known = state.to(dtype)
        v = torch.cat([v, known.flip(1)] if reverse else [known, v], 1)
    offset = None if bias is None else bias.to(dtype)
    c = F.conv1d(v.transpose(1, 2), taps.unsqueeze(1), offset, groups=x.shape[2]).transpose(1, 2)
    return (F.silu(c) if silu else c).to(x.dtype).contiguous()


def _selective_direction(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    dt_softplus: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, D) before the gate and the final state (B, D, N), both in `dtype`."""
    x, delta, A, B, C = (v.to(dtype) for v in (x, dt, A, B, C))
    if dt_bias is not None:
        delta = delta + dt_bias.to(dtype)
    if dt_softplus:
        delta = F.softplus(delta)
    groups = B.shape[2]
    decay = torch.exp(delta.unsqueeze(-1) * A)  # (B, L, D, N)
    written = (delta * x).unflatten(2, (groups, -1)).unsqueeze(-1) * B.unsqueeze(3)
    start = None if initial_state is None else initial_state.to(dtype)
    h, final = recurrence(decay, written.flatten(2, 3), start, reverse)
    y = (h.unflatten(2, (groups, -1)) @ C.unsqueeze(-1)).squeeze(-1).flatten(2, 3)
    return (y if D is None else y + D.to(dtype) * x), final


def _gated(
    total: Tensor, z: Tensor | None, x: Tensor, finals: list[Tensor], training: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four outputs of a registered selective scan."""
    out = total if z is None else total * F.silu(z.to(total.dtype))
    nothing = total.new_empty(0)
    y = total if training and z is not None else nothing
    # of a copy: no output of an op may be another one
    return out.to(x.dtype).contiguous(), y.clone(), torch.stack(finals), nothing


def _selective_scan(
    x: list[Tensor],
    dt: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    C: list[Tensor],
    D: list[Tensor],
    dt_bias: list[Tensor],
    initial_state: list[Tensor],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    dt_softplus: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x[0], cu_seqlens)
    dtype = computing_dtype(*x, *dt, *A, *B, *C, *D, *dt_bias, *initial_state, z)
    parts = []
    for k, back in enumerate(reverse):
        skip, bias = D[k] if D else None, dt_bias[k] if dt_bias else None
        start = initial_state[k] if initial_state else None
        given = (x[k], dt[k], A[k], B[k], C[k], skip, bias, start)
        parts.append(_selective_direction(*given, back, dt_softplus, dtype))
    total = parts[0][0]
    for y, _ in parts[1:]:
        total = total + y
    return _gated(total, z, x[0], [final for _, final in parts], training)


def _path_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    z: Tensor | None,
    paths: Tensor,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    dt_softplus: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, cu_seqlens)
    dtype = computing_dtype(x, dt, A, B, C, D, dt_bias, initial_state, z)
    total, finals = None, []
    # where each token stands on each path, to gather the outputs: few runtimes scatter well
    places = torch.argsort(paths.long(), 1)
    for k, back in enumerate(reverse):
        path = paths[k].long()
        y, final = _selective_direction(
            x.index_select(1, path),
            dt[:, :, k].index_select(1, path),
            A[k],
            B[:, :, k].index_select(1, path),
            C[:, :, k].index_select(1, path),
            None if D is None else D[k],
            None if dt_bias is None else dt_bias[k],
            None if initial_state is None else initial_state[k],
            back,
            dt_softplus,
            dtype,
        )
        y = y.index_select(1, places[k])
        total = y if total is None else total + y
        finals.append(final)
    assert total is not None
    return _gated(total, z, x, finals, training)


def _gated_linear_scan(
    q: list[Tensor],
    k: list[Tensor],
    v: Tensor,
    g: list[Tensor],
    write: list[Tensor],
    skip: Tensor | None,
    initial_state: list[Tensor],
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    exclusive: bool,
    shift: bool,
    final: bool,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check(v, cu_seqlens)
    dtype = computing_dtype(*q, *k, v, *g, *write, skip, *initial_state, bonus)
    if bonus is not None:
        skip = with_bonus(skip, q[0], k[0], bonus)
    values, heads = v.to(dtype), v.shape[2]
    total, finals = None, []
    for d, back in enumerate(reverse):
        queries, keys = (_each_head(u.to(dtype), heads) for u in (q[d], k[d]))
        if shift:
            queries = moved(queries, 1, back)
        decays = values.new_zeros(v.shape[:3]) if not g else g[d].to(dtype)
        written = values * write[d].to(dtype).unsqueeze(-1) if write else values
        start = initial_state[d].to(dtype) if initial_state else None
        run = matrix_states if decays.ndim == 4 else matrix_chunks
        o, last = run(queries, keys, written, decays, start, back, exclusive)
        total = o if total is None else total + o
        finals.append(last)
    assert total is not None
    if skip is not None:
        total = total + skip.to(dtype).unsqueeze(-1) * values
    out = total.to(v.dtype).contiguous()
    return out, torch.stack(finals) if final else total.new_empty(0)


def _each_head(u: Tensor, heads: int) -> Tensor:
    """(B, L, G, K) -> (B, L, H, K), groups repeated for their heads."""
    groups = u.shape[2]
    if groups == heads:
        return u
    return u.unsqueeze(3).expand(-1, -1, -1, heads // groups, -1).flatten(2, 3)


def _linear_scan(
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, cu_seqlens)
    dtype = state_dtype(x, log_a, initial_state)
    decay = torch.exp(log_a.to(dtype)).expand(x.shape)
    start = None if initial_state is None else initial_state.to(dtype)
    h, final = recurrence(decay, x.to(dtype), start, reverse)
    return h.to(x.dtype), final.clone(), h.new_empty(0)


def _wkv(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, d, m) of stretches of tokens, joined in log2(L) passes; w is a stretch's decay."""
    _check(k, cu_seqlens)
    dtype = computing_dtype(k, v, log_decay, bonus, initial_state)
    own, values = k.to(dtype), v.to(dtype)
    w = log_decay.to(dtype).expand(k.shape)
    if initial_state is None:
        nothing = torch.zeros_like(own[:, :1])
        first = [nothing, nothing, torch.full_like(nothing, float("-inf"))]
    else:
        first = [u.unsqueeze(1) for u in initial_state.to(dtype).unbind(1)]
    # the state stands before the first token, as a stretch of its own
    parts = [torch.zeros_like(first[0]), *first]
    rest = [w, values, torch.ones_like(own), own]
    w, n, d, m = (
        torch.cat([r, f] if reverse else [f, r], 1) for f, r in zip(parts, rest, strict=True)
    )
    step = 1
    while step <= k.shape[1]:
        before = moved(m, step, reverse, float("-inf")) + w
        # a scale that cancels: its gradient is left out
        top = torch.maximum(before, m).detach()
        past, now = power(before, top), power(m, top)
        n = moved(n, step, reverse) * past + n * now
        d = moved(d, step, reverse) * past + d * now
        w, m = w + moved(w, step, reverse), top
        step *= 2
    states = torch.stack([n, d, m], 2)  # (B, L + 1, 3, D)
    after, before = (states[:, :-1], states[:, 1:]) if reverse else (states[:, 1:], states[:, :-1])
    final = states[:, 0] if reverse else states[:, -1]
    if bonus is None:
        n, d, _ = after.unbind(2)
        y = ratio(n, d)
    else:
        n, d, m = before.unbind(2)
        own = own + bonus.to(dtype)
        top = torch.maximum(m, own).detach()
        past, now = power(m, top), power(own, top)
        y = ratio(past * n + now * values, past * d + now)
    return y.to(v.dtype), final.clone(), final.new_empty(0)


def _rms_norm_gated(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    return rms_norm_gated_ref(
        x, weight, z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate
    )


def _rotate_pairs(x: list[Tensor], angles: Tensor, halves: bool) -> list[Tensor]:
    return [rotate_pairs_ref(u, angles, halves=halves) for u in x]


def _dense_scan(u: Tensor, E: Tensor, position: Tensor, longest: int) -> Tensor:
    _check_length(longest)
    return double(u, E.mT, position, longest, False)


def _chunk_layout(cu_seqlens: Tensor, length: int, chunk: int, reverse: bool) -> None:
    _check_packed(cu_seqlens)
