"""The README's examples run, its commands and links exist, its figures are the demo's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
NEEDS = ("timm", "torch_geometric", "gymnasium")
DEMO = json.loads((ROOT / "docs" / "demo" / "results.json").read_text())


def run_example(number: int) -> dict[str, Any]:
    pytest.importorskip(NEEDS[number])
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(EXAMPLES[number], f"README.md example {number}", "exec"), names)
    return names


def test_there_are_three_short_examples():
    assert len(EXAMPLES) == len(NEEDS)
    for example in EXAMPLES:
        assert len([line for line in example.splitlines() if line.strip()]) <= 8


def test_image_example():
    names = run_example(0)
    assert names["logits"].shape == (2, 10)
    assert torch.isfinite(names["logits"]).all()


def test_graph_example():
    names = run_example(1)
    assert names["out"].shape == names["x"].shape
    # the second graph alone gives the same rows, in evaluation mode
    layer = names["layer"].eval()
    both = layer(names["x"], names["edge_index"], names["batch"])
    alone = layer(names["x"][3:], names["edge_index"][:, 4:] - 3)
    assert torch.allclose(both[3:], alone, atol=1e-5)


def test_trajectory_example():
    names = run_example(2)
    assert names["loss"].requires_grad
    assert names["action"].shape == (1,)
    assert abs(float(names["action"][0])) <= 2


def test_it_opens_with_the_two_commands():
    first = re.search(r"```bash\n(.*?)```", README, re.DOTALL)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == [
        "make demo",
        "make test",
    ]


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in set(re.findall(r"python -m ([\w.]+)", README)):
        portion = module.split(".")[1] if module.startswith("scanweave.") else "."
        path = ROOT / portion / (module.replace(".", "/") + ".py")
        assert path.is_file(), module
    extras = re.search(r"\[project.optional-dependencies\](.*?)\n\n", pyproject(), re.DOTALL)
    assert extras is not None
    for extra in set(re.findall(r"\.\[(\w+)\]", README)):
        assert re.search(rf"^{extra} = ", extras[1], re.MULTILINE), extra


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text()


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_ci_runs_the_test_command():
    assert re.search(r"\bmake\b.* test$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


@pytest.mark.parametrize("result", DEMO["results"], ids=lambda result: result["title"])
def test_figures_are_the_demos(result: dict[str, Any]):
    for row in result["rows"]:
        lines = [line for line in README.splitlines() if f"| {row['model']} |" in line]
        assert len(lines) == 1, row["model"]
        shown = f"| {row['value']:.{row['digits']}f} | {row['metric']} | `scanweave demo --only "
        assert shown in lines[0], lines[0]
