"""The published Atari models: image tokens, positions by token and by step, class logits.

    e_R = tanh(W R_t + b)     e_s = encoder(s_t)     e_a = tanh(table[a_t])
    x   = dropout([R_1, s_1, a_1, R_2, ...] + p[token in the window] + g[one step per window])
    then blocks and final norm as in `model.py`; logits = W x at s_t, without bias

    AtariDecisionMamba   the model; with `mixer="attention"` the Atari Decision Transformer

Letters: B batch, K steps of a window, D model channels, A options, T rows of the step table g.

Positions count from the window's start, so there is no state to carry from step to step: an agent
with this model acts in "window" mode. For new work `DecisionMamba` with an image as `state_dim`
has neither limit.

Source: Ota 2024, arXiv 2403.19925; Chen et al. 2021, arXiv 2106.01345.
https://github.com/Toshihiro-Ota/decision-mamba/blob/35f99441975c47f8652f82e37b63998d360521e6/atari/mingpt/model_atari.py#L47
Differences from it: padded steps are masked, so that a young window is read as if unpadded.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from scanweave.core import mixer_info

from .inputs import check_inputs, take_steps
from .model import Block, MixerState, Stack
from .tokens import ImageEncoder


class AtariDecisionMamba(nn.Module):
    """Predict the choice at every step of windows of images.

    Args:
        act_dim: Options, A.
        state_dim: Shape of an image; four stacked frames as published.
        hidden_size: Model channels, D.
        n_layer: Blocks.
        max_length: Most steps of a window, K; more are refused.
        max_ep_len: Largest step of an episode that has a row in g; later ones share the last.
        mixer: A causal mixer; "attention" with `{"num_heads": 8}` is the Decision Transformer.
        mixer_kwargs: Arguments of the mixer.
        norm: Before the mixer, "layer", or "rms" as in the published variant `mamba-min`.
        dropout: Rate after the embedding and after each MLP.
        global_step: Whose step chooses the window's row of g: "first" that of the window's first
            step. "current" does so in training, and takes the last step's in evaluation mode,
            as the published code does.
        init: "mamba" leaves each mixer its own initialisation; "official" redraws its Linears
            as the published model does (README, trap 2).
        device: Where to build.
        dtype: Type of the parameters.

    Raises:
        ValueError: a size is not positive, the mixer is not causal, or `global_step` or `init`
            is unknown.
    """

    conditioned = True
    recurrent = False
    discrete = True
    choices: tuple[int, ...] = ()

    def __init__(
        self,
        act_dim: int,
        state_dim: Sequence[int] = (4, 84, 84),
        hidden_size: int = 128,
        n_layer: int = 6,
        max_length: int = 30,
        max_ep_len: int = 10_000,
        *,
        mixer: str = "mamba",
        mixer_kwargs: Mapping[str, object] | None = None,
        norm: str = "layer",
        dropout: float = 0.1,
        global_step: str = "first",
        init: str = "mamba",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("act_dim", act_dim),
            ("hidden_size", hidden_size),
            ("n_layer", n_layer),
            ("max_length", max_length),
            ("max_ep_len", max_ep_len),
        ):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if global_step not in ("first", "current"):
            raise ValueError(f"global_step must be 'first' or 'current', got {global_step!r}")
        if init not in ("mamba", "official"):
            raise ValueError(f"init must be 'mamba' or 'official', got {init!r}")
        if not mixer_info(mixer).causal:
            raise ValueError(f"mixer must be causal for an acting agent, got {mixer!r}")
        self.act_dim, self.max_length, self.max_ep_len = act_dim, max_length, max_ep_len
        self.state_shape = tuple(int(size) for size in state_dim)
        self.global_step = global_step
        self.config: dict[str, object] = {
            "act_dim": act_dim,
            "state_dim": list(self.state_shape),
            "hidden_size": hidden_size,
            "n_layer": n_layer,
            "max_length": max_length,
            "max_ep_len": max_ep_len,
            "mixer": mixer,
            "mixer_kwargs": dict(mixer_kwargs or {}),
            "norm": norm,
            "dropout": dropout,
            "global_step": global_step,
            "init": init,
        }
        dd = {"device": device, "dtype": dtype}
        blocks = [
            Block(
                hidden_size,
                4 * hidden_size,
                mixer=mixer,
                mixer_kwargs=mixer_kwargs or {},
                dropout=dropout,
                norm=norm,
                device=device,
                dtype=dtype,
            )
            for _ in range(n_layer)
        ]
        self.transformer = Stack(blocks, nn.LayerNorm(hidden_size, **dd), dropout)
        self.state_encoder = ImageEncoder(self.state_shape, hidden_size, **dd)
        self.ret_emb = nn.Sequential(nn.Linear(1, hidden_size, **dd), nn.Tanh())
        table = nn.Embedding(act_dim, hidden_size, **dd)
        self.action_embeddings = nn.Sequential(table, nn.Tanh())
        self.pos_emb = nn.Parameter(torch.zeros(1, 3 * max_length + 1, hidden_size, **dd))
        self.global_pos_emb = nn.Parameter(torch.zeros(1, max_ep_len + 1, hidden_size, **dd))
        self.head = nn.Linear(hidden_size, act_dim, bias=False, **dd)
        nn.init.normal_(table.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        self.transformer.draw(mixers=init == "official")

    def no_weight_decay(self) -> list[str]:
        """Positions: they are no weights of a product."""
        return ["pos_emb", "global_pos_emb"]

    def forward(
        self,
        states: Tensor,
        actions: Tensor,
        returns_to_go: Tensor,
        timesteps: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, K, A); arguments as `DecisionMamba.forward`, states (B, K, *image).

        Raises:
            ValueError: a shape does not fit the others, or K is above `max_length`.
        """
        steps = check_inputs(self, states, actions, returns_to_go, timesteps, mask)
        if steps > self.max_length:
            raise ValueError(f"states must have at most {self.max_length} steps, got {steps}")
        order = None
        if mask is not None:
            # behind the real steps padding changes nothing, and positions count real tokens
            order = torch.argsort(~mask, dim=1, stable=True)
            states, actions = take_steps(states, order), take_steps(actions, order)
            returns_to_go = take_steps(returns_to_go, order)
            timesteps = take_steps(timesteps, order)
        tokens = [
            self.ret_emb(returns_to_go),
            self.state_encoder(states),
            self.action_embeddings(actions),
        ]
        x = torch.stack(tokens, dim=2).flatten(1, 2)  # (B, 3K, D)
        when = self.global_pos_emb[0, self._window_step(timesteps, mask)]
        x = self.transformer.drop(x + self.pos_emb[:, : 3 * steps] + when[:, None])
        x = self.transformer(x).unflatten(1, (steps, 3))[:, :, 1]
        logits = self.head(self.transformer.ln_f(x))
        return logits if order is None else take_steps(logits, order.argsort(dim=1))

    def init_state(self, batch: int) -> list[MixerState]:
        """There is none, see the module's text.

        Raises:
            ValueError: always.
        """
        raise ValueError("mode must be 'window': positions count from the window's start")

    def step(
        self,
        states: Tensor,
        previous_actions: Tensor,
        returns_to_go: Tensor,
        timesteps: Tensor,
        carried: list[MixerState],
        first: Tensor | None = None,
    ) -> tuple[Tensor, list[MixerState]]:
        """As `init_state`.

        Raises:
            ValueError: always.
        """
        raise ValueError("mode must be 'window': positions count from the window's start")

    def _window_step(self, timesteps: Tensor, mask: Tensor | None) -> Tensor:
        """The step (B,) that chooses each window's row; real steps come first."""
        chosen = timesteps[:, 0]
        if self.global_step == "current" and not self.training:
            if mask is None:
                chosen = timesteps[:, -1]
            else:
                last = (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0)
                chosen = timesteps.gather(1, last)[:, 0]
        return chosen.clamp(max=self.max_ep_len)
