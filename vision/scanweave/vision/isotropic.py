"""Models of one width throughout: patches, a class token, a stack of mixer layers, a head.

What every such family shares, written to timm's contract for models, together with `tokens.py`.
A family is a subclass in its own file, with its `checkpoint_filter_fn`, configurations and entry
points: see `vim.py`.

    IsotropicModel   image -> features -> logits, around any registered mixer
"""
# timm.layers exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from timm.layers import lecun_normal_, trunc_normal_
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from .block import MixerBlock, is_scripting
from .embed import ClassPosition, PatchEmbed, class_rows, insert_tokens, resample_pos_embed
from .local import LocalMamba
from .norms import RmsNorm, add_and_norm, at_least_float32
from .paths import dynamic_orders, token_orders
from .rotary import RotaryPositions
from .tokens import TokenModel


def _check_directions(layers: int, depth: int, mixer: str, path: str, dynamic: bool) -> None:
    if layers != depth:
        raise ValueError(f"directions must have one entry a layer, {depth}, got {layers}")
    if mixer != "bimamba" or path != "raster":
        raise ValueError(
            "mixer and path must be left out with directions, which bring their own, "
            f"got {mixer!r} and {path!r}"
        )
    if dynamic:
        raise ValueError("dynamic_img_size must be False with directions; use set_input_size")


