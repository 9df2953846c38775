"""The command `scanweave`.

    scanweave demo   train one small model of every domain on real input, and write a report
    scanweave info   versions, devices, domains and mixers

The domains are found by name when they are needed, so that core imports none of them: a portion
`scanweave.<domain>` with a module `demo` takes part by its function
`run(folder, *, fast, seed) -> DemoResult`.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from .mixers import list_mixers, mixer_info
from .ops.selective import compiled
from .report import DemoResult, write_report

DOMAINS = ("vision", "graph", "rl")
PACKAGES = (
    *("scanweave", "torch", "triton", "numpy", "timm", "torchvision", "torch-geometric"),
    *("gymnasium", "minari", "accelerate", "scikit-learn"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; `arguments` defaults to the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="scanweave", description="State-space models for images, graphs and decisions."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train one model of every domain, write a report")
    demo.add_argument("--only", nargs="+", choices=DOMAINS, default=DOMAINS, metavar="DOMAIN")
    demo.add_argument("--fast", action="store_true", help="seconds instead of minutes, no goals")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    commands.add_parser("info", help="show versions, devices, domains and mixers")
    args = parser.parse_args(arguments)
    if args.command == "info":
        return _info()
    return _demo(args.only, fast=args.fast, seed=args.seed, parent=args.output_dir)


def _demo(only: Sequence[str], *, fast: bool, seed: int, parent: Path) -> int:
    started = time.perf_counter()
    modules = _load(only)
    if modules is None:
        return 2
    # small tensors: a second thread gains little on an idle machine, makes a run 4 times slower
    # beside other work (threads wait actively), and rounds differently on every number of cores
    torch.set_num_threads(1)
    folder = _fresh_folder(parent)
    results = []
    for domain, module in modules.items():
        print(f"\n{(module.__doc__ or domain).splitlines()[0]}", flush=True)
        begin = time.perf_counter()
        result: DemoResult = module.run(folder / domain, fast=fast, seed=seed)
        result.seconds = time.perf_counter() - begin
        results.append(result)
    total = time.perf_counter() - started
    page = write_report(folder, results, _facts(seed=seed, fast=fast, seconds=total))
    _show(results, total)
    print(f"\nReport: {page}")
    return 0 if fast or all(result.reached for result in results) else 1


def _load(only: Sequence[str]) -> dict[str, ModuleType] | None:
    """Import the demonstrations before any training starts; None, and why, when one is missing."""
    modules, problems = {}, []
    for domain in dict.fromkeys(only):
        try:
            modules[domain] = importlib.import_module(f"scanweave.{domain}.demo")
        except ImportError as error:
            problems.append(f"  {domain}: {error}")
    if not problems:
        return modules
    print("Some demonstrations lack a package:", *problems, sep="\n", file=sys.stderr)
    print("For all of them: pip install 'scanweave[demo]'", file=sys.stderr)
    return None


def _fresh_folder(parent: Path) -> Path:
    """A new folder named by date and time; two runs within a second get different ones."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        folder = parent / (stamp if attempt == 0 else f"{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"no free folder name for {stamp} in {parent}")


def _facts(*, seed: int, fast: bool, seconds: float) -> dict[str, str]:
    return {
        "time": f"{seconds:.0f} s" + (" (fast mode)" if fast else ""),
        "device": _device(),
        "seed": str(seed),
        "torch": torch.__version__,
        "scanweave": _version("scanweave"),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def _show(results: Sequence[DemoResult], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"scanweave demo, {seconds:.0f} s on {_device()}", title_justify="left")
    for name, side in (("", "left"), ("model", "left"), ("value", "right"), ("metric", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for result in results:
        for index, row in enumerate(result.rows):
            style = "bold" if index == 0 else None
            title = result.title if index == 0 else ""
            table.add_row(title, row.model, row.shown, row.metric, style=style)
        table.add_section()
    console = Console()
    console.print()
    console.print(table)
    for result in results:
        if result.goal:
            word = "[green]reached[/]" if result.reached else "[red]missed[/]"
            console.print(f"{word}: {result.goal}")


def _info() -> int:
    print(f"{'python':<16}{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package:<16}{_version(package)}")
    print(f"{'device':<16}{_device()}")
    print(f"{'compiled scan':<16}{compiled.status()}")
    print("\ndomains")
    for domain in DOMAINS:
        try:
            importlib.import_module(f"scanweave.{domain}")
        except ImportError as error:
            print(f"  {domain:<10}{error}")
        else:
            print(f"  {domain:<10}ready")
    print("\nmixers")
    width = max(map(len, list_mixers())) + 2
    for name in list_mixers():
        info = mixer_info(name)
        kind = f"{'causal' if info.causal else 'both ways'}, "
        kind += "recurrent" if info.recurrent else "no state"
        print(f"  {name:<{width}}{kind:<22}{info.paper}")
    return 0


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU, {cores} cores, {torch.get_num_threads()} in use"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
