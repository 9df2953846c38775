"""Decision Mamba: the Decision Transformer with a selective state space in place of attention.

Every environment step becomes three tokens, the return still to be earned, the state and the
action, (R_1, s_1, a_1, R_2, s_2, a_2, ...). A causal stack reads them; the output at a state
token, which has seen returns and states up to now and actions before now, is the action.

    x <- x + mixer(norm(x));   x <- x + MLP(norm(x))        n_layer times

    Block            one pre-norm layer with those two branches
    Stack            layers, and the norm behind them
    DecisionMamba    tokens, stack and head; parameter names are the published model's

Letters: B batch, K environment steps, S state channels, A action channels or choices,
D model channels, T rows of the timestep table.

Source: Ota 2024, arXiv 2403.19925, section 3; Chen et al. 2021, arXiv 2106.01345, section 3.
Names and defaults:
https://github.com/Toshihiro-Ota/decision-mamba/blob/35f99441975c47f8652f82e37b63998d360521e6/gym/models/decision_mamba.py#L74
Differences from it: `rl/README.md`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from scanweave.core import Mixer, create_mixer, mixer_info

from .inputs import as_sizes, check_inputs, plain, take_steps
from .tokens import ChoiceEmbedding, ImageEncoder

_NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}
MixerState = dict[str, Tensor]


class Block(nn.Module):
    """One layer: a causal mixer along the tokens, then an MLP on every token.

    The attribute of the mixer is called `mamba` whichever mixer it is, so that published
    weights load by name.
    """

    def __init__(
        self,
        hidden_size: int,
        n_inner: int,
        *,
        mixer: str,
        mixer_kwargs: Mapping[str, object],
        dropout: float,
        activation: str = "gelu",
        norm: str = "layer",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm_mamba = _NORMS[norm](hidden_size, eps=1e-5, **dd)
        self.mamba = create_mixer(mixer, hidden_size, **mixer_kwargs, **dd)
        self.ln_2 = nn.LayerNorm(hidden_size, **dd)
        self.mlp_channels = nn.Sequential(
            nn.Linear(hidden_size, n_inner, **dd),
            _ACTIVATIONS[activation](),
            nn.Linear(n_inner, hidden_size, **dd),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Whole sequences: (B, L, D) to (B, L, D)."""
        mixed = self.mamba(self.norm_mamba(x))
        assert isinstance(mixed, Tensor)
        x = x + mixed
        return x + self.mlp_channels(self.ln_2(x))

    def advance(
        self, x: Tensor, state: MixerState, *, last: bool = False
    ) -> tuple[Tensor, MixerState]:
        """The next tokens of running sequences, (B, L, D), and the state after them.

        `last`: only the last token's output is wanted, (B, 1, D).
        """
        if x.shape[1] == 1:
            mixed, state = self.mamba.step(self.norm_mamba(x[:, 0]), state)
            mixed = mixed[:, None]
        else:
            mixed, state = self.mamba.advance(self.norm_mamba(x), state)
        x = x + mixed
        x = x[:, -1:] if last else x
        return x + self.mlp_channels(self.ln_2(x)), state


class Stack(nn.Module):
    """Dropout, blocks, final norm: the part that published names call `transformer.*`."""

    def __init__(self, blocks: list[Block], norm: nn.LayerNorm, dropout: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(blocks)
        self.ln_f = norm

    @property
    def blocks(self) -> list[Block]:
        """The layers."""
        return [block for block in self.h if isinstance(block, Block)]

    def forward(self, x: Tensor) -> Tensor:
        """All blocks, without dropout before and norm behind: (B, L, D) to (B, L, D)."""
        for block in self.blocks:
            x = block(x)
        return x

    def draw(self, *, mixers: bool) -> None:
        """GPT-2's initialisation of the MLPs, and of the mixers' Linears if asked for."""
        for block in self.blocks:
            for module in (block if mixers else block.mlp_channels).modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)


