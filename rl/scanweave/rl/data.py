"""Episodes and the training windows cut from them.

Letters: T steps of an episode, N steps of all episodes, K steps of a window, B batch,
S state channels, A action channels.

    Episode                    one trajectory, whatever file or environment it came from
    episodes_from_trajectories list of dicts (the layout of the Decision Transformer) -> episodes
    top_episodes               the best share of a data set, for 10 % behaviour cloning
    clip_actions               keep recorded actions inside the environment's bounds
    state_statistics           mean and standard deviation of every state channel
    return_statistics          what an agent's checkpoint remembers about its data
    fingerprint                a hash of all steps, to tell whether data is the same
    TrajectoryWindows          data set of windows, batched by index arithmetic
    keep_batch                 collate function for it
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(eq=False)
class Episode:
    """One trajectory: what was seen, done and earned at each of T steps.

    Arrays are cast once: floats to float32 (uint8 images stay), discrete actions to int64.

    Attributes:
        states: Observations before each action, (T, ...).
        actions: Actions, (T, A) float32; when discrete (T,) int64, or (T, M) of M choices.
        rewards: Rewards that followed the actions, (T,) float32.
        terminated: The task ended (fell, reached the goal): no value after the last step.
        truncated: A time limit cut the episode.
        final_state: Observation after the last action, when known.
        meta: Facts about the episode's origin.

    Raises:
        ValueError: no steps, lengths that differ, or a value that is not finite.
    """

    states: NDArray
    actions: NDArray
    rewards: NDArray
    terminated: bool = False
    truncated: bool = False
    final_state: NDArray | None = None
    meta: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states = _observed("states", self.states)
        self.rewards = _column("rewards", self.rewards).astype(np.float32)
        self.actions = _chosen(self.actions)
        if self.states.ndim < 2:
            raise ValueError(f"states must be (T, ...), got {self.states.shape}")
        if len(self.rewards) == 0:
            raise ValueError("rewards must hold at least one step, got none")
        for name, array in (("states", self.states), ("actions", self.actions)):
            if len(array) != len(self.rewards):
                raise ValueError(
                    f"{name} must have one row per reward, "
                    f"got {len(array)} rows and {len(self.rewards)} rewards"
                )
        for name in ("states", "actions", "rewards"):
            require_finite(name, getattr(self, name))
        if self.final_state is not None:
            self.final_state = _observed("final_state", self.final_state)
            if self.final_state.shape != self.states.shape[1:]:
                raise ValueError(
                    f"final_state must have a state's shape {self.states.shape[1:]}, "
                    f"got {self.final_state.shape}"
                )

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def total_reward(self) -> float:
        """Undiscounted sum of the rewards."""
        return float(self.rewards.sum(dtype=np.float64))


def episodes_from_trajectories(
    trajectories: Sequence[Mapping[str, ArrayLike]],
) -> list[Episode]:
    """Read trajectory dicts in the layout that the Decision Transformer's data files use.

    Args:
        trajectories: Dicts with `observations` (T, ...), `actions`, `rewards` (T,), and
            optionally `next_observations` and the flags `terminals` (or `dones`), `timeouts`.

    Raises:
        ValueError: a key is absent or an array is not as described; the message names the
            trajectory, the key and the row.

    Example:
        >>> steps = {"observations": [[0.0], [1.0]], "actions": [[0.5], [0.5]], "rewards": [1, 2]}
        >>> episodes_from_trajectories([steps])[0].total_reward
        3.0
    """
    episodes = []
    for number, trajectory in enumerate(trajectories):
        for key in ("observations", "actions", "rewards"):
            if key not in trajectory:
                raise ValueError(f"trajectories[{number}] must have {key!r}, got {[*trajectory]}")
        following = trajectory.get("next_observations")
        try:
            episode = Episode(
                states=np.asarray(trajectory["observations"]),
                actions=np.asarray(trajectory["actions"]),
                rewards=np.asarray(trajectory["rewards"]),
                terminated=_last_flag(trajectory, ("terminals", "dones")),
                truncated=_last_flag(trajectory, ("timeouts",)),
                final_state=None if following is None else np.asarray(following)[-1],
            )
        except (ValueError, IndexError) as error:
            raise ValueError(f"trajectories[{number}]: {error}") from error
        episodes.append(episode)
    return episodes


def top_episodes(episodes: Sequence[Episode], share: float) -> list[Episode]:
    """The episodes with the highest returns, until they hold `share` of all steps.

    Cloning only these is the "10 % BC" baseline. At least one episode is kept.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    ranked = sorted(_nonempty(episodes), key=lambda episode: episode.total_reward, reverse=True)
    steps = np.cumsum([len(episode) for episode in ranked])
    return ranked[: max(1, int(np.searchsorted(steps, share * steps[-1], side="right")))]


