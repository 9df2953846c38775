"""HiPPO's memory: coefficients of the past of every channel, and the past rebuilt from them.

    c[k] = (I - step A / 2)^-1 ((I + step A / 2) c[k-1] + step B f[k])        no parameters

    name    step      what is kept                         basis at an age of s (in tokens)
    legs    1 / k     all k tokens so far, uniformly       r[n] P_n(1 - 2 s / k)
    legt    2 / w     the last w tokens                    r[n] P_n(1 - 2 s / w)
    fout    2 / w     the last w tokens                    1, then sqrt(2) cos, sin(2 pi j s / w)
    lagt    1 / w     all, at an age of s by e^(-s / 2w)   e^(-s / 2w) L_n(s / w)

P_n are the polynomials of Legendre, L_n those of Laguerre, r[n] = sqrt(2 n + 1). What is rebuilt
is the sum of the basis times c: it shows how much of the past N numbers hold.

Letters: B batch, L length, D channels, N coefficients.
Source: Gu et al. 2020 (HiPPO), arXiv 2008.07669, section 2.4 and appendix D.
"""

import functools
import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..ops.checks import computing_dtype, without_autocast
from ..ops.dense import dense_ssm
from .base import State
from .hippo import hippo
from .matrix_state import check_sizes

MemoryName = Literal["legs", "legt", "lagt", "fout"]
MEMORY_NAMES: tuple[str, ...] = get_args(MemoryName)


