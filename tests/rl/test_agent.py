"""The agent: loss, acting in environment units, and a folder that is enough to act."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scanweave.rl import (
    Agent,
    AgentConfig,
    BehaviourCloning,
    DecisionMamba,
    Episode,
    TrajectoryWindows,
    default_targets,
    load_official,
    return_statistics,
)


def make_model(discrete=False, **change):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "n_layer": 1, "max_length": 4, "discrete": discrete}
    model = DecisionMamba(3, 2, **{**sizes, **change})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def make_episodes(discrete=False, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Episode(
            2 + 3 * rng.standard_normal((n, 3)),
            rng.integers(2, size=n) if discrete else rng.uniform(-2, 6, (n, 2)),
            rng.standard_normal(n) - 1,
        )
        for n in (9, 6)
    ]


def make_agent(discrete=False, **change):
    bounds = {} if discrete else {"action_low": [-2, -2], "action_high": [6, 8]}
    episodes = make_episodes(discrete)
    return Agent.from_episodes(make_model(discrete), episodes, **bounds, **change)


def run(agent, steps=12, rows=3, seed=0, **options):
    """Actions for a fixed course of observations and rewards; row 1 begins anew at step 5."""
    rng = np.random.default_rng(seed)
    agent.reset(num_envs=rows, **options)
    actions = []
    for t in range(steps):
        done = np.zeros(rows, dtype=bool)
        done[1] = t == 5
        reward = rng.standard_normal(rows) if t else None
        actions.append(agent.act(2 + rng.standard_normal((rows, 3)), reward, done))
    return np.stack(actions)


@pytest.mark.parametrize("discrete", [False, True])
def test_loss_counts_real_steps_only(discrete):
    agent = make_agent(discrete).eval()
    windows = TrajectoryWindows(make_episodes(discrete), 4)
    batch = windows.__getitems__(range(len(windows)))
    loss, metrics = agent(batch)
    actions = batch["actions"]
    if not discrete:
        actions = (actions - torch.tensor([2.0, 3.0])) / torch.tensor([4.0, 5.0])
    predictions = agent.model(
        (batch["states"] - agent.state_mean) / agent.state_std,
        actions,
        batch["returns_to_go"] / agent.config.scale,
        batch["timesteps"],
        mask=batch["mask"],
    )
    chosen, real = predictions[batch["mask"]], actions[batch["mask"]]
    if discrete:
        expected = torch.nn.functional.cross_entropy(chosen, real)
        assert metrics["accuracy"] == (chosen.argmax(-1) == real).float().mean()
    else:
        expected = (chosen - real).square().mean()
    torch.testing.assert_close(loss, expected)
    # what stands in the padding must not matter
    poisoned = {**batch, "states": batch["states"].masked_fill(~batch["mask"][..., None], 9.0)}
    torch.testing.assert_close(agent(poisoned)[0], loss)


def test_official_padding_is_the_published_batch():
    """Pads are raw state 0, action -10, return 0, timestep 0, and they are read."""
    agent = make_agent(pad_mode="official").eval()
    batch = TrajectoryWindows(make_episodes(), 4).__getitems__([7, 8])
    mask = batch["mask"]
    assert mask.sum() == 3
    actions = (batch["actions"] - torch.tensor([2.0, 3.0])) / torch.tensor([4.0, 5.0])
    targets = actions.clone()
    actions[~mask] = -10
    predictions = agent.model(
        (batch["states"] - agent.state_mean) / agent.state_std,
        actions,
        batch["returns_to_go"] / agent.config.scale,
        batch["timesteps"],
    )
    expected = (predictions[mask] - targets[mask]).square().mean()
    torch.testing.assert_close(agent(batch)[0], expected)


def test_a_tiny_data_set_is_learnt_by_heart():
    torch.manual_seed(0)
    episodes = make_episodes()
    agent = Agent.from_episodes(
        DecisionMamba(3, 2, 32, 1, 4, dropout=0.0),
        episodes,
        action_low=[-2, -2],
        action_high=[6, 6],
    )
    batch = TrajectoryWindows(episodes, 4).__getitems__(range(15))
    optimizer = torch.optim.AdamW(agent.parameters(), lr=5e-3)
    first = agent(batch)[0].item()
    for _ in range(150):
        loss = agent(batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 100


@pytest.mark.parametrize("steps", [1, 2, 5, 19, 20, 21, 45])
@pytest.mark.parametrize("pad_mode", ["masked", "official"])
def test_acting_equals_the_published_get_action(goldens, steps, pad_mode):
    tensors = load_file(goldens / "dmamba_walker2d.safetensors")
    weights = {k[7:]: v for k, v in tensors.items() if k.startswith("weight/")}
    agent = Agent(load_official(weights), AgentConfig(pad_mode=pad_mode)).eval()
    inputs = {k[12:]: v[0].numpy() for k, v in tensors.items() if k.startswith("long_inputs/")}
    assert inputs["timesteps"].tolist() == list(range(45))
    to_go = inputs["returns_to_go"][:, 0].astype(float)
    agent.reset(to_go[0])
    for t in range(steps):
        before = slice(t - 1, t)
        action = agent.act(
            inputs["states"][t : t + 1],
            to_go[before] - to_go[t : t + 1] if t else None,
            prev_action=inputs["actions"][before] if t else None,
        )
    name = "get_action" if pad_mode == "official" else "get_action_unpadded"
    np.testing.assert_allclose(action[0], tensors[f"{name}/{steps}"], atol=1e-5)


@pytest.mark.parametrize("mode", ["window", "recurrent", "periodic", "staggered"])
@pytest.mark.parametrize("discrete", [False, True])
def test_rows_do_not_touch_each_other(mode, discrete):
    """Row 1 starts anew at step 5; every row acts as it would alone."""
    agent = make_agent(discrete).eval()
    together = run(agent, target_return=[1.0, 2.0, 3.0], mode=mode)
    rng = np.random.default_rng(0)
    course = [
        (rng.standard_normal(3) if t else None, 2 + rng.standard_normal((3, 3))) for t in range(12)
    ]
    for row in range(3):
        agent.reset(row + 1.0, mode=mode)
        for t, (reward, states) in enumerate(course):
            if row == 1 and t == 5:
                agent.reset(mode=mode)
                reward = None
            alone = agent.act(states[row], None if reward is None else reward[row])
            np.testing.assert_allclose(alone, together[t, row], atol=1e-5)


def test_actions_are_in_environment_units():
    agent = make_agent().eval()
    actions = run(agent, steps=20, seed=3)
    assert actions.dtype == np.float32
    assert (actions >= [-2, -2]).all()
    assert (actions <= [6, 8]).all()
    assert actions.min() < 0.5
    assert run(make_agent(discrete=True).eval()).dtype == np.int64


def test_targets_change_actions_and_rewards_count_down():
    agent = make_agent().eval()
    low, high = run(agent, target_return=-50.0), run(agent, target_return=50.0)
    assert np.abs(low - high).max() > 1e-3
    # 5 earned of 10 is the same as 5 asked for, two steps later
    states = np.ones((1, 3))
    for target, rewards in ((10.0, [2.0, 3.0]), (5.0, [0.0, 0.0])):
        agent.reset(target)
        agent.act(states)
        for reward in rewards:
            agent.act(states, [reward])
        if target == 10:
            expected = agent._running.to_go()
    assert agent._running.to_go() == expected == 5


def test_prev_action_overrides_what_was_chosen():
    agent = make_agent().eval()
    states = np.ones((2, 3))
    outputs = []
    for override in (None, "same", "other"):
        agent.reset()
        first = agent.act(states)
        given = {None: None, "same": first, "other": first + 1}[override]
        outputs.append(agent.act(states, [0.0, 0.0], prev_action=given))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3


def test_sampling_follows_the_distribution():
    agent = make_agent(discrete=True).eval()
    states = np.ones((4000, 3))
    agent.reset()
    greedy = agent.act(states)
    agent.reset()
    drawn = agent.act(states, deterministic=False)
    assert len(set(greedy.tolist())) == 1
    agent.reset()
    agent.act(states[:1])
    logits = agent.model(
        agent._normalise(torch.ones(1, 1, 3)),
        torch.zeros(1, 1, dtype=torch.int64),
        agent._scaled_to_go(agent._running)[None],
        torch.zeros(1, 1, dtype=torch.int64),
    )
    chance = logits.softmax(-1)[0, 0, 1].item()
    assert 0.02 < chance < 0.98
    assert drawn.mean() == pytest.approx(chance, abs=0.04)


def test_acting_drops_nothing_out_and_keeps_the_mode():
    agent = make_agent()
    agent.train()
    np.testing.assert_array_equal(run(agent), run(agent))
    assert agent.training
    assert agent.model.training


@pytest.mark.parametrize("kind", ["mamba", "attention", "cloning"])
def test_a_fresh_process_acts_alike_without_the_data(kind, tmp_path):
    model = BehaviourCloning(3, 2, 16) if kind == "cloning" else make_model(mixer=kind)
    agent = Agent.from_episodes(
        model, make_episodes(), action_low=[-2, -2], action_high=[6, 8], env_id="Some-v0"
    ).eval()
    states = np.random.default_rng(5).standard_normal((6, 2, 3))
    agent.reset()
    expected = [agent.act(states[t], None if t == 0 else [1.0, 2.0]) for t in range(6)]
    agent.save(tmp_path / "agent")
    np.save(tmp_path / "states.npy", states)
    code = (
        "import sys, numpy as np; from scanweave.rl import Agent; folder = sys.argv[1]\n"
        "agent = Agent.load(folder + '/agent'); states = np.load(folder + '/states.npy')\n"
        "agent.reset()\n"
        "out = [agent.act(states[t], None if t == 0 else [1.0, 2.0]) for t in range(6)]\n"
        "np.save(folder + '/out.npy', np.stack(out))\n"
    )
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=here)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), np.stack(expected))
    document = json.loads((tmp_path / "agent" / "agent.json").read_text())
    assert document["config"]["env_id"] == "Some-v0"
    assert document["config"]["data"]["episodes"] == 2
    assert sorted(p.name for p in (tmp_path / "agent").iterdir()) == [
        "agent.json",
        "agent.safetensors",
    ]


def test_a_damaged_or_foreign_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no agent at .*agent\.safetensors"):
        Agent.load(tmp_path)
    make_agent().save(tmp_path)
    path = tmp_path / "agent.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        Agent.load(tmp_path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="must hold an agent of format 1, got format None"):
        Agent.load(tmp_path)


def test_default_targets_never_multiply():
    episodes = [Episode(np.zeros((1, 1)), np.zeros((1, 1)), [r]) for r in (-900.0, -300.0, -100.0)]
    targets = default_targets(return_statistics(episodes))
    assert targets[0] == -100
    assert max(targets) == 0
    assert sorted(targets, reverse=True)[1] == -100
    assert min(targets) == pytest.approx(-780)
    assert Agent.from_episodes(BehaviourCloning(1, 1), episodes).config.scale == 900


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": AgentConfig(mode="nothing")}, "mode must be one of window, recurrent"),
        ({"config": AgentConfig(pad_mode="right")}, "pad_mode must be one of masked, official"),
        ({"config": AgentConfig(scale=0.0)}, r"scale must be positive, got 0\.0"),
        ({"state_mean": [0.0]}, r"state_mean must be \(3,\) and finite, got \[0\.\]"),
        ({"state_std": [1, np.nan, 1]}, r"state_std must be \(3,\) and finite"),
        ({"action_high": [1, np.inf]}, r"action_high must be \(2,\) and finite"),
        ({"action_low": [-1, 1]}, r"action_low must be below action_high, got \[-1, 1\]"),
    ],
)
def test_bad_construction(change, message):
    with pytest.raises(ValueError, match=message):
        Agent(make_model(), **change)


def test_bad_acting():
    agent = Agent(make_model()).eval()
    with pytest.raises(ValueError, match=r"target_return must be finite, or config\.targets"):
        agent.act(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="mask must follow a reset of all environments"):
        agent.reset(mask=[True])
    agent.reset(1.0)
    with pytest.raises(ValueError, match=r"obs must be \(N, 3\), got \(2, 4\)"):
        agent.act(np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"obs must be finite, got \[ 0\. nan  0\.\] in row 1"):
        agent.act([[0, 0, 0], [0, np.nan, 0]])
    with pytest.raises(ValueError, match="deterministic must be True for continuous actions"):
        agent.act(np.zeros((2, 3)), deterministic=False)
    agent.act(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="obs must have 2 rows, got 3"):
        agent.act(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="reward must be given after an episode's first step"):
        agent.act(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"reward must be \(2,\), got \(3,\)"):
        agent.act(np.zeros((2, 3)), np.zeros(3))
    with pytest.raises(ValueError, match=r"reward must be finite, got \[ 0\. nan\]"):
        agent.act(np.zeros((2, 3)), [0.0, np.nan])
    with pytest.raises(ValueError, match="target_return must be finite, got inf"):
        agent.reset(np.inf, mask=[True, False])
    with pytest.raises(ValueError, match=r"prev_action must be \(2, 2\), got \(2,\)"):
        agent.act(np.zeros((2, 3)), np.zeros(2), prev_action=np.zeros(2))
    with pytest.raises(
        ValueError, match=r"target_return must be one number or one per env.* \(2\)"
    ):
        agent.reset([1.0, 2.0, 3.0], num_envs=2)
    with pytest.raises(ValueError, match=r"mode must be one of window, .*, got 'nothing'"):
        agent.reset(1.0, num_envs=2, mode="nothing")
    attention = Agent(make_model(mixer="attention"))
    with pytest.raises(ValueError, match="mode must be 'window' for a mixer without a state"):
        attention.reset(1.0, num_envs=2, mode="recurrent")
