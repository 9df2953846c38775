"""Behaviour cloning: the control that every return-conditioned agent is compared with.

    BehaviourCloning   an MLP from the present state to the action

It reads neither the return wanted nor the past, so it plays the average of its data; trained on
`top_episodes(episodes, 0.1)` it is "10 % BC". Both tasks here are fully observed, so the present
state is enough to play well, and the difference to `DecisionMamba` is what conditioning brings.
Its `forward` takes the same arguments, so that data, agent, training and evaluation are shared.

Source: the baseline of Chen et al. 2021, arXiv 2106.01345, section 4 (there over K states).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .inputs import as_sizes, plain
from .tokens import ImageEncoder


class BehaviourCloning(nn.Module):
    """Predict each action from its state alone.

    Args:
        state_dim: Channels of a (flat) state, S, or the shape of an image.
        act_dim: Channels of a continuous action, or the number of options, A; or the options of
            each of several choices made at once (`discrete`).
        hidden_size: Width of the hidden layers.
        n_layer: Hidden layers.
        dropout: Rate after each hidden layer.
        action_tanh: End a continuous head with tanh, for actions in [-1, 1].
        discrete: Actions are classes: the head returns A logits.
        device: Where to build.
        dtype: Type of the parameters.

    Raises:
        ValueError: a size is not positive, or several choices are not discrete.
    """

    # one step of context is all it reads
    max_length = 1
    recurrent = True
    conditioned = False

    def __init__(
        self,
        state_dim: int | Sequence[int],
        act_dim: int | Sequence[int],
        hidden_size: int = 256,
        n_layer: int = 2,
        *,
        dropout: float = 0.1,
        action_tanh: bool = True,
        discrete: bool = False,
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
        ):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if len(options) > 1 and not discrete:
            raise ValueError(f"act_dim must be one number unless discrete, got {options}")
        self.choices = options if len(options) > 1 else ()
        self.act_dim, self.discrete = sum(options), discrete
        self.config: dict[str, object] = {
            "state_dim": plain(self.state_shape),
            "act_dim": plain(options),
            "hidden_size": hidden_size,
            "n_layer": n_layer,
            "dropout": dropout,
            "action_tanh": action_tanh,
            "discrete": discrete,
        }
        layers: list[nn.Module] = []
        width = self.state_shape[0]
        if len(self.state_shape) > 1:
            layers.append(ImageEncoder(self.state_shape, hidden_size, device=device, dtype=dtype))
            width = hidden_size
        for _ in range(n_layer):
            layers += [nn.Linear(width, hidden_size, device=device, dtype=dtype), nn.GELU()]
            layers.append(nn.Dropout(dropout))
            width = hidden_size
        layers.append(nn.Linear(width, self.act_dim, device=device, dtype=dtype))
        if action_tanh and not discrete:
            layers.append(nn.Tanh())
        self.layers = nn.Sequential(*layers)

    def forward(
        self,
        states: Tensor,
        actions: Tensor,
        returns_to_go: Tensor,
        timesteps: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Actions (B, K, A) from states (B, K, S); the other arguments are not read.

        Raises:
            ValueError: states are not (B, K, S).
        """
        if states.shape[2:] != self.state_shape:
            wanted = ", ".join(map(str, ("B", "K", *self.state_shape)))
            raise ValueError(f"states must be ({wanted}), got {tuple(states.shape)}")
        return self.layers(states)

    def init_state(self, batch: int) -> list[dict[str, Tensor]]:
        """Nothing: the past is not read."""
        return []

    def step(
        self,
        states: Tensor,
        previous_actions: Tensor,
        returns_to_go: Tensor,
        timesteps: Tensor,
        carried: list[dict[str, Tensor]],
        first: Tensor | None = None,
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Actions (B, A) from states (B, S)."""
        return self.layers(states), carried
