"""The training script: everything it writes, and data that does not fit."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scanweave.core.training import TrainConfig
from scanweave.rl import Agent, Episode, evaluate_agent, save_d4rl
from scanweave.rl.train import Config, load_data, main, train


@pytest.fixture
def config(tmp_path):
    return Config(
        episodes=4,
        hidden_size=8,
        n_layer=1,
        context=3,
        eval_episodes=2,
        targets=(-900.0, -100.0),
        train=TrainConfig(
            output_dir=tmp_path / "run",
            max_steps=4,
            batch_size=8,
            log_every=2,
            progress=False,
            cpu=True,
            tensorboard=False,
        ),
    )


def test_recorded_data_to_agent_and_baselines(config):
    results = train(config)
    folder = config.train.output_dir
    assert [r.target for r in results["evaluation"].results] == [-900.0, -100.0]
    assert set(results["baselines"]) == {"BC", "10 % BC"}
    assert results["steps"] == 4
    assert results["episodes"]["episodes"] == 4
    with (folder / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["agent"] for row in rows] == ["agent", "agent", "BC", "10 % BC"]
    document = json.loads((folder / "evaluation.json").read_text())
    assert document["agent"]["versions"]["gymnasium"]
    for name in ("targets.png", "agent/curves.png", "agent/metrics.csv", "agent/config.json"):
        assert (folder / name).stat().st_size > 0
    loaded = Agent.load(folder / "agent" / "agent")
    again = evaluate_agent(loaded, episodes=2)
    assert [r.returns for r in again.results] == [r.returns for r in results["evaluation"].results]
    assert loaded.config.data["steps"] == 800


def test_evaluation_during_training_picks_the_best(config):
    settings = replace(config.train, eval_every=2)
    results = train(replace(config, train=settings, baselines=False))
    rows = [row for row in results["history"] if "eval/best_return" in row]
    assert [row["step"] for row in rows] == [2, 4]
    final = results["evaluation"]
    assert rows[-1]["eval/best_return"] == pytest.approx(final.best.mean)
    assert rows[-1]["eval/return_-900"] == pytest.approx(final.results[0].mean)
    document = json.loads((config.train.output_dir / "evaluation.json").read_text())
    best = max(rows, key=lambda row: row["eval/best_return"])
    assert document["best evaluation"]["step"] == best["step"]
    assert document["best evaluation"]["best_return"] == best["eval/best_return"]


@pytest.fixture
def human(tmp_path):
    """A file as D4RL's, with 2 choices and 4 channels like CartPole-v1."""
    rng = np.random.default_rng(0)
    episodes = [
        Episode(rng.standard_normal((6, 4)), rng.integers(2, size=6), np.ones(6), terminated=True)
        for _ in range(3)
    ]
    save_d4rl(tmp_path / "set.hdf5", episodes)
    return tmp_path / "set.hdf5"


def test_a_file_with_and_without_environment(config, human):
    config = replace(config, dataset=human, targets=(6.0,), baselines=False)
    results = train(replace(config, env_id="CartPole-v1", remove_act_embs=False))
    assert len(results["evaluation"].results[0].returns) == 2
    assert results["agent"].config.data["source"] == "set.hdf5"
    other = replace(config.train, output_dir=config.train.output_dir / "other")
    results = train(replace(config, env_id="", train=other))
    assert results["evaluation"] is None
    assert (other.output_dir / "agent" / "agent" / "agent.json").is_file()


def test_data_that_does_not_fit(config, human):
    with pytest.raises(
        ValueError, match=r"dataset must fit Pendulum-v1 \(3 .*, got 4 state .* 2 choices"
    ):
        load_data(replace(config, dataset=human))
    with pytest.raises(ValueError, match="env_id must be given without a dataset"):
        load_data(replace(config, env_id=""))


def test_bounds_come_from_environment_or_data(config, tmp_path):
    actions = np.array([[-3.0], [1.0]])
    save_d4rl(tmp_path / "wild.hdf5", [Episode(np.zeros((2, 3)), actions, np.ones(2))])
    episodes, spaces = load_data(replace(config, dataset=tmp_path / "wild.hdf5"))
    assert spaces.action_low == [-2]
    assert episodes[0].actions.tolist() == [[-2.0], [1.0]]
    episodes, spaces = load_data(replace(config, dataset=Path(tmp_path / "wild.hdf5"), env_id=""))
    assert (spaces.action_low, spaces.action_high) == ([-3], [1])
    assert episodes[0].actions.tolist() == [[-3.0], [1.0]]


def test_command_line(tmp_path, monkeypatch, capsys):
    options = (
        "--env-id CartPole-v1 --episodes 3 --hidden-size 8 --n-layer 1 --eval-episodes 1 "
        "--targets 20 --no-baselines --mixer gated_cnn --train.max-steps 2 --train.batch-size 8 "
        f"--train.warmup-steps 0 --train.cpu --train.no-progress --train.output-dir {tmp_path}/run"
    )
    monkeypatch.setattr(sys, "argv", ["train", *options.split()])
    main()
    assert "20.0" in capsys.readouterr().out
    assert (tmp_path / "run" / "agent" / "agent" / "agent.json").is_file()
