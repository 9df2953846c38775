"""The table of agents and the measurement of speed: every set, every method, at toy size."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks import rl_job, rl_official, rl_speed, rl_table
from benchmarks.rl_models import METHODS, SETS, settings

from scanweave.rl.train import build_model, load_data


def options(data_dir: Path, **changed):
    given = {
        "data_dir": data_dir,
        "sets": list(SETS),
        "methods": list(METHODS),
        "seeds": 2,
        "steps": 3,
    }
    return argparse.Namespace(**{**given, **changed})


@pytest.fixture
def pendulum(tmp_path):
    """A file as the shared set's, of two episodes."""
    rng = np.random.default_rng(0)
    ends = np.arange(20) % 10 == 9
    (tmp_path / "rl_pendulum").mkdir()
    np.savez(
        tmp_path / SETS["Pendulum replay"].source,
        observations=rng.standard_normal((20, 3)),
        actions=rng.uniform(-2, 2, (20, 1)),
        rewards=-rng.random(20),
        terminals=np.zeros(20, bool),
        timeouts=ends,
    )
    return tmp_path


def test_jobs_are_of_sets_that_are_there(pendulum):
    jobs = rl_table.jobs(options(pendulum))
    recorded = [name for name in SETS if not SETS[name].source]
    assert {job.dataset for job in jobs} == {"Pendulum replay", *recorded}
    assert len(jobs) == 2 * (1 + len(recorded)) * len(METHODS)
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)


def test_methods_differ_in_what_is_compared_only(pendulum):
    configs = {
        name: settings("Pendulum replay", name, 0, folder=pendulum, data_dir=pendulum, steps=3)
        for name in METHODS
    }
    assert (
        len({(c.train.batch_size, c.train.lr, c.context, c.targets) for c in configs.values()}) == 1
    )
    assert configs["DecisionMamba official"].init == "official"
    assert configs["DecisionMamba official"].pad_mode == "official"
    spaces = load_data(configs["DecisionMamba"])[1]
    sizes = {
        name: sum(p.numel() for p in build_model(config, spaces).parameters())
        for name, config in configs.items()
        if not METHODS[name].share and name != "DecisionMamba official"
    }
    # equal widths; mixers hold what they hold
    assert max(sizes.values()) < 1.5 * min(sizes.values()), sizes


@pytest.mark.parametrize("method", ["DecisionMamba official", "10 % BC"])
def test_one_run(pendulum, method):
    found = rl_job.run(
        "Pendulum replay", method, 1, folder=pendulum / "run", data_dir=pendulum, steps=2
    )
    assert found["steps"] == 2
    returns = found["evaluation"]["results"]
    assert found["return"] == pytest.approx(np.mean(returns[0]["returns"]))
    assert found["best"] >= found["return"]
    assert len(returns) == (1 if method == "10 % BC" else 3)


def clocked():
    """A clock that moves by one whenever it is read, so that every call takes as long."""
    clocked.now += 1.0
    return clocked.now


clocked.now = 0.0


def test_speed_at_toy_size():
    found = list(rl_speed.rows([2], calls=3, clock=clocked, batch=2))
    acting = [row for row in found if row.what.startswith("act")]
    assert [row.what for row in acting] == [
        "act: protocol",
        *(f"act: {mode}" for mode in rl_speed.MODES),
    ]
    assert [row.envs for row in acting] == [1, 2, 2, 2, 2]
    # as long a call for two environments is twice as many steps
    assert [row.to_protocol for row in acting] == [1, 2, 2, 2, 2]
    assert {row.what for row in found if not row.envs} == {
        f"update: {mixer}" for mixer in ("mamba", "attention", "mamba2", "gated_cnn")
    }
    assert all(row.per_second > 0 and row.to_published == 0 for row in found)


def test_updates_are_timed_compiled_as_well(monkeypatch: pytest.MonkeyPatch):
    modes: list[str] = []
    monkeypatch.setattr(rl_speed.Agent, "compile", lambda _, mode: modes.append(mode))
    found = [row.what for row in rl_speed.rows([], calls=1, clock=clocked, batch=2, compiled="x")]
    assert found[4:] == [f"{name}, compiled x" for name in found[:4]]
    assert modes == ["x"] * 4


CODE = {
    "models/decision_mamba.py": """
import torch

class GPT2PreTrainedModel:
    pass

class DecisionMamba(torch.nn.Module):
    def __init__(self, state_dim, act_dim, hidden_size, model_type, **rest):
        super().__init__()
        self.model_type, self.layer = model_type, torch.nn.Linear(state_dim, act_dim)

    def forward(self, states, actions, returns_to_go, timesteps):
        return self.layer(states)
""",
    "util/trainer.py": """
import gym
import torch
from models.decision_transformer import DecisionTransformer

def evaluate_episode_rtg(env, state_dim, act_dim, model, max_ep_len, target_return,
                         state_mean, state_std, device):
    state = env.reset()
    for _ in range(max_ep_len):
        window = torch.tensor(state).float()[None, None]
        env.step(model(window, None, None, None)[0, -1].numpy())
    return 0.0, max_ep_len
""",
}


def test_the_published_code_takes_its_turns(tmp_path, monkeypatch):
    """With a checkout of the same form: its loop and its updates are timed beside ours."""
    for name, text in CODE.items():
        path = tmp_path / "gym" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    official = rl_official.load_official(
        tmp_path, state_dim=rl_speed.STATE, act_dim=3, length=20, device="cpu"
    )
    assert official.kind == "dmamba-min"
    found = list(rl_speed.rows([2], calls=2, clock=clocked, official=official, batch=2))
    for name in set(sys.modules) - before:
        if name.startswith(("models", "util", "gym", "mamba_ssm")):
            monkeypatch.delitem(sys.modules, name)
    rates = {row.what: row for row in found}
    assert rates["act: published (dmamba-min)"].to_published == 1
    assert rates["act: recurrent"].to_published == 2
    assert rates["update: published (dmamba-min)"].to_published == 1
    with pytest.raises(FileNotFoundError, match="no checkout of decision-mamba in"):
        rl_official.load_official(tmp_path / "no", state_dim=1, act_dim=1, length=1, device="cpu")


@pytest.mark.parametrize("mode", rl_speed.MODES)
def test_memory_of_an_environment_is_constant_in_its_length(mode):
    agent = rl_speed.make_agent()
    held = []
    for steps in (1, 30):
        agent.reset(num_envs=2, mode=mode)
        for t in range(steps):
            agent.act(np.zeros((2, rl_speed.STATE)), np.zeros(2) if t else None)
        held.append(rl_speed.held_bytes(agent._memory))
    assert held[0] == held[1] > 0
