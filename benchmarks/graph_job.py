"""Runs of one model on one set, one seed after the other: what `graph_table.py` starts.

python -m benchmarks.graph_job --folder runs/x --set MUTAG --model GMN --seeds 0,1 --data-dir data

Each run has a folder `seed<n>`; runs that have left their results there are not repeated.
`results.json` holds them all under `seeds`.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from scanweave.graph import train as script
from scanweave.graph.datasets import GraphSplits

from .graph_models import MODELS, SETS, match_width, settings


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description="Runs of one model on one set.")
    made.add_argument("--folder", type=Path, required=True)
    made.add_argument("--set", choices=SETS, required=True)
    made.add_argument("--model", choices=MODELS, required=True)
    made.add_argument("--seeds", default="0", help="numbers with commas")
    made.add_argument("--data-dir", type=Path, required=True)
    made.add_argument("--cache-dir", type=Path, default=Path("runs/data"))
    made.add_argument("--epochs", type=int, default=0, help="0 for those of the set")
    return made


def main() -> None:
    """Run the seeds that are not done, write all results."""
    options = parser().parse_args()
    # TF32 on GPUs; CPUs multiply as always
    torch.set_float32_matmul_precision("high")
    found: dict[str, Any] = {}
    kept: tuple[Any, Any] = (None, None)
    for seed in (int(text) for text in options.seeds.split(",")):
        folder = options.folder / f"seed{seed}"
        results = folder / "results.json"
        if not results.is_file():
            config = settings(
                options.set,
                options.model,
                seed,
                epochs=options.epochs,
                folder=folder,
                data_dir=options.data_dir,
                cache_dir=options.cache_dir,
            )
            if kept[0] != config.split_seed:
                kept = config.split_seed, script.load(config)
            splits = kept[1]
            config = match_width(config, splits, SETS[options.set].parameters)
            loop = dataclasses.replace(config.train, warmup_steps=_steps(config, splits) // 20)
            script.train(dataclasses.replace(config, train=loop), splits)
        found[str(seed)] = json.loads(results.read_text(encoding="utf-8"))
    total = {
        "seeds": found,
        "parameters": max(run["parameters"] for run in found.values()),
        "seconds": sum(run["seconds"] for run in found.values()),
    }
    _write(options.folder / "results.json", total)


def _steps(config: script.Config, splits: GraphSplits) -> int:
    """Optimiser steps of the run."""
    single = splits.target.level != "graph" and len(splits.train) == 1
    per_epoch = 1 if single else -(-len(splits.train) // config.train.batch_size)
    return per_epoch * config.train.epochs


def _write(path: Path, content: dict[str, Any]) -> None:
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(fresh, path)


if __name__ == "__main__":
    main()