class HippoMemory(nn.Module):
    """Keep the past of every channel in N coefficients; nothing is learned.

    Args:
        name: Basis: "legs" (all of the past, ever more coarsely), "legt" or "fout" (a window), or
            "lagt" (older tokens ever less).
        size: Coefficients N a channel, 2 to 256; even for fout.
        window: Tokens w that legt and fout keep, and the time scale of lagt, whose weight falls to
            e^-1 in 2 w tokens; not for legs.

    Raises:
        ValueError: the name is unknown, a size does not fit, or window is missing or not wanted.

    Example:
        >>> memory = HippoMemory("legt", 8, window=50)
        >>> coefficients, state = memory(torch.ones(1, 60, 2))
        >>> coefficients.shape, memory.reconstruct(state, 50).shape
        (torch.Size([1, 60, 2, 8]), torch.Size([1, 50, 2]))
    """

    def __init__(
        self,
        name: MemoryName = "legs",
        size: int = 64,
        *,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if name not in MEMORY_NAMES:
            raise ValueError(f"name must be one of {', '.join(MEMORY_NAMES)}, got {name!r}")
        if not 2 <= size <= 256:
            raise ValueError(f"size must be from 2 to 256, got {size}")
        if name == "legs":
            if window is not None:
                raise ValueError(f"window must be None for legs, which keeps all, got {window}")
        elif window is None:
            raise ValueError(f"window must be a number of tokens for {name}, got None")
        else:
            check_sizes({"window": window})
        self.name: MemoryName = name
        hippo(name, size)  # says what does not fit
        self.size, self.window = size, window

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.name}, size={self.size}, window={self.window}"

    def init_state(
        self,
        batch: int,
        channels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> State:
        """The state before the first token: `c` (B, D, N) and `count` (B,), tokens so far.

        Args:
            batch: Sequences B.
            channels: Channels D.
            device: Of the state, and of the sequences.
            dtype: float32 or float64.
        """
        c = torch.zeros(batch, channels, self.size, device=device, dtype=dtype)
        return {"c": c, "count": torch.zeros(batch, device=device, dtype=torch.int64)}

    def forward(self, x: Tensor, *, state: State | None = None) -> tuple[Tensor, State]:
        """Read a sequence, or the next piece of one.

        Args:
            x: Values, (B, L, D), real.
            state: What the piece before returned.

        Returns:
            Coefficients after every token (B, L, D, N), in float32 or float64, and the state.

        Raises:
            ValueError: x is not (B, L, D), or the state is not one of such sequences.
        """
        if x.ndim != 3:
            raise ValueError(f"x must be (B, L, D), got {tuple(x.shape)}")
        if state is None:
            state = self.init_state(x.shape[0], x.shape[2], x.device, computing_dtype(x))
        c, count = state["c"], state["count"]
        if c.shape != (x.shape[0], x.shape[2], self.size) or count.shape != x.shape[:1]:
            raise ValueError(
                f"state must be of {x.shape[0]} sequences of {x.shape[2]} channels with "
                f"{self.size} coefficients, got c {tuple(c.shape)}, count {tuple(count.shape)}"
            )
        with without_autocast(x):
            if self.name == "legs":
                coefficients, c = self._uniform(x, c, count)
            else:
                coefficients, c = self._constant(x, c)
        return coefficients, {"c": c, "count": count + x.shape[1]}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Read a token (B, D); returns the coefficients (B, D, N) and the state after it."""
        if x.ndim != 2:
            raise ValueError(f"x must be (B, D), got {tuple(x.shape)}")
        coefficients, state = self(x.unsqueeze(1), state=state)
        return coefficients.squeeze(1), state

    def _constant(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One matrix for all tokens: in chunks of matrix products."""
        assert self.window is not None
        dtype, dim = computing_dtype(x, c), x.shape[2]
        E, B = (v.to(x.device, dtype) for v in _discrete(self.name, self.size, self.window))
        if x.shape[1] == 1:
            c = c.to(dtype)
            c = c + c @ E.T + B * x.to(dtype).transpose(1, 2)
            return c.unsqueeze(1), c
        E, B, C = (v.expand(dim, *v.shape) for v in (E, B, torch.eye(self.size).to(E)))
        y, last = dense_ssm(x, E, B, C, initial_state=c, return_final_state=True)
        assert last is not None
        return y, last

    def _uniform(self, x: Tensor, c: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """A matrix for every token, which depends on how many there were."""
        dtype = computing_dtype(x, c)
        A, B = (v.to(x.device, dtype) for v in hippo("legs", self.size))
        c = c.to(dtype)
        eye = torch.eye(self.size, device=A.device, dtype=dtype)
        rows = []
        for t, value in enumerate(x.to(dtype).unbind(1), start=1):
            step = (1 / (count + t).to(dtype))[:, None, None]
            into = c + 0.5 * step * (c @ A.T) + step * B * value.unsqueeze(-1)
            left = eye - 0.5 * step * A
            c = torch.linalg.solve_triangular(left, into.transpose(1, 2), upper=False)
            c = c.transpose(1, 2)
            rows.append(c)
        if not rows:
            return x.new_zeros(*x.shape, self.size, dtype=dtype), c
        return torch.stack(rows, 1), c

    def reconstruct(self, state: State, length: int) -> Tensor:
        """Rebuild the last tokens of a sequence from its coefficients.

        Args:
            state: What `forward` or `step` returned.
            length: Tokens to rebuild; legt and fout keep no more than their window.

        Returns:
            Values (B, length, D) near x[:, -length:], oldest first, in the coefficients' dtype.
            Where legs had no tokens yet, they are 0.

        Raises:
            ValueError: length is negative or over the window.

        Source: Gu et al. 2020, arXiv 2008.07669, appendix D (the bases and their weights).
        """
        c, count = state["c"], state["count"]
        most = self.window if self.name in ("legt", "fout") else None
        if length < 0 or (most is not None and length > most):
            raise ValueError(f"length must be from 0 to {most or 'any number'}, got {length}")
        # a token lasts from its arrival to the next one: its value stands for the middle
        ages = torch.arange(length - 1, -1, -1, device=c.device, dtype=torch.float64) + 0.5
        if self.name == "legs":
            ages = ages / count.clamp(min=1).unsqueeze(-1)
            known = (ages < 1).unsqueeze(-1)
            basis = _legendre(1 - 2 * ages.clamp(max=1), self.size) * known
        else:
            assert self.window is not None
            ages = (ages / self.window).unsqueeze(0)
            if self.name == "legt":
                basis = _legendre(1 - 2 * ages, self.size)
            else:
                make = _laguerre if self.name == "lagt" else _waves
                basis = make(ages, self.size)
        return torch.einsum("bln,bdn->bld", basis.to(c.dtype).expand(len(c), -1, -1), c)


@functools.cache
def _discrete(name: MemoryName, size: int, window: int) -> tuple[Tensor, Tensor]:
    """What a token adds to the state: a matrix (N, N) less the identity, and (N,), float64."""
    A, B = (v * (1 if name == "lagt" else 2) / window for v in hippo(name, size))
    left = torch.eye(size, dtype=A.dtype, device=A.device) - 0.5 * A
    solved = torch.linalg.solve(left, torch.cat([A, B.unsqueeze(-1)], -1))
    return solved[:, :-1], solved[:, -1]


def _legendre(x: Tensor, size: int) -> Tensor:
    """Legendre's polynomials at x (...), of norm 1 over [-1, 1] / 2: (..., N)."""
    rows = [torch.ones_like(x), x]
    for n in range(1, size - 1):
        rows.append(((2 * n + 1) * x * rows[n] - n * rows[n - 1]) / (n + 1))
    weights = torch.arange(size, device=x.device, dtype=x.dtype).mul(2).add(1).sqrt()
    return torch.stack(rows, -1) * weights


def _laguerre(x: Tensor, size: int) -> Tensor:
    """Laguerre's functions e^(-x / 2) L_n(x) at x (...), (..., N)."""
    # the exponential from the start: the polynomials alone leave float64's range
    first = torch.exp(-0.5 * x)
    rows = [first, (1 - x) * first]
    for n in range(1, size - 1):
        rows.append(((2 * n + 1 - x) * rows[n] - n * rows[n - 1]) / (n + 1))
    return torch.stack(rows, -1)


def _waves(x: Tensor, size: int) -> Tensor:
    """1, 0, then sqrt(2) cos and sqrt(2) sin of 2 pi j x in turns, (..., N)."""
    angles = 2 * math.pi * torch.arange(size // 2, device=x.device, dtype=x.dtype) * x.unsqueeze(-1)
    waves = math.sqrt(2) * torch.stack([angles.cos(), angles.sin()], -1).flatten(-2)
    return torch.cat([torch.ones_like(waves[..., :1]), waves[..., 1:]], -1)
