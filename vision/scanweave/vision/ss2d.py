"""SS2D, VMamba's mixer of a grid of tokens: selective scans along several paths, added.

    u        = silu(conv(in_proj(x)))                         3 x 3, a filter a channel
    dt, B, C = x_proj_k u                                     direction k, token by token
    y        = sum_k scan_k(u, dt_proj_k dt, A_k, B, C, D_k)  along path k of the grid
    out      = out_proj(layer_norm(y) * gate)                 gate: none, silu(z) or z

Tokens stay in natural order throughout, channels last: no direction is copied. Letters: B batch,
(H, W) grid, L = H W tokens, D model channels, E inner channels, N state, R rank of dt, K
directions.

    GridPaths   the paths of one grid, shared by the layers that see it
    SS2D        the mixer

Paper: Liu et al. 2024, VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166.
"""
# timm.layers exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

import functools
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch._jit_internal import is_scripting

from scanweave.core import grid_paths, path_selective_scan

from .norms import LayerNorm, at_least_float32
from .scan_matrix import ScanMatrix

Gate = Literal["none", "silu", "linear"]
_GATES = ("none", "silu", "linear")


@functools.lru_cache(maxsize=64)
def _kept_paths(
    height: int, width: int, kind: str, window: tuple[int, int] | None, device: torch.device
) -> Tensor:
    """Paths of other grids than a model's own: one tensor each, so that it is checked once."""
    # autograd cannot save tensors made in inference mode
    with torch.inference_mode(False):
        return grid_paths(height, width, kind, window=window, device=device)