def clip_actions(episodes: Sequence[Episode], low: NDArray, high: NDArray) -> list[Episode]:
    """Copies of the episodes with continuous actions clipped to the bounds, each (A,)."""
    return [replace(e, actions=np.clip(e.actions, low, high)) for e in _nonempty(episodes)]


def state_statistics(episodes: Sequence[Episode]) -> tuple[NDArray, NDArray]:
    """Mean and standard deviation (plus 1e-6) over all states, each of a state's shape.

    Images are not standardised: for uint8 states the two are 0 and 255, of shape (1,).
    """
    if _nonempty(episodes)[0].states.dtype == np.uint8:
        return np.zeros(1, dtype=np.float32), np.full(1, 255, dtype=np.float32)
    states = np.concatenate([episode.states for episode in _nonempty(episodes)])
    mean = states.mean(axis=0, dtype=np.float64)
    std = states.std(axis=0, dtype=np.float64) + 1e-6
    return mean.astype(np.float32), std.astype(np.float32)


def return_statistics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Counts, mean, extremes and quantiles of the episodes' returns."""
    returns = np.array([episode.total_reward for episode in _nonempty(episodes)])
    quantiles = {f"q{q:02d}": float(np.quantile(returns, q / 100)) for q in (10, 25, 50, 75, 90)}
    return {
        "episodes": len(episodes),
        "steps": sum(len(episode) for episode in episodes),
        "mean": float(returns.mean()),
        "std": float(returns.std()),
        "min": float(returns.min()),
        "max": float(returns.max()),
        **quantiles,
    }


def fingerprint(episodes: Sequence[Episode]) -> str:
    """SHA-256 of states, actions, rewards and ends, whatever file they came from."""
    digest = hashlib.sha256()
    for episode in _nonempty(episodes):
        for array in (episode.states, episode.actions, episode.rewards):
            digest.update(f"{array.shape} {array.dtype.str}".encode())
            digest.update(np.ascontiguousarray(array).data)
        digest.update(bytes([episode.terminated, episode.truncated]))
    return digest.hexdigest()


