"""Softmax attention over a sequence, local or full, through PyTorch's own attention kernels.

    y[i] = sum_j softmax_j(scale q[i] k[j]) v[j],   over the j that i sees

Token i sees j if it is a real token of the same packed sequence, and
    causal:  j <= i
    window:  fewer than `window` real tokens lie from j to i, both counted and itself included; a
             window without `causal` reaches as far to both sides
    prefix:  or j is among the first `prefix` real tokens of the sequence (and, if causal, j <= i)
Every token sees itself, also one that is not real, so that no row is empty.

Two ways: `scaled_dot_product_attention` with a mask of all pairs, or none where none is needed; and
FlexAttention, compiled, whose work and memory follow what is seen. Packed sequences are gathered
into a padded batch for the first and masked by block for the second.

Letters: B batch, L queries, T keys, H heads, G heads of keys and values, P channels a head,
S packed sequences.
"""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_cu_seqlens_values, check_tensor

# pairs from which the mask of all pairs costs more than compiling FlexAttention saves
FLEX_PAIRS = 1 << 20
# tokens of FlexAttention's blocks
BLOCK = 128
Backend = Literal["auto", "dense", "flex"]


def sequence_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    prefix: int = 0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attend along the length, with a window, tokens that all see, padding and packing.

    Args:
        q: Queries, (B, L, H, P); the last L of the T places.
        k: Keys, (B, T, G, P), G dividing H: head h reads keys of head h G / H.
        v: Values, (B, T, G, P), or with channels of their own.
        causal: Tokens see no later ones.
        window: Real tokens that one sees, itself included; None is all.
        prefix: The first tokens of a sequence, seen from outside the window as well.
        mask: True at real keys, (B, T) bool; windows and prefixes count real tokens only.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32; then B = 1, T = L, no mask.
        scale: Factor of the scores; None is P ** -0.5.
        backend: "dense" masks all pairs, "flex" is FlexAttention; "auto" takes the second for
            long sequences on a GPU that a mask restricts.

    Returns:
        (B, L, H, channels of v), in the dtype of v.

    Raises:
        ValueError: a shape, dtype or device does not fit, or cu_seqlens is not valid.

    Source: Vaswani et al. 2017, arXiv 1706.03762; Beltagy et al. 2020, arXiv 2004.05150 (window);
    Ainslie et al. 2023, arXiv 2305.13245 (G < H).
    """
    _check(q, k, v, window, prefix, mask, cu_seqlens)
    if backend not in ("auto", "dense", "flex"):
        raise ValueError(f"backend must be 'auto', 'dense' or 'flex', got {backend!r}")
    # compiled programs have no values to look at
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        check_cu_seqlens_values(cu_seqlens, q.shape[1])
    if q.shape[0] * q.shape[1] == 0:
        return _dense(q, k, v, None, False, scale)
    past = k.shape[1] - q.shape[1]
    plain = window is None and mask is None and cu_seqlens is None and (past == 0 or not causal)
    if backend == "auto":
        long = q.is_cuda and q.shape[1] * k.shape[1] >= FLEX_PAIRS
        backend = "flex" if long and not plain else "dense"
    if backend == "flex":
        return _flex(q, k, v, causal, window, prefix, mask, cu_seqlens, scale)
    if cu_seqlens is not None:
        return _packed(q, k, v, causal, window, prefix, cu_seqlens, scale)
    allowed = None
    if not plain:
        allowed = visible(q.shape[1], k.shape[1], causal, window, prefix, mask, q.device)
        allowed = allowed.unsqueeze(-3)
    return _dense(q, k, v, allowed, plain and causal, scale)


def visible(
    queries: int,
    keys: int,
    causal: bool,
    window: int | None,
    prefix: int,
    mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which key each query sees, (L, T) bool, or (B, L, T) with a mask."""
    key = torch.arange(keys, device=device)
    # the last ones; not a slice from the end, which a compiler cannot bound
    query = torch.arange(queries, device=device) + (keys - queries)
    place = key if mask is None else mask.long().cumsum(-1) - 1
    own = place[..., keys - queries :].unsqueeze(-1)
    place = place.unsqueeze(-2)
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if mask is not None:
        allowed = allowed & mask.unsqueeze(-2)
    if window is not None:
        near = (own - place).abs() < window
        allowed = allowed & (near | (place < prefix) if prefix else near)
    if causal:
        allowed = allowed & (key <= query.unsqueeze(-1))
    return allowed | (key == query.unsqueeze(-1))


