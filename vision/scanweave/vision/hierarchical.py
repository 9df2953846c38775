"""Models of stages on ever smaller grids: a stem, SS2D blocks, downsampling, a head.

Written to timm's contract for models. A family is a subclass in its own file, with its
`checkpoint_filter_fn`, configurations and entry points: see `vmamba.py`.

    HierarchicalModel   image -> features -> logits
"""
# timm.layers exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, _assert, nn
from torch._jit_internal import is_scripting

from .embed import _pair
from .local_ss2d import LocalPaths
from .ss2d import SS2D, Gate, GridPaths
from .vmamba_block import (
    Classifier,
    DownsampleVersion,
    Stage,
    StemVersion,
    VSSBlock,
    halved_grid,
    make_downsample,
    make_stem,
    stem_grid,
)


def _check_directions(blocks: int, depth: int, path: str, window: object) -> None:
    if blocks != depth:
        raise ValueError(f"directions must have one entry a block, {depth}, got {blocks}")
    if path != "cross" or window is not None:
        raise ValueError(
            "path and window must be left out with directions, which bring their own, "
            f"got {path!r} and {window}"
        )


class HierarchicalModel(nn.Module):
    """Stages of SS2D blocks; any image size, also one that no stride divides.

    Every argument can be given to `timm.create_model`. Shapes: image (B, in_chans, H, W),
    features (B, D, h, w) at 1/32 of the size, logits (B, num_classes).

    Args:
        img_size: Image size whose scan paths are kept with the model; others are made when met.
        in_chans: Image channels.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" (logits at every place).
        depths: Blocks of each stage.
        dims: Channels of each stage, or of the first, doubled from stage to stage.
        d_state: State size N.
        ssm_ratio: Inner channels of the mixer over its channels.
        dt_rank: Rank of the step sizes; channels / 16, rounded up, when None.
        d_conv: Side of the mixer's depthwise convolution; below 2 there is none.
        conv_bias: Give it a bias.
        gate: "none" (released v2 models), "silu" (v0) or "linear".
        path: Scan paths, a kind of `scanweave.core.grid_paths`.
        window: Window of path "window", a side or height and width.
        directions: LocalMamba's mixer in the place of SS2D: for every block the names of its
            scans, see `local_order`; path and window are then left out.
        mlp_ratio: Hidden channels of the MLP over the channels; 0 for none.
        stem: "v1" (one convolution) or "v2" (two).
        downsample: "v1" (patch merging), "v2" (2 x 2) or "v3" (3 x 3 convolution).
        norm_eps: Epsilon of the norms.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate at which the last block's branches drop; it rises linearly from 0.
        device: Where the parameters are made.
        dtype: Type of the parameters; decays and skip weights keep at least float32.

    Raises:
        ValueError: an argument has no meaning, alone or with the others.
    """

    feature_info: list[dict[str, Any]]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: int | Sequence[int] = 96,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | None = None,
        d_conv: int = 3,
        conv_bias: bool = False,
        gate: Gate = "none",
        path: str = "cross",
        window: int | tuple[int, int] | None = None,
        directions: Sequence[Sequence[str]] | None = None,
        mlp_ratio: float = 4.0,
        stem: StemVersion = "v2",
        downsample: DownsampleVersion = "v3",
        norm_eps: float = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if not depths or min(depths) < 1:
            raise ValueError(f"depths must be positive, got {tuple(depths)}")
        widths = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if len(widths) != len(depths) or min(widths) < 2:
            raise ValueError(f"dims must be one width over 1 a stage {tuple(depths)}, got {dims}")
        if directions is not None:
            _check_directions(len(directions), sum(depths), path, window)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.embed_dim = widths[0]
        # timm saves a model with the pooling that it finds here
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = widths[-1]
        self.output_fmt = "NCHW"
        self.stem_version, self.downsample_version = stem, downsample
        self.grad_checkpointing = False
        self.patch_embed = make_stem(stem, in_chans, widths[0], norm_eps, **dd)
        grids = self._grids(img_size, len(depths))

        mixer_args = {
            "d_state": d_state,
            "ssm_ratio": ssm_ratio,
            "dt_rank": dt_rank,
            "d_conv": d_conv,
            "conv_bias": conv_bias,
            "gate": gate,
        }
        # on the CPU whatever the default device: meta has no values
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        stages = []
        self.feature_info = []
        for i, (depth, dim) in enumerate(zip(depths, widths, strict=True)):
            if directions is None:
                paths = [GridPaths(grids[i], path, window, device)] * depth
            else:
                names = directions[sum(depths[:i]) :][:depth]
                paths = [LocalPaths(grids[i], one, device) for one in names]
            blocks = [
                VSSBlock(dim, one, mixer_args, mlp_ratio, rates.pop(0), norm_eps, **dd)
                for one in paths
            ]
            last = i == len(depths) - 1
            down = (
                nn.Identity()
                if last
                else make_downsample(downsample, dim, widths[i + 1], norm_eps, **dd)
            )
            stages.append(Stage(blocks, down))
            info = {"module": f"layers.{i}.blocks", "num_chs": dim, "reduction": 4 * 2**i}
            self.feature_info.append(info)
        self.layers = nn.Sequential(*stages)
        self.classifier = Classifier(
            widths[-1], num_classes, global_pool, drop_rate, norm_eps, **dd
        )
        self.head_hidden_size = self.classifier.features
        self.init_weights(needs_reset=False)

    @torch.jit.unused
    def _grids(self, img_size: int | tuple[int, int], count: int) -> list[tuple[int, int]]:
        """Grid of each stage."""
        grids = [stem_grid(self.stem_version, _pair("img_size", img_size))]
        while len(grids) < count:
            grids.append(halved_grid(self.downsample_version, grids[-1]))
        if min(grids[-1]) < 1:
            raise ValueError(f"img_size must leave a pixel to every stage, got {img_size}")
        return grids

    @torch.jit.unused
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw every parameter; also what makes a model usable after `to_empty`.

        Args:
            needs_reset: Also draw what the layers drew when they were made.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif not needs_reset:
                continue
            elif isinstance(module, GridPaths):
                module.set_grid(module.grid)
            elif isinstance(module, nn.Conv2d | nn.LayerNorm | SS2D):
                module.reset_parameters()

    @torch.jit.unused
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: decays, skip weights and step sizes of the scans."""
        kept = ("A_logs", "Ds", "dt_projs_bias")
        return {n for n, _ in self.named_parameters() if n.endswith(kept)}

    @torch.jit.unused
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, for layer-wise rates."""
        fine = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99998,)),
            (r"^classifier\.norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    @torch.jit.unused
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.unused
    def get_classifier(self) -> nn.Module:
        """The classifier's linear layer."""
        return self.classifier.head

    @torch.jit.unused
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by an untrained one.

        Args:
            num_classes: Classes; 0 for none.
            global_pool: Pooling, as in the constructor; unchanged when None.
        """
        pool = self.classifier.pool_type if global_pool is None else global_pool
        weight = next(self.parameters())
        dd: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.classifier.reset(self.num_features, num_classes, pool, **dd)
        self.global_pool, self.num_classes = pool, num_classes
        self.head_hidden_size = self.classifier.features

    @torch.jit.unused
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Keep the scan paths of another image size; weights do not depend on it.

        Args:
            img_size: Image height and width; nothing happens when None.
        """
        if img_size is None:
            return
        size = _pair("img_size", img_size)
        for stage, grid in zip(self.layers, self._grids(size, len(self.layers)), strict=True):
            for module in stage.modules():
                if isinstance(module, GridPaths):
                    module.set_grid(grid)
        update_model_input_size(self, size)

    def _embed(self, x: Tensor) -> Tensor:
        """The grid (B, h, w, D) before the first stage."""
        _assert(x.ndim == 4, "image must be (B, C, H, W)")
        _assert(
            x.shape[1] == self.in_chans,
            f"image must have {self.in_chans} channels, got {x.shape[1]}; see in_chans",
        )
        if self.stem_version == "v1":
            _assert(x.shape[2] >= 4, f"image height must be >= 4, got {x.shape[2]}")
            _assert(x.shape[3] >= 4, f"image width must be >= 4, got {x.shape[3]}")
        return self.patch_embed(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features and the grids after some stages, before they are downsampled.

        Args:
            x: Image, (B, C, H, W).
            indices: Last n stages, listed stages, or all.
            norm: Apply the final norm to the last stage's intermediate.
            stop_early: Run no stage after the last one asked for.
            output_fmt: "NCHW" for (B, D, h, w), "NHWC" for (B, h, w, D).
            intermediates_only: Return intermediates alone.

        Returns:
            Features (B, D, h, w) and intermediates, or intermediates.

        Raises:
            ValueError: `output_fmt` is neither "NCHW" nor "NHWC".
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt}")
        take, last = feature_take_indices(len(self.layers), indices)
        x = self._embed(x)
        # TorchScript cannot slice modules
        if is_scripting() or not stop_early:  # noqa: SIM108
            stages = self.layers
        else:
            stages = self.layers[: last + 1]
        end = len(self.layers) - 1
        grids: list[Tensor] = []
        for i, stage in enumerate(stages):
            if self.grad_checkpointing and not is_scripting():
                x = checkpoint_seq(stage.blocks, x)
            else:
                x = stage.blocks(x)  # pyright: ignore[reportCallIssue]
            if i == end:
                y = self.classifier.norm(x)
                grids += [y if norm else x] if i in take else []
                x = y
            else:
                if i in take:
                    grids.append(x)
                if is_scripting() or not stop_early or i < last:
                    x = stage.downsample(x)  # pyright: ignore[reportCallIssue]
        if output_fmt == "NCHW":
            grids = [y.permute(0, 3, 1, 2).contiguous() for y in grids]
        if intermediates_only:
            return grids
        return x.permute(0, 3, 1, 2), grids

    @torch.jit.unused
    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Cut the stages after the last one asked for; the rest still runs.

        Args:
            indices: Last n stages, or listed stages.
            prune_norm: Also cut the final norm, which goes with the last stage in any case.
            prune_head: Also cut pooling and classifier, which go with the last stage likewise.

        Returns:
            The stages asked for, counted from 0.
        """
        take, last = feature_take_indices(len(self.layers), indices)
        cut = last < len(self.layers) - 1
        self.layers = self.layers[: last + 1]
        if prune_norm or cut:
            self.classifier.norm = nn.Identity()
        if cut:
            self.layers[-1].downsample = nn.Identity()
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Normed features (B, D, h, w) of images (B, C, H, W)."""
        x = self._embed(x)
        for stage in self.layers:
            if self.grad_checkpointing and not is_scripting():
                x = stage.downsample(checkpoint_seq(stage.blocks, x))  # pyright: ignore[reportCallIssue]
            else:
                x = stage(x)
        return self.classifier.norm(x).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, drop, classify; `pre_logits` leaves the linear layer out."""
        return self.classifier(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        return self.forward_head(self.forward_features(x))
