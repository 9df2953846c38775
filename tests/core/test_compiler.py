"""Compiling a C file on first use: the cache, what may go wrong with it, and what is said then."""

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from scanweave.core.ops import compiler
from scanweave.core.ops.compiler import BuildError, find_compiler, load_library
from scanweave.core.ops.selective import compiled

ANSWER = "int answer(void) { return %d; }\n"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SCANWEAVE_CACHE", str(folder))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small C file; skips without a compiler."""
    try:
        compiler._run([*find_compiler(), "--version"])
    except BuildError as error:
        pytest.skip(f"needs a C compiler ({error})")
    path = tmp_path / "answer.c"
    path.write_text(ANSWER % 42)
    return path


def wrapper(folder: Path, refused: str) -> str:
    """A compiler that does not know the flag `refused`."""
    script = folder / "wrapped-cc"
    real = " ".join(find_compiler())
    script.write_text(
        "#!/bin/sh\n"
        f'case " $* " in *" {refused} "*) echo "error: no {refused}" >&2; exit 1;; esac\n'
        f'exec {real} "$@"\n'
    )
    script.chmod(0o700)
    return str(script)


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


def forbid_compiling(*_: object) -> None:
    raise AssertionError("compiles although the cache has the file")


def test_compiles_once(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    library, about = load_library(source)
    assert library.answer() == 42
    (made,) = libraries(cache)
    assert str(made) in about
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert sorted(v.suffix for v in cache.iterdir()) == [".sha256", ".so"]
    monkeypatch.setattr(compiler, "_compile", forbid_compiling)
    assert load_library(source)[0].answer() == 42


def test_changed_source_or_processor_is_compiled_again(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    load_library(source)
    source.write_text(ANSWER % 43)
    assert load_library(source)[0].answer() == 43
    assert len(libraries(cache)) == 2
    monkeypatch.setattr(compiler, "_processor", lambda: "another")
    load_library(source)
    assert len(libraries(cache)) == 3
    source.with_name("header.h").write_text("")
    load_library(source)
    assert len(libraries(cache)) == 4


@pytest.mark.parametrize("damage", ["cut", "digest", "no digest", "no library"])
def test_damaged_file_is_compiled_again(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
):
    monkeypatch.setattr(compiler, "_runtime", lambda _: [])  # the child has no torch
    path = source.with_name("damaged.c")
    path.write_text(ANSWER % 7)
    load_in_child(path, cache)
    (made,) = libraries(cache)
    digest = made.with_suffix(".sha256")
    if damage == "cut":
        made.write_bytes(made.read_bytes()[:100])
    elif damage == "digest":
        digest.write_bytes(b"\xff\xfe")
    elif damage == "no digest":
        digest.unlink()
    else:  # an intact file that is no library
        made.write_bytes(b"nothing")
        digest.write_text(compiler._hash(b"nothing"))
    assert load_library(path)[0].answer() == 7
    assert digest.read_text() == compiler._hash(made.read_bytes())


def load_in_child(path: Path, cache: Path, count: int = 1) -> list[str]:
    """What `count` processes at once print after loading; none of them imports torch."""
    code = (
        "import runpy, sys, pathlib; load = runpy.run_path(sys.argv[1])['load_library']; "
        "print(load(pathlib.Path(sys.argv[2]))[0].answer())"
    )
    command = [sys.executable, "-I", "-c", code, compiler.__file__, str(path)]
    environment = os.environ | {"SCANWEAVE_CACHE": str(cache)}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    results = [process.communicate()[0].strip() for process in running]
    assert [process.returncode for process in running] == [0] * count
    return results


def test_processes_compile_at_once(source: Path, cache: Path):
    assert load_in_child(source, cache, 3) == ["42"] * 3
    assert len(libraries(cache)) == 1
    assert not list(cache.glob("build-*"))


@pytest.mark.parametrize("refused", ["-fopenmp", "-march=native"])
def test_flags_that_a_compiler_lacks_are_left_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
):
    monkeypatch.setenv("CC", wrapper(tmp_path, refused))
    library, about = load_library(source)
    assert library.answer() == 42
    assert refused not in about


def test_scan_compiles_without_openmp_and_for_plain_processors(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CC", wrapper(tmp_path, "-fopenmp"))
    library, _ = load_library(compiled.native.source)
    assert library.scanweave_openmp() == 0
    monkeypatch.setattr(compiler, "EXTRA_FLAGS", ((),))
    library, _ = load_library(compiled.native.source)
    assert library.scanweave_lanes() in (4, 8, 16)
    assert source.exists()


def test_error_of_the_compiler_is_passed_on(source: Path):
    source.write_text("int answer(void) { return nothing; }\n")
    with pytest.raises(BuildError, match=r"failed \(.*error: .*nothing"):
        load_library(source)


def test_no_compiler(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match="there is no C compiler; install gcc or clang"):
        load_library(source)
    monkeypatch.setenv("CC", "/no/compiler -m64")
    with pytest.raises(BuildError, match="CC is '/no/compiler -m64', which is not there"):
        load_library(source)


def test_compiler_that_does_not_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "broken-cc"
    broken.write_bytes(b"\x00\x01")
    broken.chmod(0o700)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(BuildError, match="broken-cc does not run"):
        load_library(source)


def test_cache_that_cannot_be_made(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCANWEAVE_CACHE", str(source / "cache"))
    with pytest.raises(BuildError, match=r"cannot be made .* set SCANWEAVE_CACHE"):
        load_library(source)


def test_cache_that_cannot_be_written(source: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(compiler.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(BuildError, match=r"cannot be written \(Read-only file system\); set"):
        load_library(source)


def test_cache_without_execution(source: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(name: str) -> None:
        raise OSError("failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(
        BuildError, match=r"cannot be loaded \(failed to map .* set SCANWEAVE_CACHE"
    ):
        load_library(source)


def test_cache_that_others_may_write_to(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(BuildError, match="belongs to another user or others may write to it"):
        load_library(source)
    cache.chmod(0o700)
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(BuildError, match="belongs to another user"):
        load_library(source)


def test_system_that_is_not_supported(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ctypes, "sizeof", lambda _: 4)
    with pytest.raises(BuildError, match="only 64-bit Linux and macOS"):
        load_library(source)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCANWEAVE_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert compiler.cache_folder() == Path("/a")
    monkeypatch.delenv("SCANWEAVE_CACHE")
    assert compiler.cache_folder() == Path("/b/scanweave")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert compiler.cache_folder() == Path("/c/.cache/scanweave")


@pytest.mark.parametrize(
    ("version", "path", "expected"),
    [
        ("gcc 12", "/x/torch.libs/libgomp-a1b2.so.1.0.0", ["/x/torch.libs/libgomp-a1b2.so.1.0.0"]),
        ("gcc 12", "/x/torch/lib/libgomp.so.1", []),
        ("gcc 12", "/x/scikit_learn.libs/libgomp-a1b2.so.1.0.0", []),
        ("clang 17", "/x/torch.libs/libgomp-a1b2.so.1.0.0", []),
    ],
)
def test_shares_the_openmp_library_of_torch(
    monkeypatch: pytest.MonkeyPatch, version: str, path: str, expected: list[str]
):
    line = f"7f00-7f01 r-xp 00000000 08:01 123    {path}\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: line)
    assert compiler._runtime(version) == expected