class TrajectoryWindows(Dataset[dict[str, Tensor]]):
    """Windows of K steps, one for every step of every episode as its start.

    Drawing indices uniformly equals the sampling of the Decision Transformer: an episode with
    probability proportional to its length, then a uniform start. A window that would pass its
    episode's end is padded on the left with zeros and masked there. Everything lies in flat
    arrays, so that a batch is a few gathers: no Python loop over steps or samples.

    An item is a dict: `states` (K, S), `actions` (K, A) or (K,), `returns_to_go` (K, 1),
    `timesteps` (K,) int64 and `mask` (K,) bool, True at real steps. States are not normalised
    and returns are not scaled: that belongs to the agent. `DataLoader` asks for whole batches
    through `__getitems__`; give it `collate_fn=keep_batch`.

    Args:
        episodes: At least one; all with the same state and action shapes.
        length: K.

    Raises:
        ValueError: no episodes, shapes that differ between episodes, or length < 1.
    """

    def __init__(self, episodes: Sequence[Episode], length: int) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        first = _nonempty(episodes)[0]
        for number, episode in enumerate(episodes):
            for name in ("states", "actions"):
                got, want = getattr(episode, name), getattr(first, name)
                if got.shape[1:] != want.shape[1:] or got.dtype != want.dtype:
                    raise ValueError(
                        f"episodes[{number}].{name} must be {want.shape[1:]} {want.dtype} per "
                        f"step as in episodes[0], got {got.shape[1:]} {got.dtype}"
                    )
        self.length = length
        self.states = torch.from_numpy(np.concatenate([e.states for e in episodes]))
        self.actions = torch.from_numpy(np.concatenate([e.actions for e in episodes]))
        lengths = np.array([len(e) for e in episodes])
        ends = np.cumsum(lengths)
        rewards = np.concatenate([e.rewards for e in episodes])
        # float64: the difference of two sums over a million steps must keep a reward's digits
        paid = np.cumsum(rewards, dtype=np.float64)
        to_go = np.repeat(paid[ends - 1], lengths) - paid + rewards
        self.returns_to_go = torch.from_numpy(to_go.astype(np.float32))
        self.starts = torch.from_numpy(np.repeat(ends - lengths, lengths))
        self.ends = torch.from_numpy(np.repeat(ends, lengths))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """One batch: the dict of an item with a leading batch axis."""
        start = torch.as_tensor(indices, dtype=torch.int64)
        if len(start) and not 0 <= int(start.min()) <= int(start.max()) < len(self):
            raise IndexError(f"window indices must be in 0..{len(self) - 1}, got {indices}")
        pads = (self.length - (self.ends[start] - start)).clamp(min=0)
        offset = torch.arange(self.length) - pads[:, None]
        mask = offset >= 0
        rows = start[:, None] + offset.clamp(min=0)
        return {
            "states": _zero_pads(self.states[rows], mask),
            "actions": _zero_pads(self.actions[rows], mask),
            "returns_to_go": _zero_pads(self.returns_to_go[rows].unsqueeze(-1), mask),
            "timesteps": _zero_pads(rows - self.starts[start][:, None], mask),
            "mask": mask,
        }


def keep_batch(batch: Any) -> dict[str, Tensor]:
    """Collate function for data sets whose `__getitems__` returns a finished batch."""
    return batch


def require_finite(name: str, array: NDArray) -> None:
    """Raise a `ValueError` that names the first row with a NaN or an infinity."""
    if not np.issubdtype(array.dtype, np.floating):
        return
    bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"{name} must be finite, got {array[row]} at row {row}")


def _zero_pads(values: Tensor, mask: Tensor) -> Tensor:
    return values * mask.view(*mask.shape, *[1] * (values.ndim - 2)).to(values.dtype)


def _observed(name: str, values: ArrayLike) -> NDArray:
    array = np.asarray(values)
    if array.dtype == np.uint8:
        return array
    if np.issubdtype(array.dtype, np.number):
        return array.astype(np.float32)
    raise ValueError(f"{name} must hold numbers, got dtype {array.dtype}")


def _chosen(values: ArrayLike) -> NDArray:
    """int64 (T,) or (T, M) from whole numbers, float32 (T, A) from (T, A) or (T,) floats."""
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.integer):
        several = array.ndim == 2 and array.shape[1] > 1
        choices = (array if several else _column("actions", array)).astype(np.int64)
        if (choices < 0).any():
            raise ValueError(f"discrete actions must be at least 0, got {choices.min()}")
        return choices
    if not np.issubdtype(array.dtype, np.floating) or array.ndim not in (1, 2):
        raise ValueError(f"actions must be (T, A) or (T,) numbers, got {array.shape} {array.dtype}")
    return (array[:, None] if array.ndim == 1 else array).astype(np.float32)


def _column(name: str, values: ArrayLike) -> NDArray:
    """(T,) from (T,) or (T, 1)."""
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype == object:
        raise ValueError(f"{name} must be (T,) numbers, got {array.shape} {array.dtype}")
    return array


def _last_flag(trajectory: Mapping[str, ArrayLike], names: Sequence[str]) -> bool:
    for name in names:
        if name in trajectory:
            return bool(_column(name, trajectory[name])[-1])
    return False


def _nonempty(episodes: Sequence[Episode]) -> Sequence[Episode]:
    if not episodes:
        raise ValueError("episodes must hold at least one episode, got none")
    return episodes
