"""The whole script, killed at any update of any of its agents, and resumed: the same bits."""

from dataclasses import replace

import pytest
import torch

from scanweave.core.training import TrainConfig
from scanweave.rl import Agent
from scanweave.rl.train import Config, train


class Killed(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


def config(folder):
    loop = TrainConfig(
        output_dir=folder,
        max_steps=6,
        batch_size=4,
        save_every=2,
        log_every=2,
        progress=False,
        cpu=True,
        tensorboard=False,
    )
    return Config(
        episodes=3, hidden_size=8, n_layer=1, context=3, dropout=0.2, eval_episodes=1,
        targets=(-900.0,), train=loop,
    )  # fmt: skip


NAMES = ("agent", "BC", "10-BC")


def weights(folder):
    agents = [Agent.load(folder / name / "agent").state_dict() for name in NAMES]
    return torch.cat([value.flatten() for agent in agents for value in agent.values()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(config(folder))
    return weights(folder), (folder / "evaluation.csv").read_text()


# updates of three agents, six each
@pytest.mark.parametrize("update", [4, 17])
def test_a_killed_script_resumes_to_the_same_bits(update, whole, tmp_path, monkeypatch):
    forward, done = Agent.forward, 0

    def killed(agent, batch):
        nonlocal done
        done += 1
        if done == update:
            raise Killed
        return forward(agent, batch)

    monkeypatch.setattr(Agent, "forward", killed)
    with pytest.raises(Killed):
        train(config(tmp_path))
    monkeypatch.setattr(Agent, "forward", forward)
    again = config(tmp_path)
    train(replace(again, train=replace(again.train, resume=True)))
    assert torch.equal(weights(tmp_path), whole[0])
    assert (tmp_path / "evaluation.csv").read_text() == whole[1]