def _dense(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    # a branch, not the comparison itself: with sizes of a compiler that is no bool
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=allowed,
        is_causal=causal,
        scale=scale,
        **grouped,
    )
    return y.transpose(1, 2)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    prefix: int,
    cu_seqlens: Tensor,
    scale: float | None,
) -> Tensor:
    """A batch as long as the longest sequence: its length is read from the device."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    place = torch.arange(int(lengths.max()), device=q.device)
    real = place < lengths.unsqueeze(1)
    token = (starts.unsqueeze(1) + place).clamp(max=q.shape[1] - 1)
    size = place.shape[0]
    allowed = visible(size, size, causal, window, prefix, real, q.device).unsqueeze(-3)
    return _dense(q[0, token], k[0, token], v[0, token], allowed, False, scale)[real].unsqueeze(0)


@functools.cache
def _compiled(*kind: object) -> Callable[..., Any]:
    """FlexAttention compiled for one kind of call, whose dtype, rules and heads are constants.

    Of one code object the compiler keeps eight programs, and then runs the form that holds all
    pairs; so each kind has its own.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def run(*args: Any, **options: Any) -> Any:
        return flex_attention(*args, **options)

    own = FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    return torch.compile(own, dynamic=True)


def _compiles(q: Tensor) -> bool:
    return q.is_cuda and not torch.compiler.is_compiling()


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    prefix: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
) -> Tensor:
    """The same rules as `visible`, as a function of one pair."""
    from torch.nn.attention.flex_attention import flex_attention

    batch, length = q.shape[:2]
    keys = k.shape[1]
    past = keys - length
    token = torch.arange(keys, device=q.device)
    sequence = torch.zeros_like(token).expand(batch, keys)
    place, real = token.expand(batch, keys), torch.ones_like(sequence, dtype=torch.bool)
    if cu_seqlens is not None:
        ends = cu_seqlens.long()
        sequence = torch.bucketize(token, ends[1:], right=True).unsqueeze(0)
        place = token - ends[sequence]
    elif mask is not None:
        real, place = mask, mask.long().cumsum(-1) - 1

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i = i + past
        seen = real[b, j] & (sequence[b, i] == sequence[b, j])
        if window is not None:
            seen = seen & (((place[b, i] - place[b, j]).abs() < window) | (place[b, j] < prefix))
        if causal:
            seen = seen & (j <= i)
        return seen | (i == j)

    blocks = _blocks(sees, length, sequence, place, real, causal, window, prefix)
    run = flex_attention
    if _compiles(q):
        layout = mask is None, cu_seqlens is None
        run = _compiled(q.dtype, q.shape[2:], k.shape[2], causal, window, prefix, scale, layout)
    y = run(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=blocks,
        scale=scale,
        enable_gqa=True if q.shape[2] != k.shape[2] else False,  # noqa: SIM210
    )
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)


