"""The public forms of the matrix-state scan: checks of arguments, then the registered op.

    gated_linear_scan                one direction
    bidirectional_gated_linear_scan  both directions over one v, added or quasi-separable

Under other names: `named.py`. Equations and letters: `reference.py`.
"""

from typing import Any, Literal, NamedTuple, overload

from torch import Tensor

from ..checks import check_cu_seqlens, check_tensor
from ..inputs import told_apart
from .op import GatedLinearScan

MAX_WIDTH = 256
Pair = tuple[Tensor, Tensor]


class _Direction(NamedTuple):
    """Checked inputs of one direction, g and write of every token."""

    q: Tensor
    k: Tensor
    g: Tensor | None
    write: Tensor | None
    initial_state: Tensor | None


def _check_values(v: Tensor) -> None:
    if not isinstance(v, Tensor) or v.ndim != 4:
        got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"v must be (B, L, H, V), got {got}")
    check_tensor("v", v, tuple(v.shape), v, "(B, L, H, V)")
    if not 1 <= v.shape[3] <= MAX_WIDTH or v.shape[2] < 1:
        raise ValueError(
            f"v must have heads and 1 to {MAX_WIDTH} values a head, got {tuple(v.shape)}"
        )


def _check_direction(
    direction: _Direction, v: Tensor, cu_seqlens: Tensor | None, suffix: str = ""
) -> _Direction:
    """Raise a ValueError that names the argument (with `suffix`) unless all of them fit."""
    q, k, g, write, initial_state = direction
    batch, length, heads, width = v.shape
    if not isinstance(q, Tensor) or q.ndim != 4:
        got = tuple(q.shape) if isinstance(q, Tensor) else type(q).__name__
        raise ValueError(f"q{suffix} must be (B, L, G, K), got {got}")
    groups, keys = q.shape[2:]
    check_tensor(f"q{suffix}", q, (batch, length, groups, keys), v, "(B, L, G, K)")
    if not 1 <= keys <= MAX_WIDTH:
        raise ValueError(f"q{suffix} must have 1 to {MAX_WIDTH} keys, got {keys}")
    if groups < 1 or heads % groups:
        raise ValueError(f"q{suffix} must have groups that divide the {heads} heads, got {groups}")
    check_tensor(f"k{suffix}", k, tuple(q.shape), v, "(B, L, G, K)")
    if g is not None:
        forms = {
            1: ("(H,)", (heads,)),
            2: ("(H, K)", (heads, keys)),
            3: ("(B, L, H)", (batch, length, heads)),
            4: ("(B, L, H, K)", (batch, length, heads, keys)),
        }
        if not isinstance(g, Tensor) or g.ndim not in forms:
            got = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
            raise ValueError(
                f"g{suffix} must be (H,), (H, K), (B, L, H) or (B, L, H, K), got {got}"
            )
        letters, shape = forms[g.ndim]
        check_tensor(f"g{suffix}", g, shape, v, letters)
        if g.ndim < 3:
            g = g.expand(batch, length, *g.shape)
    if write is not None:
        check_tensor(f"write{suffix}", write, (batch, length, heads), v, "(B, L, H)")
    if initial_state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        letters = "(B, H, K, V)" if cu_seqlens is None else "(S, H, K, V)"
        shape = (rows, heads, keys, width)
        check_tensor(f"initial_state{suffix}", initial_state, shape, v, letters)
    return _Direction(q, k, g, write, initial_state)


def _check_skip(skip: Tensor | None, v: Tensor) -> Tensor | None:
    if skip is None:
        return None
    if not isinstance(skip, Tensor) or skip.ndim not in (1, 3):
        got = tuple(skip.shape) if isinstance(skip, Tensor) else type(skip).__name__
        raise ValueError(f"skip must be (H,) or (B, L, H), got {got}")
    if skip.ndim == 1:
        check_tensor("skip", skip, (v.shape[2],), v, "(H,)")
        return skip.expand(v.shape[:3])
    check_tensor("skip", skip, tuple(v.shape[:3]), v, "(B, L, H)")
    return skip


def _check_packed(cu_seqlens: Tensor | None, v: Tensor) -> None:
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, v.flatten(2))


