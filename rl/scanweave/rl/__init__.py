"""Decision Mamba agents for offline reinforcement learning.

data        Episode, TrajectoryWindows, load_episodes and the readers behind it
recording   record_episodes, RecordEpisodes, save_d4rl, save_minari
models      DecisionMamba, AtariDecisionMamba, load_official, BehaviourCloning
acting      Agent: loss, reset, act, save, load
measuring   evaluate_agent
"""

from .agent import Agent
from .agent_config import AgentConfig, default_targets
from .atari import AtariDecisionMamba
from .cloning import BehaviourCloning
from .columns import episodes_from_columns
from .controllers import CONTROLLERS, Controller
from .d4rl import load_d4rl, save_d4rl
from .d4rl_files import D4RL_IDS, find_d4rl
from .data import (
    Episode,
    TrajectoryWindows,
    clip_actions,
    episodes_from_trajectories,
    fingerprint,
    keep_batch,
    return_statistics,
    state_statistics,
    top_episodes,
)
from .evaluate import Evaluation, TargetResult, evaluate_agent
from .minari_data import load_minari, save_minari
from .model import DecisionMamba
from .official import export_official, load_official
from .old_gym import OldGym
from .record import record_episodes
from .recorder import RecordEpisodes, RecordVectorEpisodes
from .rollout import Spaces, make_envs, play, read_spaces
from .scores import normalized_score, reference_returns
from .sources import load_episodes

__all__ = [
    "CONTROLLERS",
    "D4RL_IDS",
    "Agent",
    "AgentConfig",
    "AtariDecisionMamba",
    "BehaviourCloning",
    "Controller",
    "DecisionMamba",
    "Episode",
    "Evaluation",
    "OldGym",
    "RecordEpisodes",
    "RecordVectorEpisodes",
    "Spaces",
    "TargetResult",
    "TrajectoryWindows",
    "clip_actions",
    "default_targets",
    "episodes_from_columns",
    "episodes_from_trajectories",
    "evaluate_agent",
    "export_official",
    "find_d4rl",
    "fingerprint",
    "keep_batch",
    "load_d4rl",
    "load_episodes",
    "load_minari",
    "load_official",
    "make_envs",
    "normalized_score",
    "play",
    "read_spaces",
    "record_episodes",
    "reference_returns",
    "return_statistics",
    "save_d4rl",
    "save_minari",
    "state_statistics",
    "top_episodes",
]