class DecisionMamba(nn.Module):
    """Predict each action from the returns wanted, the states seen and the actions done.

    Args:
        state_dim: Channels of a (flat) state, S; or the shape of an image, see `ImageEncoder`.
        act_dim: Channels of a continuous action, or the number of options, A; or the options of
            each of several choices made at once (`discrete`).
        hidden_size: Model channels, D.
        n_layer: Blocks.
        max_length: Steps of context the model is trained with, K; `forward` takes any number.
        max_ep_len: Rows of the timestep table, T; later steps share the last row.
        mixer: A causal mixer of `scanweave.core.list_mixers(causal=True)`.
        mixer_kwargs: Arguments of the mixer.
        n_inner: Width of the MLP; 4 * hidden_size when None.
        dropout: Rate after each MLP and after the token embedding, 0.1 in the paper.
        remove_act_embs: Leave out action tokens: (R_1, s_1, R_2, s_2, ...).
        timestep_embedding: Add a learned vector per step of the episode to its tokens.
        action_tanh: End a continuous head with tanh, for actions in [-1, 1].
        discrete: Actions are classes: the head returns A logits, those of several choices one
            behind the other.
        activation: Of the MLP, "gelu", or "relu" as in the gym Decision Transformer.
        norm: Before the mixer, "layer", or "rms" as in the published variant `dmamba-min`.
        auxiliary_heads: Also hold `predict_state` and `predict_return`, which the published
            Decision Transformer has and its loss does not use; they are not run.
        init: "mamba" leaves each mixer its own initialisation; "official" redraws every Linear
            of the mixers from N(0, 0.02) with zero bias as the published model does, which
            wipes Mamba's step sizes (README, trap 2).
        device: Where to build.
        dtype: Type of the parameters.

    Raises:
        ValueError: a size is not positive, `init`, `activation` or `norm` is unknown, several
            choices are not discrete, or the mixer is unknown or not causal: one that reads
            later tokens would see the action it must predict.
    """

    # reads the return that is asked for
    conditioned = True

    def __init__(
        self,
        state_dim: int | Sequence[int],
        act_dim: int | Sequence[int],
        hidden_size: int = 128,
        n_layer: int = 3,
        max_length: int = 20,
        max_ep_len: int = 1000,
        *,
        mixer: str = "mamba",
        mixer_kwargs: Mapping[str, object] | None = None,
        n_inner: int | None = None,
        dropout: float = 0.1,
        remove_act_embs: bool = False,
        timestep_embedding: bool = True,
        action_tanh: bool = True,
        discrete: bool = False,
        activation: str = "gelu",
        norm: str = "layer",
        auxiliary_heads: bool = False,
        init: str = "mamba",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.state_shape, options = as_sizes(state_dim), as_sizes(act_dim)
        for name, size in (
            ("state_dim", min(self.state_shape)),
            ("act_dim", min(options)),
            ("hidden_size", hidden_size),
            ("n_layer", n_layer),
            ("max_length", max_length),
            ("max_ep_len", max_ep_len),
            ("n_inner", 4 * hidden_size if n_inner is None else n_inner),
        ):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if init not in ("mamba", "official"):
            raise ValueError(f"init must be 'mamba' or 'official', got {init!r}")
        if not mixer_info(mixer).causal:
            raise ValueError(f"mixer must be causal for an acting agent, got {mixer!r}")
        for name, given, known in (
            ("activation", activation, _ACTIVATIONS),
            ("norm", norm, _NORMS),
        ):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
        if len(options) > 1 and not discrete:
            raise ValueError(f"act_dim must be one number unless discrete, got {options}")
        inner = 4 * hidden_size if n_inner is None else n_inner
        # options of each choice, where several are made at once
        self.choices = options if len(options) > 1 else ()
        self.act_dim, self.discrete = sum(options), discrete
        self.max_length, self.max_ep_len = max_length, max_ep_len
        self.remove_act_embs = remove_act_embs
        self.config: dict[str, object] = {
            "state_dim": plain(self.state_shape),
            "act_dim": plain(options),
            "hidden_size": hidden_size,
            "n_layer": n_layer,
            "max_length": max_length,
            "max_ep_len": max_ep_len,
            "mixer": mixer,
            "mixer_kwargs": dict(mixer_kwargs or {}),
            "n_inner": inner,
            "dropout": dropout,
            "remove_act_embs": remove_act_embs,
            "timestep_embedding": timestep_embedding,
            "action_tanh": action_tanh,
            "discrete": discrete,
            "activation": activation,
            "norm": norm,
            "auxiliary_heads": auxiliary_heads,
            "init": init,
        }
        dd = {"device": device, "dtype": dtype}
        blocks = [
            Block(
                hidden_size,
                inner,
                mixer=mixer,
                mixer_kwargs=mixer_kwargs or {},
                dropout=dropout,
                activation=activation,
                norm=norm,
                device=device,
                dtype=dtype,
            )
            for _ in range(n_layer)
        ]
        self.transformer = Stack(blocks, nn.LayerNorm(hidden_size, **dd), dropout)
        self.embed_timestep = (
            nn.Embedding(max_ep_len, hidden_size, **dd) if timestep_embedding else None
        )
        self.embed_return = nn.Linear(1, hidden_size, **dd)
        self.embed_state = (
            nn.Linear(self.state_shape[0], hidden_size, **dd)
            if len(self.state_shape) == 1
            else ImageEncoder(self.state_shape, hidden_size, **dd)
        )
        self.embed_action = (
            ChoiceEmbedding(self.choices, hidden_size, **dd)
            if self.choices
            else (nn.Embedding if discrete else nn.Linear)(self.act_dim, hidden_size, **dd)
        )
        self.embed_ln = nn.LayerNorm(hidden_size, **dd)
        head: list[nn.Module] = [nn.Linear(hidden_size, self.act_dim, **dd)]
        if action_tanh and not discrete:
            head.append(nn.Tanh())
        self.predict_action = nn.Sequential(*head)
        if auxiliary_heads:
            self.predict_state = nn.Linear(hidden_size, self.state_shape[0], **dd)
            self.predict_return = nn.Linear(hidden_size, 1, **dd)
        # modules outside the stack keep PyTorch's defaults, as published
        self.transformer.draw(mixers=init == "official")

    @property
    def recurrent(self) -> bool:
        """Whether `step` works: the mixer has a finite state."""
        return self.transformer.blocks[0].mamba.recurrent

    def forward(
        self,
        states: Tensor,
        actions: Tensor,
        returns_to_go: Tensor,
        timesteps: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the action of every step of a batch of windows.

        Args:
            states: Normalised states, (B, K, S), or images (B, K, ...) divided by 255.
            actions: Actions done, (B, K, A); when discrete (B, K) int64, or (B, K, M) of M
                choices. The last is not read.
            returns_to_go: Scaled returns still to be earned, (B, K, 1).
            timesteps: Steps since the episode began, (B, K) int64.
            mask: True at real steps, (B, K) bool. Padding then changes nothing at real steps,
                on whichever side it is. None reads every step, as the published model does.

        Returns:
            Actions (B, K, A), logits when discrete. Undefined where `mask` is False.

        Raises:
            ValueError: a shape does not fit the others.
        """
        steps = check_inputs(self, states, actions, returns_to_go, timesteps, mask)
        order = None
        if mask is not None:
            # behind the real steps padding can change nothing, because every mixer is causal;
            # moving steps once is cheaper than masking in every block
            order = torch.argsort(~mask, dim=1, stable=True)
            states, actions = take_steps(states, order), take_steps(actions, order)
            returns_to_go = take_steps(returns_to_go, order)
            timesteps = take_steps(timesteps, order)
        tokens = [self.embed_return(returns_to_go), self.embed_state(states)]
        if not self.remove_act_embs:
            tokens.append(self.embed_action(actions))
        when = self._when(timesteps)
        x = torch.stack([token if when is None else token + when for token in tokens], dim=2)
        x = self.transformer.drop(self.embed_ln(x.flatten(1, 2)))  # (B, 3K, D)
        x = self.transformer(x)
        x = x.unflatten(1, (steps, len(tokens)))[:, :, 1]
        predictions = self.predict_action(self.transformer.ln_f(x))
        return predictions if order is None else take_steps(predictions, order.argsort(dim=1))

    def init_state(self, batch: int) -> list[MixerState]:
        """What `step` needs before the first step of `batch` episodes: a state per block."""
        return [block.mamba.init_state(batch) for block in self.transformer.blocks]

    def step(
        self,
        states: Tensor,
        previous_actions: Tensor,
        returns_to_go: Tensor,
        timesteps: Tensor,
        carried: list[MixerState],
        first: Tensor | None = None,
    ) -> tuple[Tensor, list[MixerState]]:
        """Advance by one environment step at a cost that does not grow with the episode.

        Args:
            states: Normalised states, (B, S).
            previous_actions: Actions of the step before, (B, A) or (B,) int64.
            returns_to_go: Scaled, (B, 1).
            timesteps: (B,) int64.
            carried: From `init_state` or the last `step`.
            first: Rows whose episode begins, (B,) bool: what they carried is forgotten and
                they have no previous action. None where no row begins.

        Returns:
            Action predictions (B, A), equal to the last of `forward` over the same steps, and
            what to carry on. Without gradients `carried` is updated in place.

        Raises:
            ValueError: the mixer has no finite state.
        """
        if not self.recurrent:
            raise ValueError(f"mixer must be recurrent for step, got {self.config['mixer']!r}")
        tokens = [self.embed_return(returns_to_go), self.embed_state(states)]
        now = self._when(timesteps)
        if now is not None:
            tokens = [token + now for token in tokens]
        if not self.remove_act_embs:
            action = self.embed_action(previous_actions)
            before = self._when((timesteps - 1).clamp(min=0))
            action = action if before is None else action + before
            if first is None:
                # all tokens at once: fewer and larger products
                tokens.insert(0, action)
            else:
                _, carried = self._advance(action[:, None], carried)
        if first is not None:
            carried = [
                _forget(block, state, first)
                for block, state in zip(self.transformer.blocks, carried, strict=True)
            ]
        x, carried = self._advance(torch.stack(tokens, dim=1), carried)
        return self.predict_action(self.transformer.ln_f(x[:, 0])), carried

    def _advance(self, x: Tensor, carried: list[MixerState]) -> tuple[Tensor, list[MixerState]]:
        """Tokens (B, L, D) through all blocks; the output of the last, (B, 1, D)."""
        x = self.transformer.drop(self.embed_ln(x))
        blocks = self.transformer.blocks
        following = []
        for block, state in zip(blocks, carried, strict=True):
            x, state = block.advance(x, state, last=block is blocks[-1])
            following.append(state)
        return x, following

    def _when(self, timesteps: Tensor) -> Tensor | None:
        if self.embed_timestep is None:
            return None
        return self.embed_timestep(timesteps.clamp(max=self.max_ep_len - 1))


def _forget(block: Block, state: MixerState, rows: Tensor) -> MixerState:
    """`state` with the rows marked True as before the first token."""
    mixer = block.mamba
    shaped = {name: rows.view(-1, *[1] * (value.ndim - 1)) for name, value in state.items()}
    if type(mixer).init_state is Mixer.init_state and not torch.is_grad_enabled():
        # zero, and in place: a copy of all states costs as much as a layer
        return {name: value.masked_fill_(shaped[name], 0) for name, value in state.items()}
    blank = mixer.init_state(1)
    return {name: torch.where(shaped[name], blank[name], v) for name, v in state.items()}
