"""Make docs/mixers.md from the registry and from what was measured.

    python -m benchmarks.mixer_docs

`benchmarks/results/mixer_scores.csv` and `mixers_*.csv` there hold the figures; a mixer without any
has dashes. `mixer_families.py` holds the text. A test holds the page to what this makes.
"""

import csv
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from scanweave.core import list_mixers, mixer_info

from .mixer_families import FAMILIES, WHICH, Family
from .report import ROOT, markdown

PAGE = ROOT / "docs" / "mixers.md"
RESULTS = ROOT / "benchmarks" / "results"
Line = dict[str, str]

_INTRO = """\
# Mixers

Every mixer is one more `mixer=` in every domain:

```python
import timm
from scanweave.core import create_mixer, list_mixers
from scanweave.graph import GraphMambaConv
from scanweave.rl import DecisionMamba
import scanweave.vision

mixer = create_mixer("rwkv6", d_model=64)  # (B, L, 64) to (B, L, 64)
image_model = timm.create_model("ssm_vit_tiny_patch16_224", mixer="hydra", img_size=64)
graph_layer = GraphMambaConv(64, mixer="s5")
agent_model = DecisionMamba(state_dim=11, act_dim=3, mixer="rg_lru")
```

`tests/test_mixers_domains.py` trains each of them in all three; agents refuse those that read the
future. This page is made by `python -m benchmarks.mixer_docs` from the registry's rows and from
what the benchmarks measured.
"""

_TABLE = """\
A causal mixer's output depends on nothing that comes later. A recurrent one has a state of fixed
size, and a step whose cost does not grow. `parity` is the largest relative error of outputs that
was measured against the implementation whose weights it loads, or against the paper's equations.
"""

_SCORES = """\
Models of about 20,000 parameters on four small tasks, `python -m benchmarks.mixer_scores`: mean ±
standard deviation (runs). Digits: scikit-learn's 8 x 8 pixels as 64 tokens, two layers, % of 449
test digits right. Pendulum: mean return, asked for 0, of agents that learned from 300 recorded
episodes. Digit graphs: the same digits as pixel graphs without coordinates, breadth first, beside
GIN convolutions, % right. Peptides: Peptides-func by 4,000 molecules of the official training set,
500 steps of 32, beside convolutions that see the bonds (GINE); average precision on the whole test
set, the mean over labels, %. A few hundred steps each with the same settings for all, tuned for
none: this shows what learns quickly when small, not what is best when large. Runs that are not
there have a dash.
"""


def _read(path: Path) -> list[Line]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def family_of(name: str) -> Family:
    """The family of a mixer: by its name, else by its op.

    Raises:
        ValueError: none fits; `FAMILIES` must then know the mixer's name.
    """
    for family in FAMILIES:
        if any(fnmatchcase(name, pattern) for pattern in family.names.split()):
            return family
    primitive = mixer_info(name).primitive
    for family in FAMILIES:
        if primitive in family.primitives:
            return family
    raise ValueError(f"mixer must be in a family of mixer_families.py, got {name!r}")


def registry_table(names: Sequence[str]) -> str:
    """What the registry says about mixers."""
    lines = []
    for name in names:
        info = mixer_info(name)
        paper = re.sub(r"arXiv (\S+)", r"[arXiv \1](https://arxiv.org/abs/\1)", info.paper)
        answers = ["yes" if value else "no" for value in (info.causal, info.recurrent)]
        lines.append(
            [f"`{name}`", f"`{info.primitive}`", *answers, paper, info.reference, info.parity]
        )
    header = ["mixer", "op", "causal", "recurrent", "paper", "loads the weights of", "parity"]
    return _tidy(markdown(header, lines))


def score_table(names: Sequence[str], rows: Sequence[Line]) -> str:
    """Mean and deviation of every mixer at every task."""
    tasks = ["digits", "Pendulum", "digit graphs", "Peptides"]
    lines = []
    for name in names:
        own = [row for row in rows if row["model"] == name]
        sizes = sorted(int(row["parameters"]) for row in own)
        span = " - ".join(f"{n:,}" for n in dict.fromkeys(sizes[:1] + sizes[-1:])) or "-"
        cells = [[float(r["value"]) for r in own if r["dataset"] == task] for task in tasks]
        lines.append([f"`{name}`", span, *(_mean(values) for values in cells)])
    return _tidy(markdown(["mixer", "parameters", *tasks], lines))


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.1f}"
    return f"{text} ({len(values)})"


