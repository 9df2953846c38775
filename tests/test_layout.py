"""Guards of the repository's layout and of habits that no linter knows."""

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PORTIONS = ("core", "vision", "graph", "rl")
DOMAINS = PORTIONS[1:]
FRAMEWORKS = (
    *("timm", "torchvision", "torch_geometric", "gymnasium", "minari", "h5py"),
    *("accelerate", "tyro", "rich", "tensorboard", "matplotlib", "sklearn"),
)
SOURCES = sorted(path for portion in PORTIONS for path in (ROOT / portion).rglob("*.py"))
PYTHON_FILES = sorted(
    [*SOURCES, *(p for d in ("tests", "benchmarks", "tools") for p in (ROOT / d).rglob("*.py"))]
)
# about 400; the slack is for a docstring more, not for a class more
LONGEST = 425
# the command line talks to people; everything else returns, raises or logs
MAY_PRINT = {"core/scanweave/core/cli.py"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file with its dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports absolutely, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_are_sources():
    assert {relative(path).split("/")[0] for path in SOURCES} == set(PORTIONS)


@pytest.mark.parametrize("portion", PORTIONS)
def test_namespace_has_no_init(portion: str):
    assert not (ROOT / portion / "scanweave" / "__init__.py").exists(), "it hides the other three"
    assert (ROOT / portion / "scanweave" / portion / "__init__.py").is_file()


@pytest.mark.parametrize("portion", PORTIONS)
def test_portion_is_typed(portion: str):
    assert (ROOT / portion / "scanweave" / portion / "py.typed").is_file()


def loaded_by(statement: str) -> set[str]:
    """Top-level packages of a fresh interpreter after one statement."""
    code = f"import sys; {statement}; sys.stdout.write(' '.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"PYTHONPATH": ":".join(str(ROOT / p) for p in PORTIONS), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in result.stdout.split()}


def test_core_imports_no_framework():
    loaded = loaded_by("import scanweave.core")
    assert "torch" in loaded
    # what torch itself imports is not our doing
    assert not (loaded - loaded_by("import torch")) & set(FRAMEWORKS)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_point_downwards(path: Path):
    own = relative(path).split("/")[0]
    foreign = [f"scanweave.{domain}" for domain in DOMAINS if domain != own]
    found = [
        name
        for name in imports(ast.parse(path.read_text()))
        if any(name == module or name.startswith(module + ".") for module in foreign)
    ]
    assert not found, "core knows no domain, and domains do not know each other"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_file_is_short(path: Path):
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_library_neither_prints_nor_unpickles(path: Path):
    tree = ast.parse(path.read_text())
    for name, call in calls(tree):
        if name == "print":
            assert relative(path) in MAY_PRINT, f"line {call.lineno}: print"
        if name in ("torch.load", "np.load", "numpy.load"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            safe = given.get("weights_only") == "True" or given.get("allow_pickle") == "False"
            assert safe, f"line {call.lineno}: {name} can run what a file contains"
    unpicklers = {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}
    assert not unpicklers & {name.partition(".")[0] for name in imports(tree)}


def test_version_is_the_same_everywhere():
    (version,) = re.findall(
        r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(
        r"^## \[Unreleased\]|^## \[" + re.escape(version),
        (ROOT / "CHANGELOG.md").read_text(),
        re.MULTILINE,
    )


@pytest.mark.slow
def test_wheel_holds_all_portions(tmp_path: Path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert "scanweave/__init__.py" not in packed
    # not only modules: also py.typed, and C sources that are compiled on first use
    files = (path for portion in PORTIONS for path in (ROOT / portion / "scanweave").rglob("*.*"))
    expected = {relative(p).partition("/")[2] for p in files if "__pycache__" not in p.parts}
    assert {f"scanweave/{portion}/py.typed" for portion in PORTIONS} <= expected <= packed
    # the unpacked wheel alone, without the checkout, imports under all four names
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "; ".join(f"import scanweave.{portion}" for portion in PORTIONS)
    subprocess.run(
        [
            sys.executable,
            "-I",
            "-W",
            "ignore",
            "-c",
            f"import sys; sys.path[:0] = ['site']; {code}",
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
