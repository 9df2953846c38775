"""One residual layer around a sequence mixer.

    x <- x + drop_path(mixer(rms_norm(x)))
    x <- x + drop_path(mlp(rms_norm(x)))      only where an MLP is asked for

Letters: B batch, L tokens, D channels, E inner channels, N state, R rank of dt, W taps.

    MixerBlock   the layer
"""
# timm.layers exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, register_notrace_module
from torch import Tensor, nn
from torch._jit_internal import is_scripting

from scanweave.core import create_mixer

from .norms import LayerNorm, RmsNorm, add_and_norm, at_least_float32
from .scripting import quasi_separable, scan_in_steps


class MixerBlock(nn.Module):
    """One layer on the residual stream (B, L, D).

    Args:
        dim: Channels D.
        mixer: Name of a registered mixer, or a module (B, L, D) to (B, L, D).
        mixer_args: Arguments of the registered one.
        norm_eps: Epsilon of the norm.
        drop_path: Probability that a sample skips the layer in training.
        mlp_ratio: Hidden channels of the MLP, in units of D; 0 for none.
        device: Where the parameters are made.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        mixer: str | nn.Module,
        mixer_args: Mapping[str, Any] | None = None,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
        mlp_ratio: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = RmsNorm(dim, norm_eps, **dd)
        if isinstance(mixer, str):
            mixer = create_mixer(mixer, dim, **(mixer_args or {}), **dd)
        self.mixer: Any = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.has_mlp = mlp_ratio > 0
        self.norm2 = RmsNorm(dim, norm_eps, **dd) if self.has_mlp else nn.Identity()
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd) if self.has_mlp else nn.Identity()
        # TorchScript cannot compile the forward of mixers and their parts, see _scripted_mixer; it
        # can that of norms, which other models script
        for part in self.mixer.modules():
            if not (type(part).__module__.startswith("torch.") or isinstance(part, LayerNorm)):
                torch.jit.ignore(type(part).forward)

    def init_weights(
        self, depth: int, official_init: bool = False, needs_reset: bool = True
    ) -> None:
        """Draw the parameters, and shrink the way back to the stream by sqrt(depth).

        Args:
            depth: Layers of the model.
            official_init: Give bimamba's backward direction step sizes softplus(0) = 0.69.
            needs_reset: False if norm and mixer have just been made.

        Raises:
            ValueError: `official_init` with a mixer that has no such direction.

        Source: Radford et al. 2019 (GPT-2), section 2.3: residual layers scaled at the start.
        """
        if needs_reset:
            self.norm.reset_parameters()
            self.mixer.reset_parameters()
            if isinstance(self.norm2, RmsNorm):
                self.norm2.reset_parameters()
        ends = [getattr(self.mixer, "out_proj", None)]
        if isinstance(self.mlp, Mlp):
            self.mlp.fc1.reset_parameters()
            self.mlp.fc2.reset_parameters()
            ends.append(self.mlp.fc2)
        for end in ends:
            if isinstance(end, nn.Linear):
                with torch.no_grad():
                    end.weight.div_(math.sqrt(depth))
        if official_init:
            dt_proj_b = getattr(self.mixer, "dt_proj_b", None)
            if not isinstance(dt_proj_b, nn.Linear):
                info = getattr(self.mixer, "info", None)
                name = type(self.mixer).__name__ if info is None else info.name
                raise ValueError(f"official_init must be False for mixer {name!r}, got True")
            dt_proj_b.reset_parameters()
            nn.init.zeros_(dt_proj_b.bias)

    def forward(
        self, x: Tensor, order: Tensor | None = None, inverse: Tensor | None = None
    ) -> Tensor:
        """The stream after this layer.

        Args:
            x: The stream before it, (B, L, D).
            order: Token that the mixer reads at every step, (L,) int64; as they come when None.
            inverse: Step of every token, (L,) int64; given with `order`.

        Returns:
            (B, L, D), in the dtype of `x` or wider.
        """
        x, y = self.with_branch(x, None, order, inverse)
        return x + y

    def with_branch(
        self,
        x: Tensor,
        pending: Tensor | None,
        order: Tensor | None = None,
        inverse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream and what is still to be added to it, of the same two before this layer."""
        if is_scripting() or pending is None:
            y = self.norm(x)
        else:
            x, y = add_and_norm(x, pending, self.norm)
        if order is not None:
            y = y.index_select(1, order)
        y = self._scripted_mixer(y) if is_scripting() else self.mixer(y)
        if inverse is not None:
            y = y.index_select(1, inverse)
        y = self.drop_path(y)
        if self.has_mlp:
            if is_scripting():
                x = x + y
                y = self.norm2(x)
            else:
                x, y = add_and_norm(x, y, self.norm2)
            y = self.drop_path(self.mlp(y))
        return x, y

    def _scripted_mixer(self, x: Tensor) -> Tensor:
        """The mixer for TorchScript, which compiles only the branch whose names exist.

        Those other than "bimamba" and "hydra" stop at "no attribute 'conv1d_b'".
        """
        # of an expression it would compile both branches
        if hasattr(self.mixer, "fc_D"):  # noqa: SIM108
            y = self._scripted_hydra(x)
        else:
            y = self._scripted_bimamba(x)
        return y

    def _scripted_hydra(self, x: Tensor) -> Tensor:
        m = self.mixer
        z, u, dt = m.in_proj(x).split([m.d_inner, m.conv_dim, 2 * m.nheads], -1)
        half = m.conv1d.weight.shape[2] // 2
        weight, bias = m.conv1d.weight, m.conv1d.bias
        u = F.silu(F.conv1d(u.transpose(1, 2), weight, bias, padding=half, groups=m.conv_dim))
        shared = m.ngroups * m.d_state
        sizes = [m.d_inner, shared, shared, shared, shared]
        u, B, C, B_b, C_b = u.transpose(1, 2).split(sizes, -1)
        groups = [m.ngroups, m.d_state]
        A = -torch.exp(at_least_float32(m.A_log))
        delta = F.softplus(at_least_float32(dt).unflatten(-1, [2, m.nheads]) + m.dt_bias)
        delta = delta.clamp(m.dt_limit[0], m.dt_limit[1])
        forth, back = delta[:, :, 0], delta[:, :, 1]
        diagonal = F.linear(u, m.fc_D.weight) + m.D
        y = quasi_separable(
            (C.unflatten(-1, groups), C_b.unflatten(-1, groups)),
            (B.unflatten(-1, groups), B_b.unflatten(-1, groups)),
            at_least_float32(u).unflatten(-1, [m.nheads, m.headdim]),
            (forth * A, back * A),
            (forth, back),
            diagonal,
        ).flatten(2)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + m.norm.eps) * m.norm.weight
        y = y * F.silu(at_least_float32(z))
        return m.out_proj(y.to(m.out_proj.weight.dtype))

    def _scripted_bimamba(self, x: Tensor) -> Tensor:
        m = self.mixer
        u, z = m.in_proj(x).chunk(2, -1)
        u = u.transpose(1, 2)
        inner, pad = u.shape[1], m.conv1d.weight.shape[2] - 1
        forth = F.conv1d(F.pad(u, [pad, 0]), m.conv1d.weight, m.conv1d.bias, groups=inner)
        # the reverse direction convolves from the end: the same taps, mirrored
        taps = m.conv1d_b.weight.flip(-1)
        back = F.conv1d(F.pad(u, [0, pad]), taps, m.conv1d_b.bias, groups=inner)
        forth, back = F.silu(forth).transpose(1, 2), F.silu(back).transpose(1, 2)
        sizes = [m.dt_proj.weight.shape[1], m.A_log.shape[1], m.A_log.shape[1]]
        dt, B, C = m.x_proj(forth).split(sizes, -1)
        dt_b, B_b, C_b = m.x_proj_b(back).split(sizes, -1)
        A, A_b = torch.exp(at_least_float32(m.A_log)), torch.exp(at_least_float32(m.A_b_log))
        y = scan_in_steps(
            (forth, back),
            (m.dt_proj(dt), m.dt_proj_b(dt_b)),
            (-A, -A_b),
            (B, B_b),
            (C, C_b),
            (m.D, m.D_b),
            z,
        )
        scale = 0.5 if m.average else 1.0
        return F.linear(y, scale * m.out_proj.weight, m.out_proj.bias)


# a leaf for torch.fx: mixers check shapes, which cannot be traced
register_notrace_module(MixerBlock)
