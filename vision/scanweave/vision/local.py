"""LocalMamba's mixer: a Mamba scan along each of several local paths, weighed by channel.

    u, z  = in_proj(x)                                            E channels each
    s_k   = u, z along direction k                                K directions, each with
    y_k   = selective_scan(silu(conv1d_k(u)), ...) * silu(z)      parameters of its own
    out   = out_proj(sum_k y_k sigmoid(W2 gelu(W1 mean_L(layer_norm(y_k)))))

Windows that do not divide the grid are filled with zeros, which are scanned like tokens. Parameter
names are the official ones.

Letters: B batch, L tokens, D channels, E inner channels, N state, R rank of dt, K directions.

    directions_of     names of directions, written short
    local_order       tokens along one direction, padding included
    window_side       side of a direction's windows
    ChannelAttention  the weights of the channels, shared by the directions
    LocalMamba        the mixer

Source: Huang et al. 2024, LocalMamba, arXiv 2403.09338, sections 3.3 and 3.4; official code
https://github.com/hunto/LocalMamba/tree/75e5d1f, Apache-2.0.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanweave.core import causal_conv1d, create_mixer, selective_scan

from .norms import LayerNorm
from .scan_matrix import ScanMatrix

_NAME = re.compile(r"(h|v|w([1-9]\d*))(_flip)?")


def local_order(
    grid: tuple[int, int], direction: str, rows: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Tokens along one of LocalMamba's directions.

    Args:
        grid: Patches (h, w).
        direction: "h" row by row, "v" column by column, "w<K>" windows of K x K patches row by
            row, each row by row inside; "_flip" appended reads from the end.
        rows: Places of class tokens, in the sequence and on the path; ascending.

    Returns:
        Token of every step, where L stands for padding, and step of every token, (L,); int64.

    Raises:
        ValueError: the direction is none of these.
    """
    match = _NAME.fullmatch(direction)
    if match is None:
        raise ValueError(f"direction must be h, v or w<K>, with _flip or not, got {direction!r}")
    height, width = grid
    with torch.device("cpu"):
        patches = torch.arange(height * width).view(height, width)
        if match[2]:
            side = int(match[2])
            padded = F.pad(patches, (0, -width % side, 0, -height % side), value=-1)
            blocks = padded.unflatten(1, (-1, side)).unflatten(0, (-1, side))
            path = blocks.transpose(1, 2).flatten()
        else:
            path = (patches if match[1] == "h" else patches.t()).flatten()
        path = path.flip(0) if match[3] else path
        length = patches.numel() + len(rows)
        is_patch = torch.ones(length, dtype=torch.bool)
        is_patch[list(rows)] = False
        # one row more, which -1 finds
        token = torch.cat([torch.arange(length)[is_patch], torch.tensor([length])])
        order = token[path]
        for row in rows:
            order = torch.cat([order[:row], torch.tensor([row]), order[row:]])
        inverse = order.argsort(stable=True)[:length]
    return order, inverse


def directions_of(layers: str) -> tuple[tuple[str, ...], ...]:
    """Directions of every layer, written as "h v_, w2 w7_": commas between layers, _ for _flip."""
    return tuple(
        tuple(name.replace("_", "_flip") for name in layer.split()) for layer in layers.split(",")
    )


def window_side(direction: str) -> int:
    """Side of the windows of a direction of `local_order`; 1 without windows."""
    match = _NAME.fullmatch(direction)
    return int(match[2]) if match is not None and match[2] else 1


