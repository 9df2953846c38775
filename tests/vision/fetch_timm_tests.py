"""Fetch the test modules that belong to the installed timm, for `test_timm_*.py`.

timm's wheel has no tests; its source distribution of the same version has. Run once, with access
to the package index:

    python tests/vision/fetch_timm_tests.py

They go beside `suite_path()`, under the user's cache folder; nothing is written to the repository.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

# timm's, by what they test: all models, how inputs and repositories are described, loading
NAMES = ("test_models.py", "test_model_input.py", "test_checkpoint_loading.py")


def suite_path() -> Path:
    """Where timm's `test_models.py` is looked for: $TIMM_TESTS, or the user's cache folder."""
    if "TIMM_TESTS" in os.environ:
        return Path(os.environ["TIMM_TESTS"])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "scanweave" / f"timm-{version('timm')}" / "test_models.py"


def fetch(folder: Path) -> None:
    """Download timm's source distribution with pip and keep the modules `NAMES` of its tests.

    Args:
        folder: Where to write them.

    Raises:
        subprocess.CalledProcessError: pip found no such distribution, or no index.
    """
    release = f"timm=={version('timm')}"
    sources = {}
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--no-binary", "timm", "--dest", download, release], check=True)
        (archive,) = Path(download).glob("timm-*.tar.gz")
        with tarfile.open(archive) as files:
            for name in NAMES:
                (path,) = [n for n in files.getnames() if n.endswith(f"/tests/{name}")]
                member = files.extractfile(path)
                assert member is not None
                sources[name] = member.read()
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        # a reader never sees half a file
        part = folder / f"{name}.part"
        part.write_bytes(source)
        part.replace(folder / name)


if __name__ == "__main__":
    folder = suite_path().parent
    if not all((folder / name).exists() for name in NAMES):
        fetch(folder)
    sys.stdout.write(f"{suite_path()}\n")
