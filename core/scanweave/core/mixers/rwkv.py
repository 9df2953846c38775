"""RWKV-5 and RWKV-6 (Eagle and Finch): matrix states with a decay of every key channel.

    r, k, v, z = receptance(x_r), key(x_k), value(x_v), gate(x_g)
    h[t]       = exp(g[t]) h[t-1] + k[t] v[t]^T          a head; g[t] of every key channel
    y[t]       = r[t] h[t-1] + (r[t] . (u k[t])) v[t]    the state before the token, and the bonus
    out        = output(norm(y) silu(z))                 layer norm of heads, with weights

where x_z is a mixture of x and `near`, the token before (`rwkv_shift.py`):

    RWKV-5    x_z = x share_z + near (1 - share_z)                    g = -exp(time_decay)
    RWKV-6    x_z = x + (near - x) (maa_z + m_z)                      z of w, k, v, r, g
              m   = tanh((x + (near - x) maa_x) W1) W2                rank R each
              g   = -exp(time_decay + tanh(x_w A1) A2)

Both directions: a token weighs every other one by the decays of what lies between them, and
itself by the bonus; `near` is then of both neighbours. Parameters are the same.

Letters: B batch, L length, D model channels, E = expand D inner channels, H heads of K key and as
many value channels, S packed sequences, R rank. Parameter names are those of RWKV-LM's
`RWKV_Tmix_x052` and `RWKV_Tmix_x060`, so their weights load strictly.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.gated import (
    bidirectional_gated_linear_scan,
    gated_linear_scan,
    gated_linear_scan_step,
)
from .base import Mixer, State, register_mixer
from .matrix_state import check_sizes, head_width, keep_from_decay
from .rwkv_shift import (
    check_layer,
    depths,
    fill_decays,
    fill_shares,
    learn_faster,
    mixed,
    ramp_of,
    token_before,
    tokens_around,
    zigzag_of,
)

MAX_WIDTH = 256
PAPER = "Peng et al. 2024, arXiv 2404.05892"
BOTH_WAYS = "bidirectional_gated_linear_scan"
# W1, W2, A1 and A2 start within these, as in Vision-RWKV (RWKV-LM has W1 = A1 = 0, so that W2,
# A2 and maa_x have no gradient in the first step)
LOW_RANK = (1e-4, 1e-2)


class _MatrixRWKV(Mixer):
    """What both versions share: heads, bonus, scan, norm and gate."""

    causal = True
    recurrent = True

    def __init__(
        self,
        d_model: int,
        expand: float,
        headdim: int | None,
        eps: float,
        place: tuple[int, int],
        zero_init: bool,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        inner = int(expand * d_model)
        check_sizes({"d_model": d_model, "expand * d_model": inner})
        check_layer(*place)
        self.headdim = head_width(inner, headdim)
        # a norm over a single channel is 0
        if not 2 <= self.headdim <= MAX_WIDTH:
            raise ValueError(f"headdim must be from 2 to {MAX_WIDTH}, got {self.headdim}")
        self.d_model, self.d_inner, self.num_heads = d_model, inner, inner // self.headdim
        (self.layer, self.num_layers), self.zero_init = place, zero_init
        self.time_faaaa = self._full(dd, self.num_heads, self.headdim)
        self.receptance = nn.Linear(d_model, inner, bias=False, **dd)
        self.key = nn.Linear(d_model, inner, bias=False, **dd)
        self.value = nn.Linear(d_model, inner, bias=False, **dd)
        self.gate = nn.Linear(d_model, inner, bias=False, **dd)
        self.output = nn.Linear(inner, d_model, bias=False, **dd)
        # its weights; run as a layer norm of heads, which takes any number of tokens
        self.ln_x = nn.GroupNorm(self.num_heads, inner, eps, **dd)

    @staticmethod
    def _full(dd: dict[str, Any], *shape: int) -> nn.Parameter:
        """A parameter of at least float32, which rates depend on."""
        full = torch.promote_types(dd["dtype"] or torch.get_default_dtype(), torch.float32)
        return nn.Parameter(torch.empty(shape, device=dd["device"], dtype=full))

    def _reset_shared(self) -> None:
        keep_from_decay(self.time_faaaa)
        depth, _ = depths(self.layer, self.num_layers)
        for linear in (self.receptance, self.key, self.value, self.gate, self.output):
            linear.reset_parameters()
        with torch.no_grad():
            bonus = depth * (1 - ramp_of(self.time_faaaa)) + 0.1 * zigzag_of(self.time_faaaa)
            self.time_faaaa.copy_(bonus.view_as(self.time_faaaa))
            self.ln_x.weight.fill_(((1 + self.layer) / self.num_layers) ** 0.7)
            self.ln_x.bias.zero_()
            if self.zero_init:
                self.output.weight.zero_()

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`shift`, the last token, and `h`, the scan's state."""
        dtype = computing_dtype(self.key.weight)
        width = self.headdim
        return {"shift": ((self.d_model,), dtype), "h": ((self.num_heads, width, width), dtype)}

    def _inputs(self, x: Tensor, near: Tensor) -> tuple[Tensor, ...]:
        """r, k and v (..., H, K), the gate z (..., E), and log decays (..., H, K) or (H, K)."""
        raise NotImplementedError

    def _heads(self, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Projections of the mixtures for k, v, r and the gate."""
        parts = zip((self.key, self.value, self.receptance), xs, strict=False)
        k, v, r = (linear(u).unflatten(-1, (self.num_heads, -1)) for linear, u in parts)
        return r, k, v, self.gate(xs[3])

    def _bonus(self) -> Tensor:
        return self.time_faaaa.to(computing_dtype(self.time_faaaa))

    def _own(self, r: Tensor, k: Tensor) -> Tensor:
        """How much a token weighs itself, (..., H)."""
        bonus = self._bonus()
        return (r.to(bonus.dtype) * bonus * k.to(bonus.dtype)).sum(-1)

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        y = F.layer_norm(y, (self.headdim,), eps=self.ln_x.eps).flatten(-2)
        return self.output((y * self.ln_x.weight + self.ln_x.bias) * F.silu(z))

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        near, last = token_before(x, None if state is None else state["shift"], cu_seqlens)
        r, k, v, z, g = self._inputs(x, near)
        y, h = gated_linear_scan(
            *(r, k, v, g),
            exclusive=True,
            bonus=self._bonus(),
            initial_state=None if state is None else state["h"],
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        return self._out(y, z), {"shift": last.to(h.dtype), "h": h} if return_state else None

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        r, k, v, z, g = self._inputs(x, state["shift"].to(x.dtype))
        y = gated_linear_scan_step(
            *(state["h"], r, k, v, g.expand(r.shape)), skip=self._own(r, k), exclusive=True
        )
        state["shift"].copy_(x)
        return self._out(y, z), state

    def _near(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return token_before(x, None, cu_seqlens)[0]

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the values of every head and the scan's outputs."""
        r, k, v, _, g = self._inputs(x, self._near(x, None))
        y = gated_linear_scan(r, k, v, g, exclusive=True, bonus=self._bonus())
        return v.transpose(1, 2), y.transpose(1, 2)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        z = self._inputs(x, self._near(x, None))[3]
        return self._out(outputs.transpose(1, 2), z)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: r[t] . k[s] by the decays between them, and the bonus, a head each.

        Source: Peng et al. 2024, arXiv 2404.05892, equation 19.
        """
        r, k, _, _, g = self._inputs(x, self._near(x, None))
        g = g.expand(r.shape).transpose(1, 2)
        r, k = (u.to(g.dtype).transpose(1, 2) for u in (r, k))
        diagonal = torch.diag_embed((r * self._bonus().unsqueeze(1) * k).sum(-1))
        matrix = _decayed_pairs(r, k, g) + diagonal
        if self.causal:
            return matrix
        return matrix + _decayed_pairs(*(u.flip(2) for u in (r, k, g))).flip(-1, -2)


def _decayed_pairs(r: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """r[t] . k[s] by the decays of the tokens between, for s < t: (B, H, L, K) to (B, H, L, L)."""
    total = g.cumsum(2)
    span = (total - g).unsqueeze(3) - total.unsqueeze(2)
    pairs = torch.einsum("bhtk,bhsk,bhtsk->bhts", r, k, torch.exp(span.clamp(max=0)))
    return pairs.tril(-1)


@register_mixer(
    "rwkv5",
    primitive="gated_linear_scan",
    paper=PAPER,
    reference="RWKV-LM RWKV_Tmix_x052",
    parity="4e-7 (float32)",
)
class RWKV5(_MatrixRWKV):
    """RWKV-5's time mix (Eagle, 5.2): constant decays; causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        expand: Inner channels E = expand * d_model.
        headdim: Channels K of a head; by default the largest divisor of E up to 64.
        eps: Added to the variance of a head's outputs; RWKV-LM divides them by 8 and adds 1e-5.
        layer: Number of the layer, from 0: initial values depend on how deep it lies.
        num_layers: Layers of the model.
        zero_init: Start output at 0, as published models do. Nothing but output then has a
            gradient in the first step.
        device: Of the parameters.
        dtype: Of the parameters; time_decay and time_faaaa keep at least float32.

    Raises:
        ValueError: a size is not positive, heads do not divide E or are not 2 to 256 wide, or
            there is no such layer.
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 1,
        headdim: int | None = None,
        eps: float = 64e-5,
        layer: int = 0,
        num_layers: int = 1,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(d_model, expand, headdim, eps, (layer, num_layers), zero_init, dd)
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.time_mix_g = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.time_decay = self._full(dd, self.num_heads, self.headdim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew: decays and shares by channel and depth, as published."""
        self._reset_shared()
        keep_from_decay(self.time_decay, *self._shares())
        learn_faster((self.time_decay, 2.0))
        depth, rest = depths(self.layer, self.num_layers)
        fill_decays(self.time_decay, -6, 5, depth)
        fill_shares(self.time_mix_k, rest)
        fill_shares(self.time_mix_v, rest, 0.3 * depth)
        fill_shares(self.time_mix_r, 0.5 * rest)
        fill_shares(self.time_mix_g, 0.5 * rest)

    def _shares(self) -> tuple[nn.Parameter, ...]:
        return self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g

    def _inputs(self, x: Tensor, near: Tensor) -> tuple[Tensor, ...]:
        g = -torch.exp(self.time_decay.to(computing_dtype(self.time_decay)))
        return *self._heads(mixed(x, near, self._shares())), g


@register_mixer(
    "rwkv6",
    primitive="gated_linear_scan",
    paper=PAPER,
    reference="RWKV-LM RWKV_Tmix_x060",
    parity="4e-7 (float32)",
)
class RWKV6(_MatrixRWKV):
    """RWKV-6's time mix (Finch): shares and decays by the input; causal, with a state.

    Args:
        d_model: Channels D of the sequence.
        expand: Inner channels E = expand * d_model.
        headdim: Channels K of a head; by default the largest divisor of E up to 64.
        mix_rank: Rank R of what is added to each of the five shares.
        decay_rank: Rank of what is added to the decays.
        eps: Added to the variance of a head's outputs.
        layer: Number of the layer, from 0: initial values depend on how deep it lies.
        num_layers: Layers of the model.
        zero_init: Start output at 0, as published models do. Nothing but output then has a
            gradient in the first step.
        device: Of the parameters.
        dtype: Of the parameters; time_decay and time_faaaa keep at least float32.

    Raises:
        ValueError: a size is not positive, heads do not divide E or are not 2 to 256 wide, or
            there is no such layer.
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 1,
        headdim: int | None = None,
        mix_rank: int = 32,
        decay_rank: int = 64,
        eps: float = 64e-5,
        layer: int = 0,
        num_layers: int = 1,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(d_model, expand, headdim, eps, (layer, num_layers), zero_init, dd)
        check_sizes({"mix_rank": mix_rank, "decay_rank": decay_rank})
        self.mix_rank = mix_rank
        self.time_maa_x = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.time_maa_w = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.time_maa_v = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.time_maa_g = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.time_maa_w1 = nn.Parameter(torch.empty(d_model, 5 * mix_rank, **dd))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, mix_rank, d_model, **dd))
        self.time_decay = self._full(dd, 1, 1, self.d_inner)
        self.time_decay_w1 = nn.Parameter(torch.empty(d_model, decay_rank, **dd))
        self.time_decay_w2 = nn.Parameter(torch.empty(decay_rank, self.d_inner, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew: decays and shares by channel and depth, as published."""
        self._reset_shared()
        first = (self.time_maa_w1, self.time_decay_w1)
        second = (self.time_maa_w2, self.time_decay_w2)
        keep_from_decay(self.time_decay, self.time_maa_x, *self._shares(), *first, *second)
        learn_faster((self.time_decay, 2.0))
        depth, rest = depths(self.layer, self.num_layers)
        fill_decays(self.time_decay, -6, 5, depth)
        powers = {"x": rest, "w": rest, "k": rest, "v": rest, "r": 0.5 * rest, "g": 0.5 * rest}
        for name, power in powers.items():
            share = self.get_parameter(f"time_maa_{name}")
            fill_shares(share, power, 0.3 * depth if name == "v" else 0.0)
            with torch.no_grad():
                share.neg_().add_(1)
        for parts, bound in zip((first, second), LOW_RANK, strict=True):
            for part in parts:
                nn.init.uniform_(part, -bound, bound)

    def _shares(self) -> tuple[nn.Parameter, ...]:
        names = (self.time_maa_w, self.time_maa_k, self.time_maa_v)
        return *names, self.time_maa_r, self.time_maa_g

    def _inputs(self, x: Tensor, near: Tensor) -> tuple[Tensor, ...]:
        delta, lift = near - x, (1,) * (x.ndim - 1)
        low = torch.tanh((x + delta * self.time_maa_x.view(-1)) @ self.time_maa_w1)
        # a product for each of the five; einsum would bind the batch's size when exported
        low = low.flatten(0, -2).unflatten(-1, (5, self.mix_rank)).transpose(0, 1)
        more = torch.bmm(low, self.time_maa_w2).unflatten(1, x.shape[:-1])
        shares = torch.stack([s.view(-1) for s in self._shares()]).unflatten(0, (5, *lift))
        xw, *rest = (x + delta * (shares + more)).unbind(0)
        dtype = computing_dtype(self.time_decay)
        decay = (torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2).to(dtype)
        g = -torch.exp(decay + self.time_decay.view(-1).to(dtype))
        return *self._heads(tuple(rest)), g.unflatten(-1, (self.num_heads, -1))


class _BothWays(_MatrixRWKV):
    """Both directions over one r, k, v and g, in one scan."""

    causal = False
    recurrent = False

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Raise: there is no state."""
        return Mixer.state_spec(self)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Raise: there is no state."""
        return Mixer.step(self, x, state)

    def _near(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return tokens_around(x, cu_seqlens)

    def _scanned(
        self, r: Tensor, k: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None
    ) -> Tensor:
        return bidirectional_gated_linear_scan(
            *((r, r), (k, k), v, (g, g)),
            skip=self._own(r, k),
            form="exclusive",
            cu_seqlens=cu_seqlens,
        )

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        r, k, v, z, g = self._inputs(x, self._near(x, cu_seqlens))
        return self._out(self._scanned(r, k, v, g, cu_seqlens), z), None

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the values of every head and the scan's outputs."""
        r, k, v, _, g = self._inputs(x, self._near(x, None))
        return v.transpose(1, 2), self._scanned(r, k, v, g, None).transpose(1, 2)


@register_mixer(
    "rwkv5_bidirectional", primitive=BOTH_WAYS, paper=PAPER, parity="2e-15 (float64; equations)"
)
class BidirectionalRWKV5(_BothWays, RWKV5):
    """RWKV-5 over the whole sequence; not causal; arguments as `RWKV5`."""


@register_mixer(
    "rwkv6_bidirectional", primitive=BOTH_WAYS, paper=PAPER, parity="6e-16 (float64; equations)"
)
class BidirectionalRWKV6(_BothWays, RWKV6):
    """RWKV-6 over the whole sequence; not causal; arguments as `RWKV6`."""
