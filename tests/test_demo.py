"""The command line, its report, and the three demonstrations at toy size."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scanweave.core import cli, list_mixers
from scanweave.core.report import DemoResult, Figure, Row, write_report

pytest.importorskip("rich", reason="needs the extra train")

# an 1 x 1 PNG
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c6360000000020001e221bc330000000049454e44ae426082"
)


def fake_demo(*, reached: bool = True) -> ModuleType:
    module = ModuleType("demo", "Nothing: a demonstration of nothing.\n\nMore.")

    def run(folder: Path, *, fast: bool, seed: int) -> DemoResult:
        folder.mkdir()
        (folder / "dot.png").write_bytes(PIXEL)
        return DemoResult(
            title="A <b>title</b> & more",
            text="Some text.",
            rows=[Row("ours", "points", 12.345 + seed), Row("theirs", "points", 3, 0, "weak")],
            figures=[Figure(f"{folder.name}/dot.png", 'a "dot"')],
            goal="" if fast else "to reach something",
            reached=reached,
        )

    module.run = run  # type: ignore[attr-defined]
    return module


def use_modules(monkeypatch: pytest.MonkeyPatch, modules: dict[str, Any]) -> None:
    """Serve `modules` instead of importing; an exception is raised instead of served."""

    def load(name: str) -> ModuleType:
        found = modules[name]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(importlib, "import_module", load)


def test_report_is_one_page_without_outside_parts(tmp_path: Path):
    result = fake_demo().run(tmp_path / "nothing", fast=False, seed=0)
    page = write_report(tmp_path, [result], {"seed": "0 < 1"})
    text = page.read_text()
    assert "A &lt;b&gt;title&lt;/b&gt; &amp; more" in text
    assert "<dt>seed</dt><dd>0 &lt; 1</dd>" in text
    assert "12.3" in text
    assert "12.345" not in text
    assert 'alt="a &quot;dot&quot;"' in text
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(", text)
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["facts"] == {"seed": "0 < 1"}
    assert record["results"][0]["rows"][0]["value"] == 12.345


@pytest.mark.parametrize(("reached", "word"), [(True, "reached"), (False, "missed")])
def test_report_says_whether_the_goal_is_reached(tmp_path: Path, reached: bool, word: str):
    result = fake_demo(reached=reached).run(tmp_path / "nothing", fast=False, seed=0)
    assert f"<b>{word}</b> to reach something" in write_report(tmp_path, [result], {}).read_text()


@pytest.mark.parametrize(("reached", "fast", "status"), [(True, False, 0), (False, False, 1)])
def test_demo_shows_results_and_returns_status(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reached: bool,
    fast: bool,
    status: int,
):
    use_modules(monkeypatch, {"scanweave.graph.demo": fake_demo(reached=reached)})
    command = ["demo", "--only", "graph", "--seed", "2", "--output-dir", str(tmp_path)]
    assert cli.main(command) == status
    shown = capsys.readouterr().out
    assert "Nothing: a demonstration of nothing." in shown
    assert "14.3" in shown
    (page,) = tmp_path.glob("*/index.html")
    assert str(page) in shown.replace("\n", "")


def test_demo_folders_of_one_second_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_modules(monkeypatch, {"scanweave.rl.demo": fake_demo()})
    monkeypatch.setattr(cli.time, "strftime", lambda _: "20300101-000000")
    for _ in range(2):
        assert cli.main(["demo", "--only", "rl", "--fast", "--output-dir", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["20300101-000000", "20300101-000000-1"]


def test_demo_names_missing_packages_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    missing = ImportError("scanweave.graph needs torch-geometric: pip install 'scanweave[graph]'")
    use_modules(
        monkeypatch, {"scanweave.vision.demo": fake_demo(), "scanweave.graph.demo": missing}
    )
    command = ["demo", "--only", "vision", "graph", "--output-dir", str(tmp_path / "runs")]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "graph: scanweave.graph needs torch-geometric" in error
    assert "pip install 'scanweave[demo]'" in error
    assert not (tmp_path / "runs").exists()


def test_unknown_domain_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", "--only", "audio"])
    assert "invalid choice: 'audio'" in capsys.readouterr().err


def test_info_lists_versions_domains_and_mixers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    missing = ImportError("scanweave.vision needs timm")
    fakes = {"scanweave.vision": missing, "scanweave.graph": None, "scanweave.rl": None}
    use_modules(monkeypatch, fakes)
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    for mixer in list_mixers():
        assert re.search(rf"^  {mixer} .*arXiv", shown, re.MULTILINE)
    assert re.search(r"^torch +\d", shown, re.MULTILINE)
    assert re.search(r"^  vision +scanweave.vision needs timm$", shown, re.MULTILINE)
    assert re.search(r"^  graph +ready$", shown, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("domain", "framework", "figures", "first"),
    [
        ("vision", "timm", 2, "% of test digits right"),
        ("graph", "torch_geometric", 2, "% of test graphs right"),
        ("rl", "gymnasium", 2, "mean return"),
    ],
)
def test_demonstration_runs(tmp_path: Path, domain: str, framework: str, figures: int, first: str):
    pytest.importorskip("sklearn")
    pytest.importorskip(framework)
    assert cli.main(["demo", "--only", domain, "--fast", "--output-dir", str(tmp_path)]) == 0
    (page,) = tmp_path.glob("*/index.html")
    (result,) = json.loads((page.parent / "results.json").read_text())["results"]
    assert result["rows"][0]["metric"] == first
    assert page.read_text().count("data:image/png;base64,") == len(result["figures"]) >= figures
    for row in result["rows"]:
        assert row["value"] == row["value"], f"{row['model']} is NaN"