def speed_table(names: Sequence[str], rows: Sequence[Line]) -> str:
    """Times of every mixer at every shape: forward / forward+backward, and the step."""
    found = {(r["shape"], r["mixer"], r["passes"]): r for r in rows if r["median_us"]}
    header = ["mixer", "vision", "graph", "rl", "step", "state after 60 tokens", "MB, vision"]
    lines = []
    for name in names:
        pairs = []
        for shape in ("vision", "graph", "rl"):
            both = [found.get((shape, name, p)) for p in ("forward", "forward+backward")]
            pairs.append(" / ".join(_time(row) for row in both) if any(both) else "-")
        step = found.get(("step", name, "step"))
        # the state that an agent carries; attention has one, but no step
        carried = step or found.get(("rl", name, "forward"))
        peak = found.get(("vision", name, "forward+backward"))
        lines.append(
            [
                f"`{name}`",
                *pairs,
                _time(step),
                _bytes(carried),
                f"{float(peak['peak_mb']):,.0f}" if peak and peak["peak_mb"] else "-",
            ]
        )
    return _tidy(markdown(header, lines))


def _time(row: Line | None) -> str:
    """Microseconds: the kernels' own, or a graph's replay, or the processor's, or the clock's."""
    if row is None:
        return "-"
    text = row["graph_us"] or row["kernel_us"] or row["cpu_us"] or row["median_us"]
    return f"{float(text):,.0f}"


def _bytes(row: Line | None) -> str:
    return f"{int(row['state_bytes']):,} B" if row and row["state_bytes"] else "-"


def _tidy(text: str) -> str:
    return re.sub(r" {2,}\|", " |", text)


def _speed(names: Sequence[str], path: Path) -> str:
    rows = _read(path)
    first = rows[0]
    shapes = {row["shape"]: row for row in rows}
    sizes = ", ".join(
        f"{name} {row['batch']} x {row['length']} x {row['dim']}" for name, row in shapes.items()
    )
    loads = sorted(float(row["load"]) for row in rows)
    on_cpu = any(row["cpu_us"] for row in rows)
    kind = (
        f"one thread's own time, {first['dtype']}; load of the machine {loads[0]:.1f} to "
        f"{loads[-1]:.1f}"
        if on_cpu
        else f"kernels' own times (step: a graph's replay), {first['dtype']} autocast"
    )
    return (
        f"### {first['device']}\n\n"
        f"Microseconds, forward / forward+backward: {kind}; torch {first['torch']}. Sequences x "
        f"tokens x channels: {sizes} (graphs: the mean, packed). MB is what forward+backward needs "
        f"beyond its inputs. `{path.relative_to(ROOT)}` has all rows.\n\n{speed_table(names, rows)}"
    )


def render(results: Path = RESULTS) -> str:
    """The page."""
    names = list_mixers()
    parts = [_INTRO, "## Which one should I use", WHICH, "## All of them", _TABLE]
    parts += [registry_table(names), "## Families"]
    for family in FAMILIES:
        own = [name for name in names if family_of(name) is family]
        if own:
            listed = ", ".join(f"`{name}`" for name in own)
            parts += [f"### {family.title}", f"{family.text}\n\nHere: {listed}."]
    parts += ["## Scores at equal parameters", _SCORES]
    parts += [score_table(names, _read(results / "mixer_scores.csv")), "## Speed and memory"]
    parts += [
        "A mixer alone, at its default options, by `python -m benchmarks.mixers`: no time without "
        "a comparison with float64 in the same run."
    ]
    parts += [_speed(names, path) for path in sorted(results.glob("mixers_*.csv"))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Write the page."""
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(render(), encoding="utf-8")
    write(f"wrote {PAGE}\n")


if __name__ == "__main__":
    main()