class IsotropicModel(TokenModel):
    """One stack of mixers over patches and a class token.

    Every argument can be given to `timm.create_model`. Shapes: image (B, in_chans, H, W),
    features (B, L, embed_dim) with L = h * w + 1, logits (B, num_classes).

    Args:
        img_size: Image height and width, or one number; fixed unless `dynamic_img_size`.
        patch_size: Patch side.
        stride: Step between patches; `patch_size` when None, below it patches overlap.
        in_chans: Image channels.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: "token" (class token), "avg", "max", "avgmax" (patches), "" (no pooling).
        embed_dim: Channels D.
        depth: Layers.
        d_state, d_conv, expand, dt_rank: Given to the mixer; its own defaults when None.
        mixer: Name of a registered mixer; a causal one sees what comes earlier on its path.
        mixer_args: Further arguments of the mixer.
        path: Order in which layers read the patches, a kind of `scanweave.core.grid_paths`;
            kinds with K directions take turns, layer i reads direction i mod K.
        window: Window of the path "window", (rows, columns) or one number.
        directions: LocalMamba's mixer in the place of `mixer`: for every layer the names of its
            scans, see `local_order`; sizes then change by `set_input_size` only.
        mlp_ratio: Hidden channels of an MLP after every mixer, in units of D; 0 for no MLP.
        class_token: Use a class token.
        class_token_pos: Where it stands: "middle", "first" or "last".
        registers: Class tokens, evenly among the patches, if more than one (Mamba-Reg). They have
            positions of their own; the pool "token" joins them all, or averages them in a
            model made without classes.
        register_reduce: What every register's channels are divided by before they are joined.
        pos_embed: "learn", or "none" for no position table.
        rope: Also rotate the patches by their place before every layer (LocalVim); without class
            tokens, and sizes then change by `set_input_size` only.
        official_pos_resize: Resize positions as Vim's code does, which takes the first patch's
            position for the class token's; see `resample_pos_embed`.
        dynamic_img_size: Take any image size; positions are interpolated in `forward`.
        dynamic_img_pad: Pad images that the stride does not divide.
        residual_in_fp32: Keep the residual stream in float32 in 16-bit models and autocast.
        norm_eps: Epsilon of the norms.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the positions are added.
        drop_path_rate: Rate at which the last layer is dropped; it rises linearly from 0.
        official_init: Start as the official code where ours is meant to be better: bimamba's
            backward direction with all step sizes 0.69.
        device: Where the parameters are made.
        dtype: Type of the parameters.

    Raises:
        ValueError: an argument has no meaning, alone or with the others.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "token", "avg", "max", "avgmax"] = "token",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int | None = None,
        d_conv: int | None = None,
        expand: float | None = None,
        dt_rank: int | str | None = None,
        mixer: str = "bimamba",
        mixer_args: Mapping[str, Any] | None = None,
        path: str = "raster",
        window: int | tuple[int, int] | None = None,
        directions: Sequence[Sequence[str]] | None = None,
        mlp_ratio: float = 0.0,
        class_token: bool = True,
        class_token_pos: ClassPosition = "middle",
        registers: int = 0,
        register_reduce: int = 1,
        pos_embed: Literal["learn", "none"] = "learn",
        rope: bool = False,
        official_pos_resize: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        residual_in_fp32: bool = True,
        norm_eps: float = 1e-5,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        official_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if class_token_pos not in ("middle", "first", "last"):
            raise ValueError(
                f"class_token_pos must be 'middle', 'first' or 'last', got {class_token_pos!r}"
            )
        if pos_embed not in ("learn", "none"):
            raise ValueError(f"pos_embed must be 'learn' or 'none', got {pos_embed!r}")
        if rope and (class_token or dynamic_img_size):
            raise ValueError(
                "rope must be without class_token and dynamic_img_size, "
                f"got {class_token} and {dynamic_img_size}"
            )
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if mlp_ratio < 0:
            raise ValueError(f"mlp_ratio must be at least 0, got {mlp_ratio}")
        if registers < 0 or registers == 1 or (registers and not class_token):
            raise ValueError(
                "registers must be 0, or at least 2 with class_token=True, "
                f"got {registers} with class_token={class_token}"
            )
        if register_reduce < 1 or embed_dim % register_reduce:
            raise ValueError(
                f"register_reduce must divide embed_dim {embed_dim}, got {register_reduce}"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        # timm's name; these tokens stand where class_position says, not before the patches
        self.num_prefix_tokens = registers or (1 if class_token else 0)
        self.class_position: str = class_token_pos if class_token else ""
        # the table of positions has rows for class tokens, except for registers
        self.table_position = self.class_position
        if registers:
            self.class_position, self.table_position = "even", ""
        self.register_reduce, self.norm_eps = register_reduce, norm_eps
        self.global_pool = self._checked_pool(global_pool)
        self.official_pos_resize = official_pos_resize
        self.dynamic_img_size = dynamic_img_size
        self.residual_in_fp32 = residual_in_fp32
        self.official_init = official_init
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            stride,
            in_chans,
            embed_dim,
            strict_img_size=not dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            **dd,
        )
        rows = self.patch_embed.num_patches + (1 if self.table_position else 0)
        count = self.num_prefix_tokens
        self.cls_token = (
            nn.Parameter(torch.empty(1, count, embed_dim, **dd)) if class_token else None
        )
        self.pos_embed_cls = (
            nn.Parameter(torch.empty(1, count, embed_dim, **dd))
            if registers and pos_embed == "learn"
            else None
        )
        self.pos_embed = (
            nn.Parameter(torch.empty(1, rows, embed_dim, **dd)) if pos_embed == "learn" else None
        )
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.has_rope = rope
        grid = self.patch_embed.grid_size
        self.rope = RotaryPositions(embed_dim, grid, device) if rope else nn.Identity()

        if directions is not None:
            _check_directions(len(directions), depth, mixer, path, dynamic_img_size)
        own = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank}
        config = {k: v for k, v in own.items() if v is not None} | dict(mixer_args or {})
        self.path, self.window = path, window
        self.register_buffer("orders", self._new_orders(device), persistent=False)
        # on the CPU whatever the default device: meta has no values
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        if directions is None:
            mixers: list[str | nn.Module] = [mixer] * depth
        else:
            mixers = [LocalMamba(embed_dim, names, **config, **dd) for names in directions]
        self.layers = nn.Sequential(
            *(
                MixerBlock(embed_dim, kind, config, norm_eps, rate, mlp_ratio, **dd)
                for kind, rate in zip(mixers, rates, strict=True)
            )
        )
        self._set_grids()
        self.norm_f = RmsNorm(embed_dim, norm_eps, False, **dd)
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction}
            for i in range(depth)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self._make_neck(num_classes > 0, **dd)
        width = self.head_hidden_size
        self.head = nn.Linear(width, num_classes, **dd) if num_classes > 0 else nn.Identity()

        # the marks on the parameters are lost by copies and `to_empty`, their names are not
        marked = (n for n, p in self.named_parameters() if getattr(p, "_no_weight_decay", False))
        self._no_decay = frozenset(marked) | {"pos_embed", "cls_token", "pos_embed_cls"}
        self.init_weights(needs_reset=False)

    @torch.jit.unused
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw every parameter; also what makes a model usable after `to_empty`.

        Args:
            needs_reset: Also draw what the layers drew when they were made.

        Source: official code as numbered in README; mixers start as in mamba_ssm, `out_proj`
            divided by sqrt(depth).
        """
        lecun_normal_(self.patch_embed.proj.weight)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        for table in (self.pos_embed, self.cls_token, self.pos_embed_cls):
            if table is not None:
                trunc_normal_(table, std=0.02)
        if self.orders is not None:
            self.orders = self._new_orders(self.orders.device)
        self._set_grids()
        for layer in self.layers:
            assert isinstance(layer, MixerBlock)
            layer.init_weights(len(self.layers), self.official_init, needs_reset)
        if isinstance(self.norm_f, RmsNorm):
            self.norm_f.reset_parameters()
        if isinstance(self.neck, nn.Linear):
            trunc_normal_(self.neck.weight, std=0.02)
        if isinstance(self.norm_neck, RmsNorm):
            self.norm_neck.reset_parameters()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.unused
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
    ) -> None:
        """Change image size, patch size or stride; positions and kernel are interpolated.

        Args:
            img_size: Image height and width; unchanged when None.
            patch_size: Patch side; unchanged when None.
            stride: Step between patches; when None it follows `patch_size` where they are equal.
        """
        embed = self.patch_embed
        old_grid = embed.grid_size
        embed.set_input_size(img_size, patch_size, stride)
        if self.pos_embed is not None and embed.grid_size != old_grid:
            with torch.no_grad():
                table = resample_pos_embed(
                    self.pos_embed,
                    list(embed.grid_size),
                    list(old_grid),
                    self.table_position,
                    official=self.official_pos_resize,
                )
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        if self.orders is not None:
            self.orders = self._new_orders(self.orders.device)
        self._set_grids()
        for info in self.feature_info:
            info["reduction"] = embed.feat_ratio()
        sizes = {"patch_size": embed.patch_size, "stride": embed.stride}
        update_model_input_size(self, embed.img_size, **sizes)

    @torch.jit.unused
    def _set_grids(self) -> None:
        """Tell what knows of the grid what it is."""
        if isinstance(self.rope, RotaryPositions):
            self.rope.set_grid(self.patch_embed.grid_size)
        for layer in self.layers:
            if isinstance(layer, MixerBlock) and isinstance(layer.mixer, LocalMamba):
                layer.mixer.set_grid(self.patch_embed.grid_size, self._class_rows())

    @torch.jit.unused
    def _class_rows(self) -> tuple[int, ...]:
        patches = self.patch_embed.num_patches
        return tuple(class_rows(patches, self.class_position, self.num_prefix_tokens))

    @torch.jit.unused
    def _new_orders(self, device: torch.device | str | None) -> Tensor | None:
        """Orders of `img_size`, (2, K, L), see `token_orders`."""
        embed = self.patch_embed
        orders = token_orders(embed.grid_size, self.path, self.window, self._class_rows())
        # a copy: the orders are cached, and models may be moved or emptied
        return orders if orders is None else orders.to(device, copy=True)

    @torch.jit.unused
    def _window(self) -> list[int]:
        if self.window is None:
            return []
        return [self.window] * 2 if isinstance(self.window, int) else list(self.window)

    def _orders(self, height: int, width: int) -> Tensor | None:
        """Orders for a grid of patches; scripted models know only that of `img_size`."""
        orders = self.orders
        if orders is not None and self.dynamic_img_size and not is_scripting():
            return dynamic_orders(
                orders,
                height,
                width,
                self.path,
                self._window(),
                self.class_position,
                self.num_prefix_tokens,
            )
        return orders

    def _embed(self, x: Tensor) -> Tensor:
        """Patches, class tokens and positions: the residual stream (B, L, D) before layer 0."""
        table = self.pos_embed
        if table is not None and self.dynamic_img_size:
            grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
            own = self.patch_embed.grid_size
            table = resample_pos_embed(
                table,
                [grid[0], grid[1]],
                [own[0], own[1]],
                self.table_position,
                official=self.official_pos_resize,
            )
        x = self.patch_embed(x)
        if table is not None and self.table_position == "":
            x = x + table
        if self.cls_token is not None:
            tokens = self.cls_token
            if self.pos_embed_cls is not None:
                tokens = tokens + self.pos_embed_cls
            count = self.num_prefix_tokens
            x = insert_tokens(x, tokens, class_rows(x.shape[1], self.class_position, count))
        if table is not None and self.table_position != "":
            x = x + table
        if self.residual_in_fp32:
            x = at_least_float32(x)
        return self.pos_drop(x)

    def _normed(self, x: Tensor, pending: Tensor | None = None) -> Tensor:
        if is_scripting() or pending is None:
            x = self.norm_f(x)
        else:
            x = add_and_norm(x, pending, self.norm_f)[1]
        # also after pruning, when norm_f is an identity, features leave in the model's dtype
        return x.to(self.patch_embed.proj.weight.dtype)
