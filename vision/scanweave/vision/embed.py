"""Images to tokens: patches of any stride, a class token anywhere, positions for any grid.

Letters: B batch, L tokens, D channels, (h, w) grid of patches.

    PatchEmbed          convolution whose kernel and stride may differ; timm's attributes
    class_index         where the class token stands
    class_rows          where one or several class tokens stand
    insert_token        puts one token into a sequence
    insert_tokens       puts several there
    split_token         takes one token out of a sequence
    split_tokens        takes several out
    pool_tokens         a sequence to one vector: the class token, or the patches' mean or maximum
    resample_pos_embed  a position table for another grid, the class token's row kept apart
"""
# timm.layers exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import (
    global_pool_nlc,
    register_notrace_function,
    resample_abs_pos_embed,
    resample_patch_embed,
)
from torch import Tensor, _assert, nn
from torch._jit_internal import is_scripting

from scanweave.core.ops.checks import autocast_dtype, exporting, is_real

from .norms import is_watched

ClassPosition = Literal["middle", "first", "last"]


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, as integers."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be one or two positive integers, got {value}")
    return int(pair[0]), int(pair[1])


class PatchEmbed(nn.Module):
    """Cut an image (B, C, H, W) into patches and project each: (B, h * w, D).

    A stride below the patch size makes patches overlap (Vim's stride-8 models). The grid is
    `(size - patch_size) // stride + 1` along each side; what is left at the right and the bottom
    is not read, unless `dynamic_img_pad` pads it with zeros.

    Args:
        img_size: Height and width, or one number for both.
        patch_size: Kernel of the convolution.
        stride: Step from patch to patch; `patch_size` when None.
        in_chans: Image channels.
        embed_dim: Channels D.
        strict_img_size: Refuse every other image size in `forward`.
        dynamic_img_pad: Pad images of other sizes at the right and the bottom.
        device: Where the parameters are made.
        dtype: Type of the parameters.

    Raises:
        ValueError: a size is not positive, or the image is smaller than one patch.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        embed_dim: int = 768,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self._set_sizes(img_size, patch_size, patch_size if stride is None else stride)
        self.proj = nn.Conv2d(
            in_chans, embed_dim, self.patch_size, stride=self.stride, device=device, dtype=dtype
        )

    def _set_sizes(
        self,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        stride: int | tuple[int, int],
    ) -> None:
        self.img_size = _pair("img_size", img_size)
        self.patch_size = _pair("patch_size", patch_size)
        self.stride = _pair("stride", stride)
        if any(s < p for s, p in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(
                f"img_size must be at least patch_size {self.patch_size}, got {self.img_size}"
            )
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
    ) -> None:
        """Change image size, patch size or stride; the kernel is resampled, not drawn anew.

        Args:
            img_size: Height and width; unchanged when None.
            patch_size: Kernel; unchanged when None.
            stride: Step. When None it follows a new patch size if patches do not overlap, and
                stays as it is otherwise.
        """
        old_patch = self.patch_size
        if patch_size is None:
            patch_size = old_patch
        if stride is None:
            stride = patch_size if self.stride == old_patch else self.stride
        self._set_sizes(self.img_size if img_size is None else img_size, patch_size, stride)
        if self.patch_size != old_patch:
            # Conv2d keeps its kernel size beside the weight; both have to change
            weight = self.proj.weight
            self.proj.kernel_size = self.patch_size
            with torch.no_grad():
                kernel = resample_patch_embed(weight, list(self.patch_size), verbose=True)
            self.proj.weight = nn.Parameter(kernel, requires_grad=weight.requires_grad)
        self.proj.stride = self.stride

    def feat_ratio(self, as_scalar: bool = True) -> tuple[int, int] | int:
        """Image pixels per feature: the stride."""
        return max(self.stride) if as_scalar else self.stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid (h, w) of an image (H, W)."""
        high, wide = img_size[0] - self.patch_size[0], img_size[1] - self.patch_size[1]
        if self.dynamic_img_pad:
            high, wide = high + self.stride[0] - 1, wide + self.stride[1] - 1
        return high // self.stride[0] + 1, wide // self.stride[1] + 1

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """The grid (h, w) of images (B, C, H, W), which are checked to be such as are taken."""
        _assert(x.ndim == 4, "image must be (B, C, H, W)")
        height, width = x.shape[2], x.shape[3]
        patch, stride = self.patch_size, self.stride
        _assert(
            x.shape[1] == self.in_chans,
            f"image must have {self.in_chans} channels, got {x.shape[1]}; see in_chans",
        )
        if self.strict_img_size:
            _assert(
                height == self.img_size[0],
                f"image height must be {self.img_size[0]}, got {height}; "
                "see img_size, set_input_size and dynamic_img_size",
            )
            _assert(
                width == self.img_size[1],
                f"image width must be {self.img_size[1]}, got {width}; "
                "see img_size, set_input_size and dynamic_img_size",
            )
        else:
            _assert(height >= patch[0], f"image height must be >= {patch[0]}, got {height}")
            _assert(width >= patch[1], f"image width must be >= {patch[1]}, got {width}")
        if not self.strict_img_size and not self.dynamic_img_pad:
            _assert(
                (height - patch[0]) % stride[0] == 0,
                f"image height must be {patch[0]} + a multiple of {stride[0]}, got {height}; "
                "see dynamic_img_pad",
            )
            _assert(
                (width - patch[1]) % stride[1] == 0,
                f"image width must be {patch[1]} + a multiple of {stride[1]}, got {width}; "
                "see dynamic_img_pad",
            )
        return self.dynamic_feat_size((height, width))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, h * w, D), row by row, of an image (B, C, H, W)."""
        self.grid_of(x)
        if self.dynamic_img_pad:
            patch, stride = self.patch_size, self.stride
            bottom = (stride[0] - (x.shape[2] - patch[0]) % stride[0]) % stride[0]
            right = (stride[1] - (x.shape[3] - patch[1]) % stride[1]) % stride[1]
            x = F.pad(x, (0, right, 0, bottom))
        if not is_scripting():  # noqa: SIM102  (TorchScript leaves out a whole branch only)
            if self._as_product(x):
                return self._projected(x)
        return self.proj(x).flatten(2).transpose(1, 2)

    @torch.jit.unused
    def _as_product(self, x: Tensor) -> bool:
        """Whether to project by a matrix product: on a GPU, which has no fast convolution for this.

        128 images of 224 px: 0.8 ms on an H200, where the product and the copy before it need 0.1.
        """
        known = is_real(x) or (torch.compiler.is_compiling() and not exporting())
        return known and x.is_cuda and type(self.proj) is nn.Conv2d and not is_watched(self.proj)

    @torch.jit.unused
    def _projected(self, x: Tensor) -> Tensor:
        (high, wide), (down, right) = self.patch_size, self.stride
        patches = x.unfold(2, high, down).unfold(3, wide, right).permute(0, 2, 3, 1, 4, 5)
        # cut and rounded in one pass
        dtype = autocast_dtype(x) or x.dtype
        patches = patches.to(dtype, memory_format=torch.contiguous_format)
        return F.linear(
            patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias
        )


def class_index(num_patches: int, position: str) -> int:
    """Index of the class token among `num_patches` patches and itself."""
    if position == "middle":
        return num_patches // 2
    if position == "first":
        return 0
    return num_patches


def class_rows(num_patches: int, position: str, count: int) -> list[int]:
    """Places of `count` class tokens among `num_patches` patches and themselves, ascending.

    Several ("even") stand after every `num_patches // (count + 1)` patches.
    """
    if position == "even":
        step = num_patches // (count + 1)
        return [step * (i + 1) + i for i in range(count)]
    if count == 0:
        nowhere: list[int] = []
        return nowhere
    return [class_index(num_patches, position)]


def insert_tokens(x: Tensor, tokens: Tensor, rows: list[int]) -> Tensor:
    """Put `tokens` (1 or B, n, D) into `x` (B, L, D), at places `rows` of the result."""
    pieces: list[Tensor] = []
    start = 0
    for i, row in enumerate(rows):
        pieces.append(x[:, start : row - i])
        pieces.append(tokens[:, i : i + 1].expand(x.shape[0], -1, -1))
        start = row - i
    pieces.append(x[:, start:])
    return torch.cat(pieces, dim=1)


def split_tokens(x: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Tokens (B, n, D) at places `rows` of `x` (B, L, D), and the others (B, L - n, D)."""
    tokens: list[Tensor] = []
    rest: list[Tensor] = []
    start = 0
    for row in rows:
        rest.append(x[:, start:row])
        tokens.append(x[:, row : row + 1])
        start = row + 1
    rest.append(x[:, start:])
    return torch.cat(tokens, dim=1), torch.cat(rest, dim=1)


