"""The README's Python blocks run, one after the other."""

import re
from pathlib import Path

from scanweave.graph import ORDERS

README = (Path(__file__).resolve().parents[2] / "graph" / "README.md").read_text("utf-8")


def test_blocks_run():
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for number, block in enumerate(blocks):
        exec(compile(block, f"README block {number}", "exec"), names)
    assert names["out"].shape == (5, 64)  # type: ignore[attr-defined]
    assert names["model"].num_layers == 4  # type: ignore[attr-defined]
    assert names["links"].shape == (2,)  # type: ignore[attr-defined]


def test_every_order_has_a_row():
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == set(ORDERS)
