"""Facts about an agent that are not tensors.

AgentConfig       scale, targets, modes, origin
default_targets   returns to ask for, from the statistics of the data
"""

from dataclasses import dataclass, field


@dataclass
class AgentConfig:
    """What an agent knows besides tensors; everything here is JSON.

    Attributes:
        scale: Returns are divided by it before the model sees them.
        targets: Returns to ask for when `reset` names none; the first is the default.
        mode: How the past is remembered, one of `scanweave.rl.acting.MODES`.
        pad_mode: "masked": padding changes nothing. "official": padding is read, with the
            published model's values, in training and in acting.
        action_squash: The model's [-1, 1] is mapped to the action bounds, and actions never
            leave them. False: actions have no bounds and are the model's own (`action_tanh`
            must be False).
        cuda_graph: On a GPU, in a mode that carries a state, record the step once and replay it.
        env_id: Environment the agent was made for.
        data: Statistics and origin of the training data.
    """

    scale: float = 1.0
    targets: list[float] = field(default_factory=list)
    mode: str = "window"
    pad_mode: str = "masked"
    action_squash: bool = True
    cuda_graph: bool = False
    env_id: str = ""
    data: dict[str, object] = field(default_factory=dict)


def default_targets(statistics: dict[str, float]) -> list[float]:
    """Returns to ask for, best first: the best in the data, beyond it, and evenly below it.

    "Beyond" adds half the distance between median and best. Multiples of the best would ask for
    less where returns are negative.
    """
    best, low = statistics["max"], statistics["q10"]
    beyond = best + 0.5 * (best - statistics["q50"])
    below = [best - share * (best - low) for share in (1 / 3, 2 / 3, 1.0)]
    return list(dict.fromkeys([best, beyond, *below]))