def _apply(
    directions: list[_Direction],
    v: Tensor,
    skip: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: tuple[bool, ...],
    exclusive: bool,
    shift: bool,
    final: bool,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    q, k, g, write, state = zip(*directions, strict=True)
    columns = [c if c[0] is not None else () for c in (g, write, state)]
    given = [[] if u is None else [u] for u in (skip, bonus)]
    has = tuple(len(u) > 0 for u in (*columns[:2], given[0], columns[2], given[1]))
    tensors = [*q, *k, v, *columns[0], *columns[1], *given[0], *columns[2], *given[1]]
    config = (has, reverse, exclusive, shift, final)
    return GatedLinearScan.apply(config, cu_seqlens, *told_apart(tensors))


@overload
def gated_linear_scan(
    *args: Any, return_final_state: Literal[False] = False, **kwargs: Any
) -> Tensor: ...


@overload
def gated_linear_scan(
    *args: Any, return_final_state: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...


@overload
def gated_linear_scan(
    *args: Any, return_final_state: bool, **kwargs: Any
) -> Tensor | tuple[Tensor, Tensor]: ...


def gated_linear_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    write: Tensor | None = None,
    skip: Tensor | None = None,
    *,
    exclusive: bool = False,
    bonus: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the scan h[t] = exp(g) h[t-1] + write k v^T, o = q h, out = o + skip v.

    The state h is a matrix (K, V) a head. Every floating input has a gradient, the initial state
    and the final one included. State and sums are float32 (float64 if an input is).

    Args:
        q: Read-out vectors, (B, L, G, K) for G groups of H / G heads, K up to 256; not scaled.
        k: Write vectors, as q.
        v: Values, (B, L, H, V), V up to 256.
        g: Log decays: (H,), (B, L, H), or of every key channel (H, K), (B, L, H, K); at most 0,
            and None is no decay.
        write: Factor of what is written, (B, L, H); 1 when absent.
        skip: Factor of v added to the output, (H,) or (B, L, H).
        exclusive: Read h[t-1] instead of h[t].
        bonus: Adds (q . (bonus k)) v to an exclusive reading, (H, K).
        reverse: Run from the end to the start instead (of every packed sequence).
        initial_state: State before the first step, (B, H, K, V), or (S, H, K, V) when packed.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32 from 0 to L; B must be 1.
        return_final_state: Also return the state after the last step.

    Returns:
        Outputs (B, L, H, V) in the dtype of v; the state, float32 or float64, if asked.

    Raises:
        ValueError: a shape, dtype or device does not fit, or cu_seqlens is not valid.

    Source: Dao & Gu 2024, arXiv 2405.21060, section 6; Yang et al. 2023, arXiv 2312.06635.
    """
    _check_values(v)
    _check_packed(cu_seqlens, v)
    direction = _check_direction(_Direction(q, k, g, write, initial_state), v, cu_seqlens)
    skip = _check_skip(skip, v)
    if bonus is not None:
        if not exclusive:
            raise ValueError("bonus must be None unless exclusive: an inclusive reading has it")
        check_tensor("bonus", bonus, (v.shape[2], q.shape[3]), v, "(H, K)")
    flags = (exclusive, False, return_final_state)
    out, final = _apply([direction], v, skip, cu_seqlens, (bool(reverse),), *flags, bonus)
    return (out, final[0]) if return_final_state else out


@overload
def bidirectional_gated_linear_scan(
    *args: Any, return_final_state: Literal[False] = False, **kwargs: Any
) -> Tensor: ...


@overload
def bidirectional_gated_linear_scan(
    *args: Any, return_final_state: Literal[True], **kwargs: Any
) -> tuple[Tensor, Pair]: ...


def bidirectional_gated_linear_scan(
    q: Pair,
    k: Pair,
    v: Tensor,
    g: Pair | None = None,
    write: Pair | None = None,
    skip: Tensor | None = None,
    *,
    form: Literal["add", "exclusive", "quasi_separable"] = "add",
    initial_state: Pair | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Pair]:
    """Run a forward and a reverse scan over one v and add them, in one call.

    "add" is o_f + o_r + skip v. "exclusive" is the same, but both scans read their state before
    the token is written: its own weight is skip alone, and its own decay scales nothing it reads.
    "quasi_separable" moves both outputs by one token instead, so that token t gets o_f[t-1] +
    o_r[t+1] + skip[t] v[t]. Nothing moves over the border of a packed sequence.

    Args:
        q: Read-out vectors of the forward and the reverse scan, each (B, L, G, K).
        k: Write vectors, a pair as q.
        v: Values of both, (B, L, H, V).
        g: Log decays, a pair, each as `gated_linear_scan` takes.
        write: Factors of what is written, a pair, each (B, L, H).
        skip: The diagonal, (H,) or (B, L, H).
        form: "add", "exclusive" or "quasi_separable".
        initial_state: A pair (B, H, K, V): before the first token, and after the last one. Not
            for "quasi_separable", and neither is `return_final_state`.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32; B must be 1.
        return_final_state: Also return the pair of states after each scan's last step.

    Returns:
        Outputs (B, L, H, V), and the pair of final states if asked.

    Raises:
        ValueError: a shape, dtype or device does not fit, or cu_seqlens is not valid.

    Source: Hwang et al. 2024 (Hydra), arXiv 2407.09941, section 3.
    """
    if form not in ("add", "exclusive", "quasi_separable"):
        raise ValueError(f"form must be 'add', 'exclusive' or 'quasi_separable', got {form!r}")
    pairs = dict(q=q, k=k, g=g, write=write, initial_state=initial_state)
    for name, pair in pairs.items():
        if pair is not None and (isinstance(pair, Tensor) or len(pair) != 2):
            got = "a tensor" if isinstance(pair, Tensor) else f"{len(pair)} items"
            raise ValueError(f"{name} must be a pair (forward, reverse), got {got}")
    shift = form == "quasi_separable"
    if shift and (initial_state is not None or return_final_state):
        raise ValueError("initial_state and return_final_state need form 'add' or 'exclusive'")
    _check_values(v)
    _check_packed(cu_seqlens, v)
    directions = []
    for d, suffix in enumerate(("[0]", "[1]")):
        direction = _Direction(
            q[d],
            k[d],
            None if g is None else g[d],
            None if write is None else write[d],
            None if initial_state is None else initial_state[d],
        )
        directions.append(_check_direction(direction, v, cu_seqlens, suffix))
    first, second = directions
    if first.q.shape != second.q.shape:
        got = f"{tuple(first.q.shape)} and {tuple(second.q.shape)}"
        raise ValueError(f"q must have one shape in both directions, got {got}")
    if first.g is not None and second.g is not None and first.g.ndim != second.g.ndim:
        raise ValueError("g must be of heads or of channels in both directions, got one of each")
    skip = _check_skip(skip, v)
    flags = (form != "add", shift, return_final_state)
    out, final = _apply(directions, v, skip, cu_seqlens, (False, True), *flags)
    return (out, (final[0], final[1])) if return_final_state else out