def insert_token(x: Tensor, token: Tensor, index: int) -> Tensor:
    """Put `token` (1 or B, 1, D) before place `index` of `x` (B, L, D)."""
    return torch.cat([x[:, :index], token.expand(x.shape[0], -1, -1), x[:, index:]], dim=1)


def split_token(x: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Token (B, 1, D) at place `index` of `x` (B, L, D), and the others (B, L - 1, D)."""
    return x[:, index : index + 1], torch.cat([x[:, :index], x[:, index + 1 :]], dim=1)


def pool_tokens(x: Tensor, pool: str, class_position: str, count: int = 1) -> Tensor:
    """Reduce tokens (B, L, D) to (B, D); "token" with several class tokens to (B, count, D).

    Args:
        x: Tokens, the class token among them.
        pool: "token" for the class token, "avg", "max" or "avgmax" for the others, "" for `x`.
        class_position: Where class tokens stand; "" without any.
        count: Class tokens.
    """
    if pool == "" or class_position == "":
        return global_pool_nlc(x, pool, num_prefix_tokens=0)
    tokens, patches = split_tokens(x, class_rows(x.shape[1] - count, class_position, count))
    if pool == "token":
        return tokens if count > 1 else tokens[:, 0]
    return global_pool_nlc(patches, pool, num_prefix_tokens=0)


# a leaf for torch.fx: which branch is taken depends on sizes
@torch.fx.wrap
@register_notrace_function
def resample_pos_embed(
    pos_embed: Tensor,
    new_grid: list[int],
    old_grid: list[int],
    class_position: str,
    antialias: bool = True,
    official: bool = False,
) -> Tensor:
    """Interpolate a position table to another grid; the class token's row moves, unchanged.

    Args:
        pos_embed: Table, (1, h * w, D), or (1, h * w + 1, D) with a class token.
        new_grid: (h, w) wanted.
        old_grid: (h, w) of the table.
        class_position: Where the class token stands ("middle", "first", "last"); "" without one.
        antialias: Filter when the grid shrinks; the official resize does not.
        official: Resize as Vim's code does: row 0 is taken for the class token's wherever that
            stands, nothing is filtered.

    Returns:
        Table for the new grid, same dtype.

    Source: bicubic as in timm; that the middle row is not part of the grid is where the
        official resize differs, see README, difference 4.
    """
    if official:
        antialias = False
    if class_position == "" or official:
        return resample_abs_pos_embed(
            pos_embed,
            new_grid,
            old_grid,
            num_prefix_tokens=0 if class_position == "" else 1,
            antialias=antialias,
        )
    row, patches = split_token(pos_embed, class_index(pos_embed.shape[1] - 1, class_position))
    patches = resample_abs_pos_embed(
        patches, new_grid, old_grid, num_prefix_tokens=0, antialias=antialias
    )
    return insert_token(patches, row, class_index(patches.shape[1], class_position))
