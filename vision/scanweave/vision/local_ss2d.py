"""LocalVMamba's mixer of a grid: SS2D whose every direction is weighed by channel.

    y   = sum_k attention(scan_k(u, ...))      along direction k, `SS2D` says what is scanned
    out = out_proj(layer_norm(y) * gate)

Directions are LocalMamba's: rows, columns or windows, each also from its end. Windows that do not
divide the grid are filled with zeros, which are scanned like tokens.

    LocalPaths   the directions of one grid
    LocalSS2D    the mixer

Source: Huang et al. 2024, LocalMamba, arXiv 2403.09338, sections 3.3 and 3.4; official code
https://github.com/hunto/LocalMamba/tree/75e5d1f, Apache-2.0.
"""
# timm.layers exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from scanweave.core import selective_scan

from .local import ChannelAttention, local_order, window_side
from .norms import at_least_float32
from .scan_matrix import ScanMatrix
from .ss2d import SS2D, Gate, GridPaths


@functools.lru_cache(maxsize=256)
def _kept_order(
    height: int, width: int, direction: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    order, inverse = local_order((height, width), direction)
    return order.to(device), inverse.to(device)


# an operator of its own: compilers and exporters need not follow how an order is made
@torch.library.custom_op("scanweave::local_order", mutates_args=())
def _order_op(like: Tensor, height: int, width: int, direction: str) -> tuple[Tensor, Tensor]:
    order, inverse = _kept_order(height, width, direction, like.device)
    # copies, as results of operators may be written to and these are kept
    return order.clone(), inverse.clone()


@_order_op.register_fake
def _(like: Tensor, height: int, width: int, direction: str) -> tuple[Tensor, Tensor]:
    side = window_side(direction)
    padded = ((height + side - 1) // side) * ((width + side - 1) // side) * side * side
    kind = torch.int64
    return like.new_empty(padded, dtype=kind), like.new_empty(height * width, dtype=kind)


class LocalPaths(GridPaths):
    """Directions through a grid; another grid's are made when they are asked for.

    Args:
        grid: Rows and columns of the grid, known beforehand so that compiled models hold the paths.
        directions: Names as `local_order` takes.
        device: Where they lie.

    Raises:
        ValueError: a direction has another name.
    """

    order_0: Tensor

    def __init__(
        self,
        grid: tuple[int, int],
        directions: Sequence[str],
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.directions = tuple(directions)
        self.count = len(self.directions)
        for k in range(self.count):
            empty = torch.empty(0, dtype=torch.int64, device=device)
            self.register_buffer(f"order_{k}", empty, persistent=False)
            self.register_buffer(f"inverse_{k}", empty, persistent=False)
        self.set_grid(grid)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Hold the orders of another grid."""
        self.grid = grid
        for k, direction in enumerate(self.directions):
            order, inverse = local_order(grid, direction)
            device = self.order_0.device
            setattr(self, f"order_{k}", order.to(device))
            setattr(self, f"inverse_{k}", inverse.to(device))

    def order(self, k: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Token of every step of direction `k`, H W for padding, and step of every token."""
        own: Tensor = getattr(self, f"order_{k}")
        if height == self.grid[0] and width == self.grid[1]:
            return own, getattr(self, f"inverse_{k}")
        return _order_op(own, height, width, self.directions[k])


class LocalSS2D(SS2D):
    """The mixer, on a grid (B, H, W, D); parameter names are the official ones.

    Args:
        dim: Channels D.
        paths: Directions of the grid.
        d_state: State size N.
        ssm_ratio: Inner channels E over D.
        dt_rank: Rank R of the step sizes; D / 16, rounded up, when None.
        d_conv: Side of the convolution; below 2 there is none.
        conv_bias: Give it a bias.
        gate: "none", "silu" or "linear".
        norm_eps: Epsilon of the norm.
        device: Where the parameters are made.
        dtype: Type of the parameters; decays and skip weights keep at least float32.

    Raises:
        ValueError: as `SS2D`.
    """

    paths: LocalPaths

    def __init__(
        self,
        dim: int,
        paths: LocalPaths,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | None = None,
        d_conv: int = 3,
        conv_bias: bool = False,
        gate: Gate = "none",
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim, paths, d_state, ssm_ratio, dt_rank, d_conv, conv_bias, gate, norm_eps, **dd
        )
        self.multi_scan = nn.ModuleDict({"attn": ChannelAttention(self.inner, **dd)})

    def reset_parameters(self) -> None:
        """Draw every parameter, as the official code does."""
        super().reset_parameters()
        attention: Any = self.multi_scan["attn"]
        attention.reset_parameters()

    def _scan_inputs(self, u: Tensor, height: int, width: int) -> list[tuple[Tensor, ...]]:
        """For every direction u, dt, A, B, C and D along it, the bias of dt, and the way back."""
        dt, B, C = self._projected(u)
        A = -torch.exp(at_least_float32(self.A_logs)).view(self.count, self.inner, self.state)
        D = self.Ds.view(self.count, self.inner)
        found = []
        for k in range(self.count):
            order, inverse = self.paths.order(k, height, width)
            # one row more, of zeros, for the steps outside the grid
            rows = (F.pad(v, (0, 0, 0, 1)) for v in (u, dt[:, :, k], B[:, :, k], C[:, :, k]))
            u_k, dt_k, B_k, C_k = (v.index_select(1, order) for v in rows)
            found.append((u_k, dt_k, A[k], B_k, C_k, D[k], self.dt_projs_bias[k], inverse))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Mix a grid (B, H, W, D) to one of the same shape."""
        height, width = x.shape[1], x.shape[2]
        u, z = self._inputs(x)
        total: Tensor | None = None
        for *scan, bias, inverse in self._scan_inputs(u, height, width):
            y = selective_scan(*scan, dt_bias=bias).index_select(1, inverse)
            y = self.multi_scan["attn"](y)
            total = y if total is None else total + y
        assert total is not None
        y = self.out_norm(total.unflatten(1, [height, width]))
        if self.gate == "silu":
            y = y * F.silu(z)
        elif self.gate == "linear":
            y = y * z
        return self.out_proj(y)

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What every direction scans, and its results, each (B, K E, H W, 1), without padding."""
        values, outputs = [], []
        for *scan, bias, inverse in self._scan_inputs(self._inputs(x)[0], x.shape[1], x.shape[2]):
            y = selective_scan(*scan, dt_bias=bias)
            for into, along in ((values, scan[0]), (outputs, y)):
                into.append(along.index_select(1, inverse).transpose(1, 2).unsqueeze(-1))
        return torch.cat(values, 1), torch.cat(outputs, 1)

    def _matrices(self, x: Tensor) -> list[ScanMatrix]:
        made = []
        for scan in self._scan_inputs(self._inputs(x)[0], x.shape[1], x.shape[2]):
            _, dt, A, B, C, D, bias, inverse = scan
            delta = F.softplus((dt + bias).to(A.dtype))
            made.append(ScanMatrix(delta, A, *(v.to(A.dtype) for v in (B, C, D)), place=inverse))
        return made


# a leaf for torch.fx: the scan checks shapes, which cannot be traced
register_notrace_module(LocalSS2D)
