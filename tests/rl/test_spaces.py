"""Agents for every kind of space and every causal mixer: trained, acting, stored exactly."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from scanweave.core import list_mixers
from scanweave.rl import (
    Agent,
    AgentConfig,
    AtariDecisionMamba,
    BehaviourCloning,
    DecisionMamba,
    Episode,
    TrajectoryWindows,
    make_envs,
    read_spaces,
)
from scanweave.rl.tokens import ImageEncoder


def trained(agent, episodes, length, steps=3):
    """A few updates; the loss on the same batch goes down."""
    batch = TrajectoryWindows(episodes, length).__getitems__(range(6))
    optimizer = torch.optim.Adam(agent.model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = agent(batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    return agent.eval()


def acts(agent, states, mode=None):
    """Actions of three steps of two environments."""
    agent.reset(1.0, num_envs=2, mode=mode)
    return np.stack([agent.act(states[t : t + 2], np.ones(2) if t else None) for t in range(3)])


def stored(agent, folder, states, mode=None):
    """The agent acts as before once it is saved and loaded."""
    agent.save(folder)
    again = Agent.load(folder)
    actions = acts(agent, states, mode)
    np.testing.assert_array_equal(acts(again, states, mode), actions)
    return actions


@pytest.mark.parametrize("mixer", list_mixers(causal=True))
def test_every_causal_mixer(mixer, tmp_path):
    rng = np.random.default_rng(0)
    episodes = [
        Episode(rng.standard_normal((8, 3)), rng.uniform(-1, 1, (8, 2)), rng.standard_normal(8))
    ]
    torch.manual_seed(0)
    model = DecisionMamba(3, 2, 16, 1, 4, mixer=mixer, dropout=0.0)
    agent = trained(Agent.from_episodes(model, episodes), episodes, 4)
    window = stored(agent, tmp_path, episodes[0].states)
    if model.recurrent:
        recurrent = stored(agent, tmp_path, episodes[0].states, "recurrent")
        np.testing.assert_allclose(recurrent, window, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="mode must be 'window' for a mixer without a state"):
            agent.reset(1.0, num_envs=2, mode="recurrent")


@pytest.mark.parametrize("mixer", list_mixers(causal=False))
def test_mixers_that_read_the_future_are_refused(mixer):
    with pytest.raises(ValueError, match=f"mixer must be causal .*, got '{mixer}'"):
        DecisionMamba(3, 1, 8, 1, mixer=mixer)
    with pytest.raises(ValueError, match=f"mixer must be causal .*, got '{mixer}'"):
        AtariDecisionMamba(2, hidden_size=8, n_layer=1, mixer=mixer)


@pytest.mark.parametrize("cloning", [False, True])
def test_several_choices_at_once(cloning, tmp_path):
    space = spaces.MultiDiscrete([3, 2, 4])
    found = read_spaces(spaces.Box(-1, 1, (3,)), space)
    assert (found.act_dim, found.discrete) == ((3, 2, 4), True)
    rng = np.random.default_rng(0)
    actions = rng.integers([3, 2, 4], size=(8, 3))
    episodes = [Episode(rng.standard_normal((8, 3)), actions, np.ones(8))]
    assert episodes[0].actions.shape == (8, 3)
    torch.manual_seed(0)
    model = (
        BehaviourCloning(3, found.act_dim, 16, 1, discrete=True)
        if cloning
        else DecisionMamba(3, found.act_dim, 16, 1, 4, discrete=True, dropout=0.0)
    )
    agent = Agent.from_episodes(model, episodes)
    length = model.max_length
    batch = TrajectoryWindows(episodes, length).__getitems__(range(3))
    loss = agent.eval()(batch)[0]
    logits = model(
        (batch["states"] - agent.state_mean) / agent.state_std,
        batch["actions"],
        batch["returns_to_go"] / agent.config.scale,
        batch["timesteps"],
    )
    expected = sum(
        torch.nn.functional.cross_entropy(part.flatten(0, 1), answer.flatten())
        for part, answer in zip(
            logits.split([3, 2, 4], -1), batch["actions"].unbind(-1), strict=True
        )
    )
    torch.testing.assert_close(loss, expected)
    agent = trained(agent.train(), episodes, length)
    actions = stored(agent, tmp_path, episodes[0].states)
    assert actions.shape == (3, 2, 3)
    assert all(space.contains(action) for action in actions.reshape(-1, 3))
    agent.reset(1.0, num_envs=64)
    sampled = agent.act(np.zeros((64, 3)), deterministic=False)
    assert len(np.unique(sampled, axis=0)) > 3
    single = Agent(model, agent.config)
    single.reset(1.0)
    assert single.act(np.zeros(3)).shape == (3,)


@pytest.mark.parametrize("shape", [(4, 40, 36), (36, 40, 3), (36, 36)])
def test_images(shape, tmp_path):
    box = spaces.Box(0, 255, shape, np.uint8)
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(8, *shape), dtype=np.uint8)
    episodes = [Episode(frames, np.arange(8) % 3, np.ones(8))]
    torch.manual_seed(0)
    agent = Agent.from_spaces(
        box,
        spaces.Discrete(3),
        model_config={"hidden_size": 16, "n_layer": 1, "max_length": 3, "dropout": 0.0},
    )
    assert agent.state_std.tolist() == [255.0]
    again = Agent.from_episodes(agent.model, episodes)
    assert (again.state_mean.tolist(), again.state_std.tolist()) == ([0.0], [255.0])
    agent = trained(agent, episodes, 3)
    assert stored(agent, tmp_path, frames).shape == (3, 2)
    window, recurrent = acts(agent, frames), acts(agent, frames, "recurrent")
    np.testing.assert_array_equal(window, recurrent)


def test_the_encoder_reads_both_layouts_alike():
    torch.manual_seed(0)
    first, last = ImageEncoder((3, 40, 50), 8), ImageEncoder((40, 50, 3), 8)
    last.load_state_dict(first.state_dict())
    images = torch.rand(2, 5, 3, 40, 50)
    torch.testing.assert_close(first(images), last(images.movedim(2, -1)))
    with pytest.raises(ValueError, match=r"state_dim must have sides of at least 36 pixels"):
        ImageEncoder((3, 35, 80), 8)
    with pytest.raises(ValueError, match=r"state_dim must be \(C, H, W\)"):
        ImageEncoder((3, 3, 40, 40), 8)


@pytest.mark.parametrize("mixer", ["mamba", "attention"])
def test_the_atari_model(mixer, tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(7, 4, 36, 36), dtype=np.uint8)
    episodes = [Episode(frames, np.arange(7) % 3, np.ones(7))]
    torch.manual_seed(0)
    model = AtariDecisionMamba(3, (4, 36, 36), 16, 1, 3, 20, mixer=mixer, dropout=0.0)
    with torch.no_grad():
        model.pos_emb.normal_()
        model.global_pos_emb.normal_()
    agent = trained(Agent.from_episodes(model, episodes), episodes, 3)
    actions = stored(agent, tmp_path, frames)
    assert actions.shape == (3, 2)
    # a padded window is read as the unpadded one, on either side
    states = torch.rand(1, 3, 4, 36, 36)
    inputs = (states, torch.tensor([[1, 2, 0]]), torch.ones(1, 3, 1), torch.tensor([[4, 5, 6]]))
    for step in ("first", "current"):
        model.global_step = step
        full = model(*inputs)[:, 1:]
        short = model(*(value[:, 1:] for value in inputs))
        mask = torch.tensor([[False, True, True]])
        padded = model(*inputs, mask=mask)[:, 1:]
        torch.testing.assert_close(padded, short)
        assert not torch.allclose(full, short)
    for call in (
        lambda: model.init_state(1),
        lambda: agent.reset(1.0, num_envs=1, mode="recurrent"),
    ):
        with pytest.raises(ValueError, match="mode must be 'window'"):
            call()
    with pytest.raises(ValueError, match="mode must be 'window'"):
        model.step(*(value[:, 0] for value in inputs), [])
    with pytest.raises(ValueError, match="states must have at most 3 steps, got 6"):
        model(*(torch.cat([value, value], 1) for value in inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_dim": 0}, "act_dim must be at least 1, got 0"),
        ({"global_step": "last"}, "global_step must be 'first' or 'current', got 'last'"),
        ({"init": "x"}, "init must be 'mamba' or 'official', got 'x'"),
    ],
)
def test_what_the_atari_model_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        AtariDecisionMamba(**{"act_dim": 3, "hidden_size": 8, "n_layer": 1, **change})


class Nested(gymnasium.Env):
    """Observations in a Dict, two choices."""

    observation_space = spaces.Dict(
        {"place": spaces.Box(-1, 1, (2,), np.float32), "room": spaces.Discrete(3)}
    )
    action_space = spaces.MultiBinary(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"place": np.full(2, 0.5, np.float32), "room": 2}, {}

    def step(self, action):
        return {"place": np.zeros(2, np.float32), "room": 1}, 1.0, False, False, {}


def test_nested_observations_are_flattened():
    gymnasium.register("scanweave-test/Nested-v0", Nested, max_episode_steps=3)
    env = Nested()
    found = read_spaces(env.observation_space, env.action_space)
    assert (found.state_dim, found.act_dim, found.discrete) == (5, (2, 2), True)
    envs = make_envs("scanweave-test/Nested-v0", 2)
    states, _ = envs.reset(seed=0)
    assert states.tolist() == [[0.5, 0.5, 0.0, 0.0, 1.0]] * 2
    agent = Agent.from_spaces(
        env.observation_space, env.action_space, model_config={"hidden_size": 8, "n_layer": 1}
    )
    agent.reset(1.0)
    _, rewards, *_ = envs.step(agent.act(states))
    assert rewards.tolist() == [1.0, 1.0]
    envs.close()


def test_actions_without_bounds(tmp_path):
    box, free = spaces.Box(-1, 1, (3,)), spaces.Box(-np.inf, np.inf, (2,))
    with pytest.raises(ValueError, match="action_space must be bounded, or action_squash False"):
        Agent.from_spaces(box, free)
    sizes = {"hidden_size": 8, "n_layer": 1}
    agent = Agent.from_spaces(box, free, AgentConfig(action_squash=False), model_config=sizes)
    with torch.no_grad():
        agent.model.predict_action[0].bias.fill_(7.0)
        agent.model.predict_action[0].weight.zero_()
    agent.eval().reset(1.0)
    assert agent.act(np.zeros((1, 3))).tolist() == [[7.0, 7.0]]
    with pytest.raises(ValueError, match="action_tanh must be False without action_squash"):
        Agent(DecisionMamba(3, 2, 8, 1), AgentConfig(action_squash=False))


def test_spaces_that_are_refused():
    box = spaces.Box(-1, 1, (3,))
    for space, message in (
        (spaces.Discrete(3, start=1), "action_space must start at 0"),
        (spaces.MultiDiscrete([2, 2], start=[0, 1]), "action_space must start at 0"),
        (spaces.Text(3), "action_space must be a flat Box, Discrete, MultiDiscrete"),
    ):
        with pytest.raises(ValueError, match=message):
            read_spaces(box, space)
    with pytest.raises(ValueError, match="observation_space must be an image or flatten"):
        read_spaces(spaces.Sequence(box), box)
    with pytest.raises(ValueError, match=r"model must be one of .*, got 'GPT'"):
        Agent.from_spaces(box, spaces.Discrete(2), model="GPT")
    for change, message in (
        ({"act_dim": (2, 3)}, r"act_dim must be one number unless discrete, got \(2, 3\)"),
        ({"activation": "tanh"}, "activation must be one of gelu, relu, got 'tanh'"),
        ({"norm": "batch"}, "norm must be one of layer, rms, got 'batch'"),
    ):
        with pytest.raises(ValueError, match=message):
            DecisionMamba(**{"state_dim": 3, "act_dim": 1, **change})
    with pytest.raises(ValueError, match=r"act_dim must be one number unless .* \(2, 3\)"):
        BehaviourCloning(3, (2, 3))