class GridPaths(nn.Module):
    """Paths through a grid; another grid's are made when they are asked for, and kept.

    Args:
        grid: Rows and columns of the grid, known beforehand so that compiled models hold the paths.
        kind: Kind of `scanweave.core.grid_paths`.
        window: Its window, for kind "window".
        device: Where they lie.

    Raises:
        ValueError: no such kind, or the window does not belong to it.
    """

    paths: Tensor

    def __init__(
        self,
        grid: tuple[int, int],
        kind: str = "cross",
        window: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.window = (window, window) if isinstance(window, int) else window
        self.grid = grid
        paths = grid_paths(grid[0], grid[1], kind, window=window, device=device)
        self.register_buffer("paths", paths, persistent=False)
        self.count = paths.shape[0]

    @torch.jit.unused
    def set_grid(self, grid: tuple[int, int]) -> None:
        """Hold the paths of another grid."""
        self.grid = grid
        self.paths = grid_paths(
            grid[0], grid[1], self.kind, window=self.window, device=self.paths.device
        )

    @torch.jit.unused
    def _other(self, height: int, width: int) -> Tensor:
        device = self.paths.device
        # what a tracer makes is no number and must not be kept
        if torch.compiler.is_compiling() or type(self.paths) is not Tensor:
            return grid_paths(height, width, self.kind, window=self.window, device=device)
        return _kept_paths(height, width, self.kind, self.window, device)

    def forward(self, height: int, width: int) -> Tensor:
        """Paths (K, height * width) int32."""
        if height == self.grid[0] and width == self.grid[1]:
            return self.paths
        if is_scripting():
            assert self.kind == "cross", "kind must be 'cross' for other sizes in TorchScript"
            tokens = torch.arange(height * width, device=self.paths.device).view(height, width)
            ways = torch.stack([tokens.flatten(), tokens.t().flatten()])
            return torch.cat([ways, ways.flip(1)])
        return self._other(height, width)


class SS2D(nn.Module):
    """The mixer, on a grid (B, H, W, D); parameter names are the official ones.

    Args:
        dim: Channels D.
        paths: Paths of the grid, shared with other layers or not.
        d_state: State size N.
        ssm_ratio: Inner channels E = ssm_ratio D.
        dt_rank: Rank R of the step sizes, ceil(D / 16) when None.
        d_conv: Side of the depthwise convolution, odd; below 2 there is none.
        conv_bias: Give it a bias.
        gate: "silu" (v0, v05), "linear" (v05_nozact) or "none" (v05_noz).
        norm_eps: Epsilon of the norm.
        device: Where the parameters are made.
        dtype: Of the parameters; A_logs and Ds keep at least float32.

    Raises:
        ValueError: a size is not positive, d_conv is even, or there is no such gate.
    """

    def __init__(
        self,
        dim: int,
        paths: GridPaths,
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
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = int(ssm_ratio * dim)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        for name, size in (("d_state", d_state), ("ssm_ratio * dim", inner), ("dt_rank", rank)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if d_conv > 1 and d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd, got {d_conv}")
        if gate not in _GATES:
            raise ValueError(f"gate must be one of {_GATES}, got {gate!r}")
        # decays keep float32 in a half precision model: log(16) in bfloat16 is off by 0.4 %
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        full: dict[str, Any] = {"device": device, "dtype": wide}
        count = paths.count
        self.inner, self.state, self.rank, self.count = inner, d_state, rank, count
        self.gate = gate
        self.paths = paths
        self.in_proj = nn.Linear(dim, inner if gate == "none" else 2 * inner, bias=False, **dd)
        self.conv2d = (
            nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner, bias=conv_bias, **dd)
            if d_conv > 1
            else None
        )
        self.x_proj_weight = nn.Parameter(torch.empty(count, rank + 2 * d_state, inner, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(count, inner, rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(count, inner, **dd))
        self.A_logs = nn.Parameter(torch.empty(count * inner, d_state, **full))
        self.Ds = nn.Parameter(torch.empty(count * inner, **full))
        self.out_norm = LayerNorm(inner, norm_eps, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self._reset_scan()

    @torch.jit.unused
    def _reset_scan(self) -> None:
        """Draw the scan's own parameters: decays 1 .. N, steps log-uniform in [0.001, 0.1]."""
        nn.init.uniform_(self.x_proj_weight, -(self.inner**-0.5), self.inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            low, high = math.log(1e-3), math.log(1e-1)
            dt = torch.empty_like(self.dt_projs_bias, dtype=torch.float32)
            dt = dt.uniform_(low, high).exp()
            # the inverse of softplus
            self.dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            rates = torch.arange(1, self.state + 1, device=self.A_logs.device)
            self.A_logs.copy_(rates.to(self.A_logs.dtype).log().expand_as(self.A_logs))
            self.Ds.fill_(1)

    @torch.jit.unused
    def reset_parameters(self) -> None:
        """Draw every parameter, as the official code of the released models does."""
        self._reset_scan()
        for linear in (self.in_proj, self.out_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        self.out_norm.reset_parameters()
        if self.conv2d is not None:
            self.conv2d.reset_parameters()

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Dt (B, L, K, E) before its bias, B and C (B, L, K, N), of tokens (B, L, E)."""
        low, state, count = self.rank, self.state, self.count
        # rows sorted by role instead of by direction: sorting the result would copy activations
        parts = self.x_proj_weight.split([low, state, state], 1)
        weight = torch.cat([part.flatten(0, 1) for part in parts])
        dt, B, C = F.linear(x, weight).split([count * low, count * state, count * state], -1)
        # one product with the directions' blocks on a diagonal gives dt where the scan wants it;
        # K small products would each have to be copied there
        eye = torch.eye(count, dtype=self.dt_projs_weight.dtype, device=x.device)
        blocks = self.dt_projs_weight.unsqueeze(2) * eye[:, None, :, None]
        dt = F.linear(dt, blocks.flatten(2).flatten(0, 1))
        return (
            dt.unflatten(-1, [count, self.inner]),
            B.unflatten(-1, [count, state]),
            C.unflatten(-1, [count, state]),
        )

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is scanned, (B, L, E), and what it is gated by, of a grid (B, H, W, D)."""
        u = self.in_proj(x)
        z = u
        if self.gate != "none":
            u, z = u.chunk(2, -1)
        if self.conv2d is not None:
            u = self.conv2d(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return F.silu(u).flatten(1, 2), z

    def forward(self, x: Tensor) -> Tensor:
        """Mix a grid (B, H, W, D) to one of the same shape."""
        height, width = x.shape[1], x.shape[2]
        u, z = self._inputs(x)
        dt, B, C = self._projected(u)
        A = -torch.exp(at_least_float32(self.A_logs)).view(self.count, self.inner, self.state)
        D = self.Ds.view(self.count, self.inner)
        bias = self.dt_projs_bias
        paths = self.paths(height, width)
        if is_scripting():
            y = _scan_in_steps(u, dt + bias, A, B, C, D, paths)
        else:
            y = path_selective_scan(u, dt, A, B, C, D, dt_bias=bias, paths=paths)
        y = self.out_norm(y.unflatten(1, [height, width]))
        if self.gate == "silu":
            y = y * F.silu(z)
        elif self.gate == "linear":
            y = y * z
        return self.out_proj(y)

    @torch.jit.unused
    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is scanned along every path, and the results: each (B, K E, H W, 1).

        Their K are added, normed and gated by the mixer; see `scanweave.core.Mixer.core`.
        """
        u = self._inputs(x)[0]
        dt, B, C = self._projected(u)
        A = -torch.exp(at_least_float32(self.A_logs)).view(self.count, self.inner, self.state)
        paths, D = self.paths(x.shape[1], x.shape[2]), self.Ds.view(self.count, self.inner)
        outputs = []
        for k in range(self.count):
            # one path at a time; a kept tensor of paths would be checked as a whole
            one = slice(k, k + 1)
            bias = self.dt_projs_bias[one]
            parts = (dt[:, :, one], A[one], B[:, :, one], C[:, :, one], D[one])
            y = path_selective_scan(u, *parts, dt_bias=bias, paths=paths[one].clone())
            outputs.append(y.transpose(1, 2).unsqueeze(-1))
        values = u.transpose(1, 2).unsqueeze(-1)
        return values.repeat(1, self.count, 1, 1), torch.cat(outputs, 1)

    @torch.jit.unused
    def _matrices(self, x: Tensor) -> list[ScanMatrix]:
        u = self._inputs(x)[0]
        dt, B, C = self._projected(u)
        A = -torch.exp(at_least_float32(self.A_logs)).view(self.count, self.inner, self.state)
        D = self.Ds.to(A.dtype).view(self.count, self.inner)
        delta = F.softplus((dt + self.dt_projs_bias).to(A.dtype))
        B, C = B.to(A.dtype), C.to(A.dtype)
        made = []
        for k, path in enumerate(self.paths(x.shape[1], x.shape[2]).long()):
            along = (delta[:, path, k], A[k], B[:, path, k], C[:, path, k], D[k])
            made.append(ScanMatrix(*along, place=path.argsort()))
        return made

    @torch.jit.unused
    def matrix(self, x: Tensor) -> Tensor:
        """(B, K E, H W, H W), which give `core`'s results of its values; see `Mixer.matrix`."""
        return torch.cat([m.whole() for m in self._matrices(x)], 1)

    @torch.jit.unused
    def matrix_size(self, x: Tensor) -> Tensor:
        """Mean over channels and paths of |matrix|, (B, H W, H W), in a K E-th of its memory."""
        return torch.stack([m.size() for m in self._matrices(x)]).mean(0)


def _scan_in_steps(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, paths: Tensor
) -> Tensor:
    """`path_selective_scan` in the part of Python that TorchScript knows, dt with its bias."""
    order = paths.long().t()  # (L, K)
    way = torch.arange(paths.shape[0], device=x.device)
    values = x.to(A.dtype)[:, order]  # (B, L, K, E)
    delta = F.softplus(dt.to(A.dtype))[:, order, way]
    inputs = B.to(A.dtype)[:, order, way].unsqueeze(3)  # (B, L, K, 1, N)
    reads = C.to(A.dtype)[:, order, way].unsqueeze(3)
    h = torch.zeros_like(delta[:, 0].unsqueeze(-1) * A)  # (B, K, E, N)
    ys: list[Tensor] = []
    for t in range(x.shape[1]):
        d = delta[:, t].unsqueeze(-1)
        h = torch.exp(d * A) * h + d * values[:, t].unsqueeze(-1) * inputs[:, t]
        ys.append((h * reads[:, t]).sum(-1))
    y = torch.stack(ys, 1) + D.to(A.dtype) * values
    out = torch.zeros_like(x, dtype=A.dtype).index_add(1, order.flatten(), y.flatten(1, 2))
    return out.to(x.dtype)


# a leaf for torch.fx: the scan checks shapes, which cannot be traced
register_notrace_module(SS2D)
