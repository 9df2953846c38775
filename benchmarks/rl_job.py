"""Train one agent and play: what `rl_table.py` starts.

    python -m benchmarks.rl_job --folder runs/x --set "Pendulum replay" --method attention \
        --seed 0 --data-dir data --steps 500

`results.json` in the folder holds `return` (at the first of the set's targets), `best` (the best of
all its targets), and every episode's return under `evaluation`.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from scanweave.core.training import seed_everything
from scanweave.rl import (
    BehaviourCloning,
    default_targets,
    normalized_score,
    return_statistics,
    top_episodes,
)
from scanweave.rl.train import build_model, fit, load_data

from .rl_models import METHODS, SETS, settings


def run(
    name: str, method: str, seed: int, *, folder: Path, data_dir: Path, steps: int
) -> dict[str, Any]:
    """Train and play; arguments as `rl_models.settings`."""
    config = settings(name, method, seed, folder=folder, data_dir=data_dir, steps=steps)
    episodes, spaces = load_data(config)
    if not config.targets:
        asked = default_targets(return_statistics(episodes))[:3]
        config = replace(config, targets=tuple(asked))
    seed_everything(seed)
    share = METHODS[method].share
    if share:
        model = BehaviourCloning(
            spaces.state_dim, spaces.act_dim, dropout=config.dropout, discrete=spaces.discrete
        )
        episodes = top_episodes(episodes, share)
    else:
        model = build_model(config, spaces)
    agent, result, evaluation = fit(model, episodes, spaces, config, "agent")
    assert evaluation is not None
    found: dict[str, Any] = {
        "return": evaluation.results[0].mean,
        "best": evaluation.best.mean,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(result.seconds + evaluation.seconds, 1),
        "steps": result.steps,
        "data": agent.config.data,
        "evaluation": evaluation.document(),
    }
    if family := SETS[name].d4rl:
        found["score"] = float(normalized_score(family, found["return"]))
    return found


def main() -> None:
    """Read the options, run, write."""
    parser = argparse.ArgumentParser(description="Train one agent and play.")
    add = parser.add_argument
    add("--folder", type=Path, required=True)
    add("--set", choices=SETS, required=True)
    add("--method", choices=METHODS, required=True)
    add("--seed", type=int, default=0)
    add("--data-dir", type=Path, required=True)
    add("--steps", type=int, default=500)
    options = parser.parse_args()
    found = run(
        options.set,
        options.method,
        options.seed,
        folder=options.folder,
        data_dir=options.data_dir,
        steps=options.steps,
    )
    fresh = options.folder / ".results.json.tmp"
    fresh.write_text(json.dumps(found, indent=1), encoding="utf-8")
    os.replace(fresh, options.folder / "results.json")


if __name__ == "__main__":
    main()
