"""Behaviour cloning: the control that every return-conditioned agent is compared with.

    BehaviourCloning   an MLP from the present state to the action

It reads neither the return wanted nor the past, so it plays the average of its data; trained on
`top_episodes(episodes, 0.1)` it is "10 % BC". Both tasks here are fully observed, so the present
state is enough to play well, and the difference to `DecisionMamba` is what conditioning brings.
Its `forward` takes the same arguments, so that data, agent, training and evaluation are shared.

Source: the baseline of Chen et al. 2021, arXiv 2106.01345, section 4 (there over K states).
"""

import torch
from torch import Tensor, nn


class BehaviourCloning(nn.Module):
    """Predict each action from its state alone.

    Args:
        state_dim: Channels of a (flat) state, S.
        act_dim: Channels of a continuous action, or the number of choices, A.
        hidden_size: Width of the hidden layers.
        n_layer: Hidden layers.
        dropout: Rate after each hidden layer.
        action_tanh: End a continuous head with tanh, for actions in [-1, 1].
        discrete: Actions are classes: the head returns A logits.
        device: Where to build.
        dtype: Type of the parameters.

    Raises:
        ValueError: a size is not positive.
    """

    # one step of context is all it reads
    max_length = 1
    recurrent = True
    conditioned = False

    def __init__(
        self,
        state_dim: int,
        act_dim: int,
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
        for name, size in (
            ("state_dim", state_dim),
            ("act_dim", act_dim),
            ("hidden_size", hidden_size),
            ("n_layer", n_layer),
        ):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.state_dim, self.act_dim, self.discrete = state_dim, act_dim, discrete
        self.config: dict[str, object] = {
            "state_dim": state_dim,
            "act_dim": act_dim,
            "hidden_size": hidden_size,
            "n_layer": n_layer,
            "dropout": dropout,
            "action_tanh": action_tanh,
            "discrete": discrete,
        }
        layers: list[nn.Module] = []
        width = state_dim
        for _ in range(n_layer):
            layers += [nn.Linear(width, hidden_size, device=device, dtype=dtype), nn.GELU()]
            layers.append(nn.Dropout(dropout))
            width = hidden_size
        layers.append(nn.Linear(width, act_dim, device=device, dtype=dtype))
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
        if states.ndim != 3 or states.shape[2] != self.state_dim:
            raise ValueError(f"states must be (B, K, {self.state_dim}), got {tuple(states.shape)}")
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
