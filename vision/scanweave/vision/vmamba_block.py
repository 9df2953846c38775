"""What VMamba is made of around SS2D: blocks, stages, stems, downsampling, classifier.

    x <- x + drop_path(ss2d(layer_norm(x)))
    x <- x + drop_path(mlp(layer_norm(x)))      absent where mlp_ratio is 0

Grids are channels last, (B, H, W, D), from the stem to the last norm: every norm and projection
reads what lies together, and the official channels-first models compute the same numbers.

    VSSBlock     the block
    Stage        blocks on one grid, then downsampling
    make_stem    image (B, C, H, W) to a grid of a quarter of its size
    Classifier   norm, pooling, linear layer

Paper: Liu et al. 2024, VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166.
"""
# timm.layers exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, SelectAdaptivePool2d
from torch import Tensor, nn
from torch._jit_internal import is_scripting

from scanweave.core.ops.norm.cast import runs_kernels

from .local_ss2d import LocalPaths, LocalSS2D
from .norms import LayerNorm, add_and_norm, chained
from .ss2d import SS2D, GridPaths

StemVersion = Literal["v1", "v2"]
DownsampleVersion = Literal["v1", "v2", "v3"]
POOLS = ("", "avg", "max", "avgmax", "catavgmax")


class _ToLast(nn.Module):
    """(B, C, H, W) to (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class _ToFirst(nn.Module):
    """(B, H, W, C) to (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class _PatchMerging(nn.Module):
    """Downsampling v1: four neighbours beside one another, a norm, a linear layer.

    An odd side is padded with zeros at its end.
    """

    def __init__(self, dim: int, out_dim: int, norm_eps: float, **dd: Any) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * dim, norm_eps, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        left, right = x[:, :, 0::2], x[:, :, 1::2]
        x = torch.cat([left[:, 0::2], left[:, 1::2], right[:, 0::2], right[:, 1::2]], -1)
        return self.reduction(self.norm(x))


def make_stem(
    version: StemVersion, in_chans: int, dim: int, norm_eps: float, **dd: Any
) -> nn.Sequential:
    """Image (B, C, H, W) to a grid (B, h, w, D), with the official indices.

    v1: one convolution of side 4 and stride 4, h = H // 4. v2: two of side 3 and stride 2,
    h = ceil(H / 4).
    """
    if version == "v1":
        conv = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        return nn.Sequential(conv, _ToLast(), LayerNorm(dim, norm_eps, False, **dd))
    if version != "v2":
        raise ValueError(f"stem must be 'v1' or 'v2', got {version!r}")
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
        _ToLast(),
        LayerNorm(dim // 2, norm_eps, **dd),
        _ToFirst(),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        _ToLast(),
        LayerNorm(dim, norm_eps, False, **dd),
    )


def make_downsample(
    version: DownsampleVersion, dim: int, out_dim: int, norm_eps: float, **dd: Any
) -> nn.Module:
    """Grid (B, h, w, D) to one of half its sides, with the official indices.

    v1: patch merging. v2: a convolution of side 2, which drops the end of an odd side. v3: one of
    side 3.
    """
    if version == "v1":
        return _PatchMerging(dim, out_dim, norm_eps, **dd)
    if version not in ("v2", "v3"):
        raise ValueError(f"downsample must be 'v1', 'v2' or 'v3', got {version!r}")
    side = 2 if version == "v2" else 3
    conv = nn.Conv2d(dim, out_dim, side, stride=2, padding=side // 2 if side == 3 else 0, **dd)
    return nn.Sequential(_ToFirst(), conv, _ToLast(), LayerNorm(out_dim, norm_eps, False, **dd))


def stem_grid(version: str, img_size: tuple[int, int]) -> tuple[int, int]:
    """Grid (h, w) that `make_stem` gives for an image (H, W)."""
    if version == "v1":
        return img_size[0] // 4, img_size[1] // 4
    return -(-img_size[0] // 4), -(-img_size[1] // 4)


def halved_grid(version: str, grid: tuple[int, int]) -> tuple[int, int]:
    """Grid (h, w) that `make_downsample` gives for a grid."""
    if version == "v2":
        return grid[0] // 2, grid[1] // 2
    return -(-grid[0] // 2), -(-grid[1] // 2)


class VSSBlock(nn.Module):
    """Mixer and MLP on a residual stream (B, H, W, D).

    Args:
        dim: Channels D.
        paths: Paths of the grid; LocalMamba's mixer follows `LocalPaths`.
        mixer_args: Arguments of `SS2D`.
        mlp_ratio: Hidden channels of the MLP over D; 0 for none.
        drop_path: Probability that a sample skips a branch in training.
        norm_eps: Epsilon of the norms.
        device: Where the parameters are made.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        paths: GridPaths,
        mixer_args: Mapping[str, Any],
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, norm_eps, **dd)
        given = {**mixer_args, "norm_eps": norm_eps, **dd}
        if isinstance(paths, LocalPaths):
            self.op: SS2D = LocalSS2D(dim, paths, **given)
        else:
            self.op = SS2D(dim, paths, **given)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        has_mlp = mlp_ratio > 0
        self.norm2 = LayerNorm(dim, norm_eps, **dd) if has_mlp else None
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd) if has_mlp else None

    def forward(self, x: Tensor) -> Tensor:
        """The stream after this block, (B, H, W, D)."""
        x, y = self.with_branch(x, None)
        return x + y

    def with_branch(self, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream and what is still to be added to it, of the same two before this block."""
        if is_scripting() or pending is None:
            y = self.norm(x)
        else:
            x, y = add_and_norm(x, pending, self.norm)
        y = self.drop_path(self.op(y))
        if self.norm2 is not None and self.mlp is not None:
            if is_scripting():
                x = x + y
                y = self.norm2(x)
            else:
                x, y = add_and_norm(x, y, self.norm2)
            y = self.drop_path(self.mlp(y))
        return x, y


class _Blocks(nn.Sequential):
    """Blocks one after the other; on a GPU a block's sum is the next one's to make, in its norm."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if not is_scripting():  # noqa: SIM102  (TorchScript leaves out a whole branch only)
            if runs_kernels(x):
                return _all_chained(self, x)
        for block in self:
            x = block(x)
        return x


def _all_chained(blocks: nn.Sequential, x: Tensor) -> Tensor:
    pending: Tensor | None = None
    for block in blocks:
        x, pending = chained(block, type(block) is VSSBlock, x, pending)
    return x if pending is None else x + pending


class Stage(nn.Module):
    """Blocks on one grid, then downsampling; features are taken in between."""

    def __init__(self, blocks: list[VSSBlock], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = _Blocks(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Grid (B, h, w, D) to the next stage's, (B, ceil(h / 2), ceil(w / 2), D')."""
        return self.downsample(self.blocks(x))


class Classifier(nn.Module):
    """Last norm, pooling, linear layer; the model applies the norm, before anything is pooled.

    Args:
        dim: Channels D.
        num_classes: Classes; 0 for no linear layer.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" (every place is classified).
        drop_rate: Dropout before the linear layer.
        norm_eps: Epsilon of the norm.
        device: Where the parameters are made.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm: nn.Module = LayerNorm(dim, norm_eps, False, device, dtype)
        self.drop = nn.Dropout(drop_rate)
        self.reset(dim, num_classes, global_pool, device, dtype)

    @torch.jit.unused
    def reset(
        self,
        dim: int,
        num_classes: int,
        global_pool: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Replace pooling and linear layer.

        Raises:
            ValueError: no such pooling.
        """
        if global_pool not in POOLS:
            raise ValueError(f"global_pool must be one of {POOLS}, got {global_pool!r}")
        self.pool_type = global_pool
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.features = dim * self.global_pool.feat_mult()
        self.head = (
            nn.Linear(self.features, num_classes, device=device, dtype=dtype)
            if num_classes
            else nn.Identity()
        )
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes) of normed features (B, D, h, w); vectors if `pre_logits`.

        Without pooling both keep their (h, w).
        """
        x = self.drop(self.global_pool(x))
        if pre_logits:
            return x
        if self.pool_type == "":
            return self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x)
