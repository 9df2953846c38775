"""The vision README: its Python runs as written, its commands and files exist, names are ours."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import scanweave.vision  # noqa: F401  (registers the models)

ROOT = Path(__file__).parents[2]
README = (ROOT / "vision" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("default")
def test_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader pastes them; files that they open are there."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("vim_tiny_patch16_224")
    published = {"model": model.state_dict(), "epoch": 299, "args": Namespace(lr=1e-3)}
    torch.save(published, tmp_path / "vim_t_midclstok_76p1acc.pth")
    names: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"vision/README.md block {number}", "exec"), names)
    assert len(BLOCKS) >= 5
    written = onnx.load(tmp_path / "vim.onnx")
    onnx.checker.check_model(written)
    # standard operators only
    assert {node.domain for node in written.graph.node} == {""}


def test_models_exist_with_the_parameters_of_the_tables() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*?\| ([\d,]{9,}) \|", README, re.MULTILINE)
    assert len(rows) >= 25
    for name, count in rows:
        model = timm.create_model(name, device="meta")
        assert f"{sum(p.numel() for p in model.parameters()):,}" == count, name


def test_names_in_the_text_are_models() -> None:
    family = r"(?:vim|vmamba|hydra_vit|ssm_vit|mambar|local_vim|local_vmamba|vanilla_vmamba)"
    named = set(re.findall(rf"[`\"]({family}_[a-z0-9_]+)[`\"]", README))
    assert len(named) >= 25
    recipes = {"vim_small"}
    unknown = {n for n in named - recipes if not timm.is_model(n)}
    assert not unknown, unknown


def test_links_and_modules() -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", README):
        assert link.startswith("https://") or (ROOT / "vision" / link).exists(), link
    for module in set(re.findall(r"python -m (scanweave\.vision\.\w+)", README)):
        assert (ROOT / "vision" / f"{module.replace('.', '/')}.py").is_file(), module
    for path in set(re.findall(r"`((?:tests/vision|scanweave)/[\w/]+\.py)`", README)):
        folder = ROOT if path.startswith("tests") else ROOT / "vision"
        assert (folder / path).is_file(), path
