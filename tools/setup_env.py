"""Make a virtual environment in which torch and torchvision fit together, and install scanweave.

Needs nothing but the standard library of Python 3.10 or later; the Makefile calls it.

    python3 tools/setup_env.py [--venv .venv] [--extras demo] [--torch cpu]

What makes this more than one `pip install`: pip's index serves the CUDA build of torchvision,
which fails to import beside a CPU build of torch (`operator torchvision::nms does not exist`), and
version numbers do not tell the two apart. So both come from one place in one call, a torch that is
there already is kept, and at the end torchvision is imported instead of trusted.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST = (3, 10)

# run inside the environment: the metadata's version has no build tag on the default index, the
# module's has, and `cuda`/`hip` tell the build in either case
PROBE_TORCH = """
import importlib.metadata, json, torch
accelerated = torch.version.cuda is not None or torch.version.hip is not None
print(json.dumps({"version": importlib.metadata.version("torch"), "cpu": not accelerated}))
"""
PROBE_PAIR = "import torch, torchvision; torchvision.ops.nms"


def main() -> None:
    """Parse the command line, then set up, then check."""
    parser = argparse.ArgumentParser(description="Set up scanweave's environment.")
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--extras", default="demo", help="comma-separated, see pyproject.toml")
    parser.add_argument("--torch", choices=["default", "cpu"], default="default")
    args = parser.parse_args()
    if sys.version_info < OLDEST:
        fail(f"Python must be 3.10 or later, got {sys.version.split()[0]} ({sys.executable})")

    python = make_venv(args.venv)
    install_torch(python, cpu=args.torch == "cpu")
    keep = probe(python, PROBE_TORCH)
    install(python, "--editable", f".[{args.extras}]", f"torch=={keep['version']}")
    check_pair(python)


def make_venv(folder: Path) -> Path:
    """Create the environment unless it exists, and return its interpreter."""
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        say(f"creating {folder} with Python {sys.version.split()[0]}")
        # Debian and Ubuntu ship venv without ensurepip, and then fail half-way with a folder left
        has_pip = importlib.util.find_spec("ensurepip") is not None
        command = [sys.executable, "-m", "venv", str(folder)]
        if subprocess.run([*command, *([] if has_pip else ["--without-pip"])]).returncode:
            shutil.rmtree(folder, ignore_errors=True)
            fail(f"'{' '.join(command)}' failed; {how_to_get_venv()}")
    if succeeds([str(python), "-m", "pip", "--version"]):
        return python
    # an environment without pip can borrow the one beside the base interpreter
    borrowed = [sys.executable, "-m", "pip", "--python", str(python), "install", "pip"]
    if not succeeds(borrowed):
        fail(f"{folder} has no pip and none could be installed; {how_to_get_venv()}")
    return python


def install_torch(python: Path, *, cpu: bool) -> None:
    """Bring torch and torchvision in from one index, or keep the torch that is there."""
    found = probe(python, PROBE_TORCH)
    if found and cpu and not found["cpu"]:
        say(f"replacing torch {found['version']} by the CPU build")
        run(python, "uninstall", "--yes", "torch", "torchvision")
        found = None
    if not found:
        index = ["--index-url", CPU_INDEX] if cpu else []
        install(python, "torch>=2.6", "torchvision>=0.21", *index)
    elif not succeeds([str(python), "-c", PROBE_PAIR]):
        say(f"keeping torch {found['version']}, looking for the torchvision of the same build")
        pinned = ["torchvision>=0.21", f"torch=={found['version']}"]
        # the machine may reach only its own index: ask once, then take what that index has
        from_cpu_index = [*pinned, "--index-url", CPU_INDEX, "--retries", "1", "--timeout", "20"]
        if not (found["cpu"] and succeeds(pip(python, *from_cpu_index))):
            install(python, *pinned)


def check_pair(python: Path) -> None:
    """Import torchvision; explain what to do when it does not fit torch."""
    result = subprocess.run([str(python), "-c", PROBE_PAIR], capture_output=True, text=True)
    if result.returncode == 0:
        return
    found = probe(python, PROBE_TORCH)
    if not found:
        fail(f"torch does not import in {python.parent.parent}:\n{result.stderr.strip()}")
    build = "a CPU build" if found["cpu"] else "a GPU build"
    index = f" --index-url {CPU_INDEX}" if found["cpu"] else ""
    note = "\n(GPU builds run on CPUs too: without --index-url they come from pip's own index.)"
    fail(
        f"torchvision does not fit torch {found['version']} ({build}):\n"
        f"    {result.stderr.strip().splitlines()[-1]}\n"
        "Install both from one place:\n"
        f"    {python} -m pip uninstall --yes torch torchvision\n"
        f"    {python} -m pip install torch torchvision{index}" + (note if index else "")
    )


def probe(python: Path, code: str) -> dict:
    """What `code` prints as JSON in the environment, or an empty dict when it fails."""
    result = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return json.loads(result.stdout) if result.returncode == 0 else {}


def pip(python: Path, *requirements: str) -> list[str]:
    """The command line of one quiet `pip install`."""
    return [str(python), "-m", "pip", "install", "--quiet", *requirements]


def install(python: Path, *requirements: str) -> None:
    """Install in one pip call, so that the versions are resolved together."""
    say("installing " + " ".join(requirements))
    if subprocess.run(pip(python, *requirements)).returncode:
        fail("pip could not install " + " ".join(requirements))


def run(python: Path, *arguments: str) -> None:
    """Run pip and stop when it fails."""
    if subprocess.run([str(python), "-m", "pip", *arguments]).returncode:
        fail(f"pip {' '.join(arguments)} failed")


def succeeds(command: list[str]) -> bool:
    """Run silently; whether it worked."""
    return subprocess.run(command, capture_output=True).returncode == 0


def how_to_get_venv() -> str:
    """The usual reason for a missing ensurepip, and what to type."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return (
        f"this Python lacks parts of its standard library. On Debian or Ubuntu:\n"
        f"    sudo apt install python{version}-venv"
    )


def say(text: str) -> None:
    """Tell what happens now; minutes may pass before the next line."""
    sys.stderr.write(f"scanweave set-up: {text}\n")
    sys.stderr.flush()


def fail(text: str) -> None:
    """Stop with a message instead of a traceback."""
    sys.exit(f"scanweave set-up: {text}")


if __name__ == "__main__":
    main()