def _blocks(
    sees: Callable[..., Tensor],
    length: int,
    sequence: Tensor,
    place: Tensor,
    real: Tensor,
    causal: bool,
    window: int | None,
    prefix: int,
) -> Any:
    """Which blocks of keys a block of queries looks at, as FlexAttention's `BlockMask`.

    From the first and last token of every block, as everything that decides rises along the
    tokens: PyTorch's own `create_block_mask` asks `sees` for all pairs of tokens first.

    Args:
        sees: Whether batch row b, head h, query i sees key j.
        length: Queries L, the last of the T tokens.
        sequence: Number of every token's sequence, (B, T).
        place: Of a token inside its sequence, (B, T).
        real: Tokens that are there, (B, T) bool.
        causal: As in `sequence_attention`.
        window: As there.
        prefix: As there.
    """
    from torch.nn.attention.flex_attention import BlockMask

    keys = sequence.shape[1]
    start_q = torch.arange(0, length, BLOCK, device=sequence.device) + (keys - length)
    start_k = torch.arange(0, keys, BLOCK, device=sequence.device)
    first_q, last_q = start_q.unsqueeze(1), (start_q + BLOCK - 1).clamp(max=keys - 1).unsqueeze(1)
    first_k, last_k = start_k, (start_k + BLOCK - 1).clamp(max=keys - 1)
    sequence_k = sequence[:, None, first_k], sequence[:, None, last_k]
    sequence_q = sequence[:, first_q], sequence[:, last_q]
    some = (sequence_k[0] <= sequence_q[1]) & (sequence_k[1] >= sequence_q[0])
    every = (sequence_k[0] == sequence_q[1]) & (sequence_k[1] == sequence_q[0])
    every = every & (start_q + BLOCK <= keys).unsqueeze(1) & (start_k + BLOCK <= keys)
    padding = start_k.shape[0] * BLOCK - keys
    every = every & F.pad(real, (0, padding)).unflatten(1, (-1, BLOCK)).all(-1).unsqueeze(1)
    if window is not None:
        # a sequence's places, moved behind those of the sequences before it
        rising = place + sequence * keys
        rising_k = rising[:, None, first_k], rising[:, None, last_k]
        rising_q = rising[:, first_q], rising[:, last_q]
        apart = torch.maximum(rising_k[0] - rising_q[1], rising_q[0] - rising_k[1])
        spread = torch.maximum(rising_k[1] - rising_q[0], rising_q[1] - rising_k[0])
        near = apart < window
        if prefix:
            padded = F.pad(place, (0, padding), value=keys).unflatten(1, (-1, BLOCK))
            near = near | (padded.amin(-1).unsqueeze(1) < prefix)
        some, every = some & near, every & (spread < window)
    if causal:
        some, every = some & (first_k <= last_q), every & (last_k <= first_q)

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        chosen = chosen.to(torch.int32).unsqueeze(1)
        order = chosen.argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)

    return BlockMask.from_kv_blocks(
        *listed(some & ~every),
        *listed(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, keys),
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    prefix: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or t.ndim != 4:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be (B, L, H, P), got {got}")
    batch, length, heads, channels = q.shape
    keys, groups = k.shape[1:3]
    check_tensor("k", k, (batch, keys, groups, channels), q, "(B, T, G, P)")
    check_tensor("v", v, (batch, keys, groups, v.shape[3]), q, "(B, T, G, P)")
    if groups < 1 or heads % groups:
        raise ValueError(f"k must have heads that divide the {heads} of q, got {groups}")
    if keys < length:
        raise ValueError(f"k must have at least the {length} places of q, got {keys}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if prefix < 0:
        raise ValueError(f"prefix must be at least 0, got {prefix}")
    if mask is not None and (
        not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (batch, keys)
    ):
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
        raise ValueError(f"mask must be bool (B, T) = {(batch, keys)}, got {got}")
    if cu_seqlens is None:
        return
    if mask is not None:
        raise ValueError("mask must be None with cu_seqlens: pack only real tokens")
    if batch != 1 or keys != length:
        raise ValueError(
            f"q and k must have batch 1 and one length with cu_seqlens, got {tuple(q.shape)} "
            f"and {tuple(k.shape)}"
        )
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        got = tuple(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens)
        raise ValueError(f"cu_seqlens must be a tensor (S + 1,), got {got}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
