"""Evaluation: figures that depend on seeds and targets, not on how rows are batched."""

import json
import sys

import numpy as np
import pytest
import torch

from scanweave.rl import Agent, AgentConfig, BehaviourCloning, DecisionMamba, evaluate_agent
from scanweave.rl.evaluate import main
from scanweave.rl.plot import plot_targets


@pytest.fixture
def agent():
    torch.manual_seed(0)
    model = DecisionMamba(4, 2, 16, 1, 4, discrete=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    config = AgentConfig(targets=[20.0, 40.0], scale=20.0, env_id="CartPole-v1")
    return Agent(model, config).eval()


def test_rows_side_by_side_change_nothing(agent):
    wide = evaluate_agent(agent, episodes=3)
    narrow = evaluate_agent(agent, episodes=3, num_envs=2)
    assert [r.target for r in wide.results] == [20.0, 40.0]
    assert [r.returns for r in wide.results] == [r.returns for r in narrow.results]
    assert wide.seeds == [10_000, 10_001, 10_002]
    assert wide.results[0].lengths == [int(r) for r in wide.results[0].returns]
    assert wide.steps == sum(sum(r.lengths) for r in wide.results)
    assert wide.best.mean == max(np.mean(r.returns) for r in wide.results)
    assert {"torch", "gymnasium"} <= wide.versions.keys()


def test_figures_equal_a_plain_loop(agent):
    import gymnasium

    result = evaluate_agent(agent, targets=[30.0], episodes=2, seed=7).results[0]
    env = gymnasium.make("CartPole-v1")
    for number, expected in enumerate(result.returns):
        obs, _ = env.reset(seed=7 + number)
        agent.reset(30.0)
        reward, total, over = None, 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(int(agent.act(obs, reward)))
            total, over = total + float(reward), terminated or truncated
        assert total == expected


def test_an_agent_without_targets_plays_once():
    agent = Agent(BehaviourCloning(4, 2, 8, discrete=True))
    evaluation = evaluate_agent(agent, "CartPole-v1", episodes=2, targets=[1.0, 2.0])
    assert [result.target for result in evaluation.results] == [None]
    assert evaluation.rows()[0]["episodes"] == 2
    assert evaluation.document()["env_id"] == "CartPole-v1"


def test_bad_arguments(agent):
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        evaluate_agent(agent, episodes=0)
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        evaluate_agent(agent, num_envs=0)
    with pytest.raises(ValueError, match="targets must hold a return, got none"):
        evaluate_agent(agent, targets=[])
    agent.config.env_id = ""
    with pytest.raises(ValueError, match="env_id must be given"):
        evaluate_agent(agent)


def test_picture(agent, tmp_path):
    evaluation = evaluate_agent(agent, episodes=2)
    cloning = evaluate_agent(
        Agent(BehaviourCloning(4, 2, 8, discrete=True)), "CartPole-v1", episodes=2
    )
    path = plot_targets(evaluation, tmp_path / "plots" / "t.png", {"BC": cloning})
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="evaluation must be of an agent that takes targets"):
        plot_targets(cloning, path)


def test_drawn_actions_repeat_with_the_seed(agent):
    one = evaluate_agent(agent, episodes=2, deterministic=False)
    state = torch.get_rng_state()
    two = evaluate_agent(agent, episodes=2, deterministic=False)
    assert [r.returns for r in one.results] == [r.returns for r in two.results]
    assert torch.equal(torch.get_rng_state(), state)
    sure = evaluate_agent(agent, episodes=2)
    assert [r.returns for r in one.results] != [r.returns for r in sure.results]


def test_command_line(agent, tmp_path, monkeypatch, capsys):
    agent.save(tmp_path / "agent")
    options = (
        f"--agent {tmp_path}/agent --targets 30 --episodes 2 --max-episode-steps 9 --score hopper "
        f"--json {tmp_path}/out/found.json"
    )
    monkeypatch.setattr(sys, "argv", ["evaluate", *options.split()])
    main()
    assert "seeds 10000 to 10001; " in capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "found.json").read_text())
    assert max(document["results"][0]["lengths"]) <= 9
    assert document["results"][0]["target"] == 30.0
