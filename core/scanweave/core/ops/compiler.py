"""Shared libraries from a C file: compiled on first use, then loaded from the user's cache.

    load_library   compile or find, then load; a BuildError that says why and what helps
    cache_folder   $SCANWEAVE_CACHE, else $XDG_CACHE_HOME/scanweave, else ~/.cache/scanweave

A file's name holds a hash of all that decides its code (source, flags, compiler, processor), and
beside it lies the hash of its bytes: a damaged file is compiled again, never loaded. Files appear
under their names complete, so any number of processes may compile at once.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")
# -ffast-math never: it reassociates what rounds on purpose and drops NaN and infinities
FLAGS = (
    "-std=c11",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
)
# tried in this order: some compilers lack the one or the other
EXTRA_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
TIMEOUT_SECONDS = 120


class BuildError(Exception):
    """Why there is no library, and what helps."""


def cache_folder() -> Path:
    """The folder of compiled files; it need not exist."""
    for variable, parts in (("SCANWEAVE_CACHE", ()), ("XDG_CACHE_HOME", ("scanweave",))):
        if os.environ.get(variable):
            return Path(os.environ[variable], *parts)
    return Path(os.path.expanduser("~"), ".cache", "scanweave")


def load_library(source: Path) -> tuple[ctypes.CDLL, str]:
    """Compile `source` unless the cache has it, and load it.

    Args:
        source: A C file; beside the system's, it includes headers by their path from its folder.

    Returns:
        The library, and a word on what it was made with.

    Raises:
        BuildError: no compiler, no cache, or one of them fails; the text says what helps.
    """
    if os.name != "posix" or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise BuildError("only 64-bit Linux and macOS are supported")
    compiler = find_compiler()
    version = _run([*compiler, "--version"])
    folder = _open_cache()
    headers = sorted({*source.parent.glob("*.h"), *_included(source)} - {source})
    text = [v.read_bytes() for v in (source, *headers)]
    failure = ""
    for extra in EXTRA_FLAGS:
        flags = [*FLAGS, *extra]
        tail = _runtime(version) if "-fopenmp" in extra else []
        key = _hash("\0".join([*compiler, version, *flags, *tail, _processor()]).encode(), *text)
        target = folder / f"{source.stem}-{key}.so"
        about = f"{version.splitlines()[0]}, {' '.join(extra) or 'plain'}, {target}"
        if _intact(target):
            try:
                return ctypes.CDLL(str(target)), about
            except OSError as error:
                failure = f"{target} cannot be loaded ({error})"
        try:
            _compile([*compiler, *flags], source, tail, target)
            return ctypes.CDLL(str(target)), about
        except BuildError as error:
            failure = str(error)
        except OSError as error:
            # a cache on a file system without execution, or no OpenMP library to link with
            failure = f"{target} cannot be loaded ({error}); set SCANWEAVE_CACHE to another folder"
    raise BuildError(failure)


def _included(source: Path) -> set[Path]:
    """Headers that a C file includes by name, and those that they include."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        file = waiting.pop()
        names = re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)
        new = {(file.parent / name).resolve() for name in names} - found
        found |= new
        waiting.extend(new)
    return found


def find_compiler() -> list[str]:
    """$CC if it is set, else the first C compiler on the PATH.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("CC", "").strip()
    if chosen:
        words = shlex.split(chosen)
        if shutil.which(words[0]) is None:
            raise BuildError(f"CC is {chosen!r}, which is not there; set it to a C compiler")
        return words
    for name in COMPILERS:
        path = shutil.which(name)
        if path:
            return [path]
    raise BuildError("there is no C compiler; install gcc or clang, or set CC")


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} does not run ({error}); set CC to a C compiler") from error
    if result.returncode != 0:
        lines = [v for v in result.stderr.splitlines() if "error:" in v] or [result.stderr.strip()]
        raise BuildError(
            f"{command[0]} failed ({lines[0][:200] or result.returncode}); set CC to a C compiler"
        )
    return result.stdout.strip() or "unknown compiler"


def _open_cache() -> Path:
    """The cache folder, made if need be; only one that nobody else can put files into."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise BuildError(
            f"{folder} cannot be made ({error.strerror}); set SCANWEAVE_CACHE to another folder"
        ) from error
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(
            f"{folder} belongs to another user or others may write to it; "
            "set SCANWEAVE_CACHE to another folder"
        )
    return folder


def _compile(command: list[str], source: Path, tail: list[str], target: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as work:
            made = Path(work, "made.so")
            _run([*command, str(source), "-o", str(made), "-lm", *tail])
            digest = Path(work, "digest")
            digest.write_text(_hash(made.read_bytes()))
            made.replace(target)
            digest.replace(_digest_of(target))
    except OSError as error:
        raise BuildError(
            f"{target.parent} cannot be written ({error.strerror}); "
            "set SCANWEAVE_CACHE to another folder"
        ) from error


def _digest_of(target: Path) -> Path:
    return target.with_suffix(".sha256")


def _intact(target: Path) -> bool:
    """Whether the file is there, ours, and as the compiler left it."""
    try:
        if target.stat().st_uid != os.getuid():
            return False
        return _digest_of(target).read_text() == _hash(target.read_bytes())
    except (OSError, UnicodeDecodeError):
        return False


def _hash(*parts: bytes) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()[:32]


def _processor() -> str:
    """What -march=native depends on: homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    wanted = ("model name", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(
        [platform.machine(), *sorted({v for v in lines if v.split("\t")[0].strip() in wanted})]
    )


def _runtime(version: str) -> list[str]:
    """The OpenMP library that torch has loaded, where it goes by another name than the system's.

    Two OpenMP libraries in one process mean two sets of threads that wait for each other's cores.
    """
    if "clang" in version:
        return []
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    paths = {v.split(maxsplit=5)[-1] for v in lines if "/torch" in v and "/libgomp" in v}
    return sorted(v for v in paths if not v.endswith("/libgomp.so.1"))[:1]
