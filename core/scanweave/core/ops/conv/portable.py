"""The short convolution and its gradients in plain PyTorch: any device, any dtype.

Equations and letters: `reference.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import computing_dtype


class Taps:
    """x as each tap sees it: tap j of token t meets x[t - left + j], mirrored when `reverse`."""

    def __init__(
        self,
        x: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        width: int,
        left: int,
        reverse: bool,
    ) -> None:
        self.x, self.state, self.width, self.left, self.reverse = x, state, width, left, reverse
        self.packed = cu_seqlens is not None
        if cu_seqlens is not None:
            token = torch.arange(x.shape[1], device=x.device)
            self.sequence = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
            start = cu_seqlens[:-1].long()[self.sequence]
            end = cu_seqlens[1:].long()[self.sequence]
            # position in scan order, and the tokens that follow there
            self.before = end - 1 - token if reverse else token - start
            self.after = token - start if reverse else end - 1 - token
            self.token = token
        else:
            right = width - 1 - left
            v = x.flip(1) if reverse else x
            head = x.new_zeros(x.shape[0], left, x.shape[2]) if state is None else state.to(x.dtype)
            self.padded = F.pad(torch.cat([head, v], 1), (0, 0, 0, right))

    def __call__(self, j: int) -> Tensor:
        """What tap j meets at every token, (B, L, D)."""
        offset = j - self.left
        if not self.packed:
            v = self.padded[:, j : j + self.x.shape[1]]
            return v.flip(1) if self.reverse else v
        source = self.token - offset if self.reverse else self.token + offset
        v = self.x[0].index_select(0, source.clamp(0, max(self.x.shape[1] - 1, 0)))
        inside = (self.before + offset >= 0) & (offset <= self.after)
        outside = torch.zeros_like(v)
        if self.state is not None and offset < 0:
            row = (self.width - 1 + self.before + offset).clamp(max=self.width - 2)
            outside = self.state.to(v.dtype)[self.sequence, row]
        return torch.where(inside.unsqueeze(-1), v, outside).unsqueeze(0)

    def add_to_state(self, dstate: Tensor, j: int, v: Tensor) -> None:
        """dstate[row] += v at the tokens where tap j reads the initial state."""
        offset = j - self.left
        if offset >= 0:
            return
        if not self.packed:
            v = v.flip(1) if self.reverse else v
            count = min(-offset, v.shape[1])
            dstate[:, j : j + count] += v[:, :count]
            return
        hit = (self.before + offset < 0).nonzero().squeeze(1)
        row = self.width - 1 + self.before[hit] + offset
        dstate.index_put_((self.sequence[hit], row), v[0, hit], accumulate=True)


def _convolve(taps: Taps, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    w = weight.to(dtype)
    c = taps(0).to(dtype) * w[:, 0]
    for j in range(1, weight.shape[1]):
        c.addcmul_(taps(j).to(dtype), w[:, j])
    return c if bias is None else c.add_(bias.to(dtype))


def _silu_gradient(c: Tensor) -> Tensor:
    gate = torch.sigmoid(c)
    return gate * (1 + c * (1 - gate))


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    reverse: bool,
    silu: bool,
) -> Tensor:
    """Compute y (B, L, D); arguments as the registered op's."""
    dtype = computing_dtype(x, weight, bias, state)
    taps = Taps(x, state, cu_seqlens, weight.shape[1], left, reverse)
    c = _convolve(taps, weight, bias, dtype)
    return (F.silu(c, inplace=True) if silu else c).to(x.dtype).contiguous()


def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    reverse: bool,
    silu: bool,
) -> list[Tensor]:
    """Gradients of x, weight and, where given, bias and state."""
    dtype = computing_dtype(x, weight, bias, state)
    width = weight.shape[1]
    taps = Taps(x, state, cu_seqlens, width, left, reverse)
    dc = dy.to(dtype)
    if silu:
        dc = dc * _silu_gradient(_convolve(taps, weight, bias, dtype))
    # each x[s] reached c[s + left - j] through tap j: the same convolution, mirrored
    mirrored = Taps(dc, None, cu_seqlens, width, left, not reverse)
    dx = _convolve(mirrored, weight, None, dtype)
    dweight = torch.stack([(taps(j).to(dtype) * dc).sum((0, 1)) for j in range(width)], 1)
    grads = [dx.to(x.dtype), dweight.to(weight.dtype)]
    if bias is not None:
        grads.append(dc.sum((0, 1)).to(bias.dtype))
    if state is not None:
        dstate = torch.zeros_like(state, dtype=dtype)
        for j in range(width - 1):
            taps.add_to_state(dstate, j, dc * weight[:, j].to(dtype))
        grads.append(dstate.to(state.dtype))
    return grads
