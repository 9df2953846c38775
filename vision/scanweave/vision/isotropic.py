"""Models of one width throughout: patches, a class token, a stack of mixer layers, a head.

What every such family shares, written to timm's contract for models. A family is a subclass in
its own file, with its `checkpoint_filter_fn`, configurations and entry points: see `vim.py`.

    IsotropicModel   image -> features -> logits, around any registered mixer
"""
# timm.layers exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

from collections.abc import Mapping
from typing import Any, Literal

import torch
from timm.layers import (
    get_device_dtype,
    lecun_normal_,
    trunc_normal_,
)
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from .block import MixerBlock, RmsNorm, at_least_float32, is_scripting
from .embed import (
    ClassPosition,
    PatchEmbed,
    class_index,
    insert_token,
    pool_tokens,
    resample_pos_embed,
    split_token,
)

_POOLS = ("", "token", "avg", "max", "avgmax")


class IsotropicModel(nn.Module):
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
        mixer: Name of a registered mixer, non-causal ones make sense.
        mixer_args: Further arguments of the mixer.
        class_token: Use a class token.
        class_token_pos: Where it stands: "middle", "first" or "last".
        pos_embed: "learn", or "none" for no position table.
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
        class_token: bool = True,
        class_token_pos: ClassPosition = "middle",
        pos_embed: Literal["learn", "none"] = "learn",
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
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        # timm's name; the one token stands where class_position says, not before the patches
        self.num_prefix_tokens = 1 if class_token else 0
        self.class_position = class_token_pos if class_token else ""
        self.global_pool = self._checked_pool(global_pool)
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
        rows = self.patch_embed.num_patches + self.num_prefix_tokens
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.pos_embed = (
            nn.Parameter(torch.empty(1, rows, embed_dim, **dd)) if pos_embed == "learn" else None
        )
        self.pos_drop = nn.Dropout(pos_drop_rate)

        own = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank}
        config = {k: v for k, v in own.items() if v is not None} | dict(mixer_args or {})
        # on the CPU whatever the default device: meta has no values
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.layers = nn.Sequential(
            *(MixerBlock(embed_dim, mixer, config, norm_eps, rate, **dd) for rate in rates)
        )
        self.norm_f = RmsNorm(embed_dim, eps=norm_eps, **dd)
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction}
            for i in range(depth)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

        # the marks on the parameters are lost by copies and `to_empty`, their names are not
        marked = (n for n, p in self.named_parameters() if getattr(p, "_no_weight_decay", False))
        self._no_decay = frozenset(marked) | {"pos_embed", "cls_token"}
        self.init_weights(needs_reset=False)

    def _checked_pool(self, global_pool: str) -> str:
        if global_pool not in _POOLS:
            raise ValueError(f"global_pool must be one of {_POOLS}, got {global_pool!r}")
        if global_pool == "token" and not self.class_position:
            raise ValueError("global_pool must be 'avg', 'max', 'avgmax' or '' without class_token")
        return global_pool

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
        for table in (self.pos_embed, self.cls_token):
            if table is not None:
                trunc_normal_(table, std=0.02)
        for layer in self.layers:
            assert isinstance(layer, MixerBlock)
            layer.init_weights(len(self.layers), self.official_init, needs_reset)
        if isinstance(self.norm_f, RmsNorm):
            self.norm_f.reset_parameters()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.unused
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: positions, class token, and what the mixers mark."""
        return {n for n, _ in self.named_parameters() if n in self._no_decay}

    @torch.jit.unused
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, for layer-wise rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    @torch.jit.unused
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.unused
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    @torch.jit.unused
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by an untrained one.

        Args:
            num_classes: Classes; 0 for none.
            global_pool: Pooling, as in the constructor; unchanged when None.
        """
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        dd: dict[str, Any] = get_device_dtype(self)
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes else nn.Identity()
        self.head.train(self.training)

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
                    self.pos_embed, list(embed.grid_size), list(old_grid), self.class_position
                )
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        for info in self.feature_info:
            info["reduction"] = embed.feat_ratio()
        sizes = {"patch_size": embed.patch_size, "stride": embed.stride}
        update_model_input_size(self, embed.img_size, **sizes)

    def _embed(self, x: Tensor) -> Tensor:
        """Patches, class token and positions: the residual stream (B, L, D) before layer 0."""
        grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = insert_token(x, self.cls_token, class_index(x.shape[1], self.class_position))
        if self.pos_embed is not None:
            if self.dynamic_img_size:
                x = x + resample_pos_embed(
                    self.pos_embed,
                    [grid[0], grid[1]],
                    [self.patch_embed.grid_size[0], self.patch_embed.grid_size[1]],
                    self.class_position,
                )
            else:
                x = x + self.pos_embed
        if self.residual_in_fp32:
            x = at_least_float32(x)
        return self.pos_drop(x)

    def _normed(self, x: Tensor) -> Tensor:
        # also after pruning, when norm_f is an identity, features leave in the model's dtype
        return self.norm_f(x).to(self.patch_embed.proj.weight.dtype)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features and the streams after some layers.

        Args:
            x: Image, (B, C, H, W).
            indices: Last n layers, listed layers, or all.
            return_prefix_tokens: Pair every intermediate with its class token (B, 1, D).
            norm: Apply the final norm to intermediates.
            stop_early: Run no layer after the last one asked for.
            output_fmt: "NCHW" for (B, D, h, w), "NLC" for (B, h * w, D).
            intermediates_only: Return intermediates alone.

        Returns:
            Features (B, L, D) and intermediates, or intermediates.

        Raises:
            ValueError: `output_fmt` is neither "NCHW" nor "NLC".
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt}")
        take, last = feature_take_indices(len(self.layers), indices)
        batch = x.shape[0]
        grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        x = self._embed(x)
        # TorchScript cannot slice modules
        if is_scripting() or not stop_early:  # noqa: SIM108
            layers = self.layers
        else:
            layers = self.layers[: last + 1]
        streams: list[Tensor] = []
        for i, layer in enumerate(layers):
            if self.grad_checkpointing and not is_scripting():  # noqa: SIM108
                x = checkpoint(layer, x)
            else:
                x = layer(x)
            if i in take:
                streams.append(
                    self._normed(x) if norm else x.to(self.patch_embed.proj.weight.dtype)
                )

        prefix: list[Tensor] = []
        if self.cls_token is not None:
            row = class_index(x.shape[1] - 1, self.class_position)
            pairs = [split_token(y, row) for y in streams]
            prefix = [pair[0] for pair in pairs]
            streams = [pair[1] for pair in pairs]
        if output_fmt == "NCHW":
            streams = [
                y.reshape(batch, grid[0], grid[1], -1).permute(0, 3, 1, 2).contiguous()
                for y in streams
            ]
        if not is_scripting() and return_prefix_tokens and prefix:
            streams = list(zip(streams, prefix, strict=True))  # type: ignore[assignment]
        if intermediates_only:
            return streams
        return self._normed(x), streams

    @torch.jit.unused
    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Cut the layers after the last one asked for; the rest still runs.

        Args:
            indices: Last n layers, or listed layers.
            prune_norm: Also cut the final norm.
            prune_head: Also cut pooling and classifier.

        Returns:
            The layers asked for, counted from 0.
        """
        take, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Normed features (B, L, D), the class token among them, of images (B, C, H, W)."""
        x = self._embed(x)
        if self.grad_checkpointing and not is_scripting():
            x = checkpoint_seq(self.layers, x)
        else:
            x = self.layers(x)
        return self._normed(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Features (B, L, D) to (B, D), or as they are for ""."""
        kind = self.global_pool if pool_type is None else pool_type
        return pool_tokens(x, kind, self.class_position)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, drop, classify; `pre_logits` leaves the classifier out."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        return self.forward_head(self.forward_features(x))
