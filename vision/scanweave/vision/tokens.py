"""What a model does with its tokens once it has them: layers, features, pooling, classifier.

timm's contract for models whose features are tokens, without saying where the tokens come from.

    TokenModel   layers, intermediates, head; the base of `IsotropicModel`
"""
# timm.layers exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

from typing import TYPE_CHECKING, Any

import torch
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, _assert, nn

from scanweave.core.ops.norm.cast import runs_kernels

from .block import MixerBlock, is_scripting
from .embed import PatchEmbed, class_rows, pool_tokens, split_tokens
from .norms import RmsNorm, chained

_POOLS = ("", "token", "avg", "max", "avgmax")


class TokenModel(nn.Module):
    """Layers over tokens (B, L, D), a norm, a pool and a classifier; a base class.

    Subclasses make the modules named here and say how images become tokens (`_embed`), in which
    order layers read them (`_orders`) and how the last ones are normed (`_normed`).
    """

    if TYPE_CHECKING:
        # TorchScript reads annotations of classes, and knows no modules in them
        patch_embed: PatchEmbed
        cls_token: nn.Parameter | None
        layers: nn.Sequential
        norm_f: nn.Module
        head_drop: nn.Dropout
        head: nn.Module
        has_neck: bool
        has_rope: bool
        rope: nn.Module
        neck: nn.Module
        norm_neck: nn.Module
        num_prefix_tokens: int
        head_hidden_size: int
        register_reduce: int
        norm_eps: float
        num_classes: int
        embed_dim: int
        global_pool: str
        class_position: str
        grad_checkpointing: bool
        _no_decay: frozenset[str]

        def _embed(self, x: Tensor) -> Tensor: ...

        def _orders(self, height: int, width: int) -> Tensor | None: ...

        def _normed(self, x: Tensor, pending: Tensor | None = None) -> Tensor: ...

    def _checked_pool(self, global_pool: str) -> str:
        if global_pool not in _POOLS:
            raise ValueError(f"global_pool must be one of {_POOLS}, got {global_pool!r}")
        if global_pool == "token" and not self.class_position:
            raise ValueError("global_pool must be 'avg', 'max', 'avgmax' or '' without class_token")
        return global_pool

    @torch.jit.unused
    def _make_neck(
        self,
        joins: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """What makes one vector of several class tokens; without `joins` it is their mean."""
        self.has_neck = joins and self.num_prefix_tokens > 1 and self.global_pool == "token"
        self.neck, self.norm_neck = nn.Identity(), nn.Identity()
        self.head_hidden_size = self.embed_dim
        if self.has_neck:
            dd: dict[str, Any] = {"device": device, "dtype": dtype}
            width = self.embed_dim // self.register_reduce
            self.head_hidden_size = width * self.num_prefix_tokens
            if self.register_reduce > 1:
                self.neck = nn.Linear(self.embed_dim, width, bias=False, **dd)
                self.norm_neck = RmsNorm(self.head_hidden_size, self.norm_eps, False, **dd)
        self.neck.train(self.training)
        self.norm_neck.train(self.training)

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
        weight = next(self.parameters())
        dd: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        # a neck outlives the classifier, what comes before it keeps its width
        joins = self.global_pool == "token" and (num_classes > 0 or self.has_neck)
        if self.num_prefix_tokens > 1 and joins != self.has_neck:
            self._make_neck(joins, **dd)
        width = self.head_hidden_size
        self.head = nn.Linear(width, num_classes, **dd) if num_classes else nn.Identity()
        self.head.train(self.training)

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
            return_prefix_tokens: Pair every intermediate with its class tokens (B, n, D).
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
        grid = self.patch_embed.grid_of(x)
        batch = x.shape[0]
        x = self._embed(x)
        x, pending, taken = self._run(x, grid[0], grid[1], take, last if stop_early else -1)
        dtype = self.patch_embed.proj.weight.dtype
        streams: list[Tensor] = [self._normed(y) if norm else y.to(dtype) for y in taken]

        prefix: list[Tensor] = []
        if self.cls_token is not None:
            count = self.num_prefix_tokens
            rows = class_rows(x.shape[1] - count, self.class_position, count)
            pairs = [split_tokens(y, rows) for y in streams]
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
        return self._normed(x, pending), streams

    def _run(
        self, x: Tensor, height: int, width: int, take: list[int], last: int
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The stream after all layers, or after layer `last` if it is not -1; those of `take`.

        Between the two is what is still to be added to the first, which a norm does on a GPU.
        """
        streams: list[Tensor] = []
        pending: Tensor | None = None
        orders = self._orders(height, width)
        if orders is not None:
            _assert(orders.shape[2] == x.shape[1], "image must be of img_size; see set_input_size")
        # TorchScript cannot slice modules
        if is_scripting() or last < 0:  # noqa: SIM108
            layers = self.layers
        else:
            layers = self.layers[: last + 1]
        for i, layer in enumerate(layers):
            order: Tensor | None = None
            inverse: Tensor | None = None
            if orders is not None:
                turn = i % orders.shape[1]
                order, inverse = orders[0, turn], orders[1, turn]
            if self.has_rope:
                x = self.rope(x)
            if self.grad_checkpointing and not is_scripting():
                x = checkpoint(layer, x, order, inverse)
            elif is_scripting():
                x = layer(x, order, inverse)
            else:
                x, pending = self._chained(layer, x, pending, order, inverse)
            if i in take:
                if pending is not None:
                    x = x + pending
                    pending = None
                streams.append(x)
        return x, pending, streams

    @torch.jit.unused
    def _chained(
        self,
        layer: nn.Module,
        x: Tensor,
        pending: Tensor | None,
        order: Tensor | None,
        inverse: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The stream and what is still to be added to it; on a GPU the next norm makes the sum."""
        # positions that turn before every layer need the sum
        leaves = runs_kernels(x) and not self.has_rope and type(layer) is MixerBlock
        return chained(layer, leaves, x, pending, order, inverse)

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
        grid = self.patch_embed.grid_of(x)
        nothing: list[int] = []
        x, pending, _ = self._run(self._embed(x), grid[0], grid[1], nothing, -1)
        return self._normed(x, pending)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Features (B, L, D) to (B, D), or as they are for ""; registers to (B, n D / r)."""
        kind = self.global_pool if pool_type is None else pool_type
        x = pool_tokens(x, kind, self.class_position, self.num_prefix_tokens)
        if kind == "token" and self.num_prefix_tokens > 1:
            x = self.norm_neck(self.neck(x).flatten(1)) if self.has_neck else x.mean(1)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, drop, classify; `pre_logits` leaves the classifier out."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        return self.forward_head(self.forward_features(x))
