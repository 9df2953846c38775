"""Minari data sets: read without its environment, write without jax.

    load_minari   id or `MinariDataset` -> episodes
    save_minari   episodes -> local data set, never over an existing one

`D4RL/...` and `mujoco/...` sets of Minari are new recordings in new environments: scores are not
those of D4RL's files of the same name.

Source: Farama Minari 0.5 (layout of its data sets).
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from .data import Episode
from .rollout import is_image

if TYPE_CHECKING:
    import gymnasium
    from minari import MinariDataset


def load_minari(dataset: "str | MinariDataset", *, download: bool = False) -> list[Episode]:
    """Read a Minari data set; Dict and Tuple observations are flattened as `make_envs` does.

    Args:
        dataset: Id of a local data set, such as `D4RL/door/human-v2`, or an opened one.
        download: Fetch it if it is not on this machine.

    Raises:
        FileNotFoundError: it is not on this machine and `download` is False.
        ValueError: it is empty or an episode is damaged; the message names id, episode, key
            and row.
        ImportError: minari is not installed.
    """
    minari = _minari()
    opened = (
        minari.load_dataset(dataset, download=download) if isinstance(dataset, str) else dataset
    )
    name = opened.spec.dataset_id
    episodes = []
    for recorded in opened.iterate_episodes():
        try:
            seen = _rows(opened.observation_space, recorded.observations)
            episode = Episode(
                states=seen[:-1],
                actions=np.asarray(recorded.actions),
                rewards=np.asarray(recorded.rewards),
                terminated=bool(np.asarray(recorded.terminations)[-1]),
                truncated=bool(np.asarray(recorded.truncations)[-1]),
                final_state=seen[-1],
                meta={"source": name, "episode": int(recorded.id)},
            )
        except (ValueError, IndexError) as error:
            raise ValueError(f"{name}: episode {recorded.id}: {error}") from error
        episodes.append(episode)
    if not episodes:
        raise ValueError(f"{name}: must hold at least one episode, got none")
    return episodes


def save_minari(
    dataset_id: str,
    episodes: Sequence[Episode],
    *,
    env: "str | gymnasium.Env[Any, Any] | None" = None,
    observation_space: "gymnasium.Space[Any] | None" = None,
    action_space: "gymnasium.Space[Any] | None" = None,
    description: str = "",
) -> "MinariDataset":
    """Write episodes as a local Minari data set; images are kept as they are, not as JPEG.

    Args:
        dataset_id: As Minari wants it; `local/<environment>/<what>-v0` for own recordings.
        episodes: Each with its `final_state`.
        env: Environment or its id, for the spaces and for those who evaluate.
        observation_space: Where there is no `env`, or its observations were flattened.
        action_space: Where there is no `env`.
        description: Free text.

    Raises:
        ValueError: no episodes, one without its final state, or no spaces.
        FileExistsError: the data set exists.
        ImportError: minari is not installed.
    """
    if not episodes:
        raise ValueError("episodes must hold at least one episode, got none")
    missing = [i for i, episode in enumerate(episodes) if episode.final_state is None]
    if missing:
        raise ValueError(f"episodes must have a final_state, got none in episode {missing[0]}")
    if env is None and (observation_space is None or action_space is None):
        raise ValueError("env must be given, or observation_space and action_space, got neither")
    minari = _minari()
    from minari.data_collector.episode_buffer import EpisodeBuffer

    if dataset_id in minari.list_local_datasets():
        raise FileExistsError(f"{dataset_id} exists: choose another id, or delete it with minari")
    buffers = []
    for number, episode in enumerate(episodes):
        flags = np.zeros(len(episode), dtype=bool)
        ended, cut = flags.copy(), flags.copy()
        # Minari wants every episode to end
        ended[-1], cut[-1] = episode.terminated, not episode.terminated
        buffers.append(
            EpisodeBuffer(
                id=number,
                seed=_seed(episode),
                observations=list(_all_states(episode)),
                actions=list(episode.actions),
                rewards=episode.rewards.tolist(),
                terminations=ended.tolist(),
                truncations=cut.tolist(),
            )
        )
    image = observation_space is not None and is_image(observation_space)
    with warnings.catch_warnings():
        # no other environment to evaluate in, or none at all, is fine
        warnings.filterwarnings("ignore", "`eval_env` is set|env_spec is None", UserWarning)
        return minari.create_dataset_from_buffers(
            dataset_id=dataset_id,
            buffer=buffers,
            env=env,
            observation_space=observation_space,
            action_space=action_space,
            description=description or "recorded with scanweave.rl",
            # these fields are only asked for to warn about
            algorithm_name="see description",
            author="unknown",
            author_email="unknown",
            code_permalink="unknown",
            # JPEG loses pixels; minari before 0.5.4 has no such argument
            **({"jpeg_encoding": False} if image else {}),
        )


def _all_states(episode: Episode) -> NDArray:
    return np.concatenate([episode.states, np.asarray(episode.final_state)[None]])


def _seed(episode: Episode) -> int | None:
    seed = episode.meta.get("seed")
    return seed if isinstance(seed, int) else None


def _rows(space: "gymnasium.Space[Any]", values: Any) -> NDArray:
    """Observations (T + 1, ...) of an episode, flat unless they are images."""
    if is_image(space):
        return np.asarray(values)
    if isinstance(space, spaces.Dict):
        parts = [_rows_flat(part, values[key]) for key, part in space.spaces.items()]
        return np.concatenate(parts, axis=1)
    if isinstance(space, spaces.Tuple):
        parts = [_rows_flat(part, value) for part, value in zip(space, values, strict=True)]
        return np.concatenate(parts, axis=1)
    return _rows_flat(space, values)


def _rows_flat(space: "gymnasium.Space[Any]", values: Any) -> NDArray:
    """As `gymnasium.spaces.flatten`, for all rows at once."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        return _rows(space, values)
    array = np.asarray(values)
    if isinstance(space, spaces.Discrete):
        return np.eye(int(space.n), dtype=np.float32)[array.reshape(-1) - space.start]
    return array.reshape(len(array), -1)


def _minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise ImportError("scanweave.rl needs minari: pip install 'scanweave[rl]'") from error
    return minari
