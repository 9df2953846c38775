"""Learning online: better with play, the same after being stopped, and careful with files."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scanweave.core.training import TrainConfig
from scanweave.rl import Agent, BehaviourCloning, DecisionMamba, record_episodes
from scanweave.rl.online import OnlineConfig, fine_tune
from scanweave.rl.train import Config, train

SMALL = OnlineConfig(rounds=3, episodes=2, updates=3, batch_size=8, buffer=4)


def make(env_id="Pendulum-v1"):
    episodes = record_episodes(env_id, 6, seed=1)
    bounds = {"action_low": [-2], "action_high": [2]} if env_id == "Pendulum-v1" else {}
    torch.manual_seed(0)
    discrete = not bounds
    sizes = (4, 2) if discrete else (3, 1)
    model = DecisionMamba(*sizes, 8, 1, 3, dropout=0.1, discrete=discrete)
    return Agent.from_episodes(model, episodes, env_id=env_id, **bounds), episodes


def run(folder, config=SMALL, env_id="Pendulum-v1", **options):
    agent, episodes = make(env_id)
    result = fine_tune(
        agent, episodes, config, folder=folder, env_id=env_id, eval_episodes=1, **options
    )
    return agent, result


def weights(agent):
    return torch.cat([value.flatten() for value in agent.state_dict().values()])


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_resumed_runs_end_at_the_same_weights(tmp_path, env_id):
    whole, _ = run(tmp_path / "whole", env_id=env_id)
    run(tmp_path / "parts", replace(SMALL, rounds=1), env_id)
    # what a kill in the middle of round 2 leaves behind
    (tmp_path / "parts" / "round-00002.npz").write_bytes(b"half")
    parts, _ = run(tmp_path / "parts", env_id=env_id, resume=True)
    assert torch.equal(weights(whole), weights(parts))
    assert not torch.equal(weights(whole), weights(make(env_id)[0]))
    rows = (tmp_path / "whole" / "rounds.csv").read_text()
    assert rows == (tmp_path / "parts" / "rounds.csv").read_text()
    assert len(rows.splitlines()) == 4
    stored = Agent.load(tmp_path / "parts" / "agent")
    assert torch.equal(weights(stored), weights(parts))
    # nothing is left to do
    again, _ = run(tmp_path / "parts", env_id=env_id, resume=True)
    assert torch.equal(weights(again), weights(parts))


def test_played_episodes_are_labelled_with_what_they_earned(tmp_path):
    run(tmp_path, replace(SMALL, target=(-50.0,), noise=0.5))
    with np.load(tmp_path / "round-00003.npz") as file:
        assert {name.split("/")[0] for name in file.files} == {"0", "1"}
        actions = file["0/actions"]
    assert np.abs(actions).max() <= 2
    assert np.abs(np.diff(actions[:, 0])).std() > 0.1


def test_files_of_other_runs_are_kept(tmp_path):
    run(tmp_path, replace(SMALL, rounds=1))
    with pytest.raises(ValueError, match="output_dir must be free, or resume or overwrite set"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"online settings must be those of .* got new \['lr'\]"):
        run(tmp_path, replace(SMALL, lr=1e-4), resume=True)
    before = (tmp_path / "rounds.csv").read_text()
    run(tmp_path, replace(SMALL, rounds=1, noise=0.4), overwrite=True)
    assert (tmp_path / "rounds.csv").read_text() != before


def test_what_cannot_learn_online(tmp_path):
    agent, episodes = make()
    with pytest.raises(ValueError, match="env_id must be given to learn online, got none"):
        fine_tune(agent, episodes, SMALL, folder=tmp_path, env_id="")
    clone = Agent.from_episodes(BehaviourCloning(3, 1, 8, 1), episodes)
    with pytest.raises(ValueError, match="agent must take a target to learn online"):
        fine_tune(clone, episodes, SMALL, folder=tmp_path, env_id="Pendulum-v1")
    for change, message in (
        ({"updates": 0}, r"online\.updates must be at least 1, got 0"),
        ({"noise": -1.0}, r"online\.rounds and online\.noise must be at least 0, got 0 and -1"),
        ({"target": (1.0, 2.0)}, r"online\.target must be one number, got"),
    ):
        with pytest.raises(ValueError, match=message):
            OnlineConfig(**change)
    with pytest.raises(FloatingPointError, match=r"loss must be finite, got .* lower online\.lr"):
        run(tmp_path, replace(SMALL, lr=1e30, updates=5))


def test_the_training_script_goes_on_online(tmp_path):
    loop = TrainConfig(
        output_dir=tmp_path, max_steps=2, batch_size=8, progress=False, cpu=True, tensorboard=False
    )
    config = Config(
        episodes=4,
        hidden_size=8,
        n_layer=1,
        context=3,
        eval_episodes=1,
        baselines=False,
        online=SMALL,
        train=loop,
    )
    first = train(config)
    assert first["online"].results[0].returns
    text = (tmp_path / "evaluation.csv").read_text()
    assert "agent, online" in text
    again = train(replace(config, train=replace(loop, resume=True)))
    assert torch.equal(weights(again["agent"]), weights(first["agent"]))