class ChannelAttention(nn.Module):
    """Weight channels by what they hold on average.

    Args:
        dim: Channels E.
        device: Where the parameters are made.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, **dd)
        self.global_reduce = nn.Linear(dim, max(dim // 8, 1), **dd)
        self.channel_select = nn.Linear(max(dim // 8, 1), dim, **dd)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for part in (self.norm, self.global_reduce, self.channel_select):
            part.reset_parameters()

    def forward(self, y: Tensor) -> Tensor:
        """Values (B, L, E), weighed."""
        mean = self.norm(y).mean(1, keepdim=True)
        return y * self.channel_select(F.gelu(self.global_reduce(mean))).sigmoid()


class LocalMamba(nn.Module):
    """LocalMamba's mixer on a fixed grid: (B, L, D) to (B, L, D), not causal.

    Args:
        d_model: Channels D.
        directions: Names as `local_order` takes, one for each of the K scans.
        d_state: State N a channel.
        d_conv: Taps of the convolutions.
        expand: Inner channels E = expand * d_model.
        dt_rank: Rank R of the time step's projection, "auto" is ceil(d_model / 16).
        device: Where the parameters are made.
        dtype: Type of the parameters; A_log and D keep at least float32.

    Raises:
        ValueError: a direction has another name.
    """

    def __init__(
        self,
        d_model: int,
        directions: Sequence[str],
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.directions = tuple(directions)
        inner = int(expand * d_model)
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.d_model, self.d_inner, self.d_state, self.dt_rank = d_model, inner, d_state, rank
        self._mamba = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": rank}
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False, **dd)
        for k in range(len(self.directions)):
            conv = nn.Conv1d(inner, inner, d_conv, groups=inner, **dd)
            self.add_module(f"conv1d_{k}", conv)
            x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False, **dd)
            self.add_module(f"x_proj_{k}", x_proj)
            self.add_module(f"dt_proj_{k}", nn.Linear(rank, inner, **dd))
            a_log = torch.empty(inner, d_state, device=device, dtype=full)
            self.register_parameter(f"A_log_{k}", nn.Parameter(a_log))
            skip = torch.empty(inner, device=device, dtype=full)
            self.register_parameter(f"D_{k}", nn.Parameter(skip))
            self.register_buffer(f"order_{k}", None, persistent=False)
            self.register_buffer(f"inverse_{k}", None, persistent=False)
        self.attn = ChannelAttention(inner, **dd)
        self.out_proj = nn.Linear(inner, d_model, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, each direction as a Mamba block starts."""
        for part in (self.in_proj, self.attn, self.out_proj):
            part.reset_parameters()
        weight = self.in_proj.weight
        for k in range(len(self.directions)):
            # one source for how a Mamba starts: draw one, keep what lies between its projections
            mamba: Any = create_mixer(
                "mamba", self.d_model, **self._mamba, device=weight.device, dtype=weight.dtype
            )
            for name in ("conv1d", "x_proj", "dt_proj"):
                getattr(self, f"{name}_{k}").load_state_dict(getattr(mamba, name).state_dict())
            parameters = self._direction(k)
            with torch.no_grad():
                parameters[3].copy_(mamba.A_log)
                parameters[4].copy_(mamba.D)
            for p in (parameters[3], parameters[4], parameters[2].bias):
                p._no_weight_decay = True

    def set_grid(self, grid: tuple[int, int], rows: Sequence[int] = ()) -> None:
        """Say what grid of patches the tokens are, and where class tokens stand among them."""
        for k, direction in enumerate(self.directions):
            order, inverse = local_order(grid, direction, rows)
            device = self.in_proj.weight.device
            setattr(self, f"order_{k}", order.to(device))
            setattr(self, f"inverse_{k}", inverse.to(device))

    def _direction(self, k: int) -> tuple[Any, Any, Any, Any, Any]:
        names = ("conv1d", "x_proj", "dt_proj", "A_log", "D")
        return tuple(getattr(self, f"{name}_{k}") for name in names)  # type: ignore[return-value]

    def _scan_inputs(self, both: Tensor, k: int) -> tuple[Tensor, ...]:
        """What scan `k` reads along its path: u, dt, A, B, C, D, z and the bias of dt.

        The last row of `both`, (B, L + 1, 2 E), is what paths read outside the grid.
        """
        conv, x_proj, dt_proj, a_log, skip = self._direction(k)
        u, z = both.index_select(1, getattr(self, f"order_{k}")).chunk(2, -1)
        u = causal_conv1d(u, conv.weight.squeeze(1), conv.bias, "silu")
        r, B, C = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        A = -torch.exp(a_log.to(torch.promote_types(a_log.dtype, torch.float32)))
        return u, F.linear(r, dt_proj.weight), A, B, C, skip, z, dt_proj.bias

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, L, D), L = h w + class tokens of the grid that was set."""
        both = F.pad(self.in_proj(x), (0, 0, 0, 1))
        total: Tensor | None = None
        for k in range(len(self.directions)):
            y = selective_scan(*self._scan_inputs(both, k))
            y = self.attn(y.index_select(1, getattr(self, f"inverse_{k}")))
            total = y if total is None else total + y
        assert total is not None
        return self.out_proj(total)

    def _matrices(self, x: Tensor) -> list[ScanMatrix]:
        both = F.pad(self.in_proj(x), (0, 0, 0, 1))
        made = []
        for k in range(len(self.directions)):
            _, dt, A, B, C, D, _, bias = self._scan_inputs(both, k)
            delta = F.softplus((dt + bias).to(A.dtype))
            B, C, D = B.to(A.dtype), C.to(A.dtype), D.to(A.dtype)
            made.append(ScanMatrix(delta, A, B, C, D, getattr(self, f"inverse_{k}")))
        return made

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What every direction scans, and its results before the gate: each (B, K E, L, 1).

        Padding, which is scanned too, is left out; see `scanweave.core.Mixer.core`.
        """
        both = F.pad(self.in_proj(x), (0, 0, 0, 1))
        values, outputs = [], []
        for k in range(len(self.directions)):
            u, dt, A, B, C, D, _, bias = self._scan_inputs(both, k)
            y = selective_scan(u, dt, A, B, C, D, dt_bias=bias)
            for into, along in ((values, u), (outputs, y)):
                natural = along.index_select(1, getattr(self, f"inverse_{k}"))
                into.append(natural.transpose(1, 2).unsqueeze(-1))
        return torch.cat(values, 1), torch.cat(outputs, 1)

    def matrix(self, x: Tensor) -> Tensor:
        """(B, K E, L, L): what tokens give to tokens; padding gives the rest."""
        return torch.cat([m.whole() for m in self._matrices(x)], 1)

    def matrix_size(self, x: Tensor) -> Tensor:
        """Mean over channels and directions of |matrix|, (B, L, L)."""
        return torch.stack([m.size() for m in self._matrices(x)]).mean(0)
