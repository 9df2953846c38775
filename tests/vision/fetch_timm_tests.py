"""Fetch the test module that belongs to the installed timm, for `test_timm_suite.py`.

timm's wheel has no tests; its source distribution of the same version has. Run once, with access
to the package index:

    python tests/vision/fetch_timm_tests.py

It goes to `suite_path()`, under the user's cache folder; nothing is written to the repository.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


def suite_path() -> Path:
    """Where timm's `test_models.py` is looked for: $TIMM_TESTS, or the user's cache folder."""
    if "TIMM_TESTS" in os.environ:
        return Path(os.environ["TIMM_TESTS"])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "scanweave" / f"timm-{version('timm')}" / "test_models.py"


def fetch(target: Path) -> None:
    """Download timm's source distribution with pip and keep its `tests/test_models.py`.

    Args:
        target: File to write.

    Raises:
        subprocess.CalledProcessError: pip found no such distribution, or no index.
    """
    release = f"timm=={version('timm')}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--no-binary", "timm", "--dest", folder, release], check=True)
        (archive,) = Path(folder).glob("timm-*.tar.gz")
        with tarfile.open(archive) as files:
            (name,) = [n for n in files.getnames() if n.endswith("/tests/test_models.py")]
            member = files.extractfile(name)
            assert member is not None
            source = member.read()
    target.parent.mkdir(parents=True, exist_ok=True)
    # a reader never sees half a file
    part = target.with_suffix(".part")
    part.write_bytes(source)
    part.replace(target)


if __name__ == "__main__":
    path = suite_path()
    if not path.exists():
        fetch(path)
    sys.stdout.write(f"{path}\n")
