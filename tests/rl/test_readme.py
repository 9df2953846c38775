"""The README's Python blocks run, one after the other."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "rl" / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README block {number}", "exec"), names)
    assert names["loss"].item() == pytest.approx(names["metrics"]["action_error"].item())
    assert (tmp_path / "runs" / "readme" / "agent" / "agent.safetensors").is_file()
