"""The C library: which compiler, that it is built once, what is said where it cannot be. The compilers are scripts."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from quasr.errors import MissingDependencyError, ResourceError
from quasr.folders import cache_folder
from quasr.native import library

if TYPE_CHECKING:
    from pathlib import Path

SMALL = "int quasr_stored_bytes(void) { return 2; }\n"


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that is compiled in no time, and a cache of one's own."""
    source = tmp_path / "small.c"
    source.write_text(SMALL)
    monkeypatch.setattr(library, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    library._open.cache_clear()
    return source


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$CC: the real one, which also notes each compilation in a file beside it."""
    real = library.find_compiler()
    if real is None:
        pytest.skip("there is no C compiler here")
    return scripted(tmp_path, monkeypatch, f'case "$*" in *-o*) echo x >> "$0.log";; esac; exec {" ".join(real)} "$@"')


def scripted(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    return path


def compilations(compiler: Path) -> int:
    log = compiler.with_name("compiler.log")
    return len(log.read_text().split()) if log.exists() else 0


def test_it_is_compiled_once_and_again_when_something_has_changed(
    compiler: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (1, 1):
        library._open.cache_clear()
        assert library.load().quasr_stored_bytes() == 2
        assert compilations(compiler) == count
    library._open.cache_clear()
    small.write_text(SMALL.replace("2", "4"))
    assert library.load().quasr_stored_bytes() == 4
    library._open.cache_clear()
    monkeypatch.setattr(library, "processor", lambda: "another")
    assert library.load().quasr_stored_bytes() == 4
    assert compilations(compiler) == 3
    assert sorted(path.suffix for path in cache_folder(library.CACHE).iterdir()) == [".so"] * 3


def caches(folder: Path, *told: tuple[str, str, str]) -> Path:
    """As Linux tells of them, each in a folder of its own: level, type, size."""
    for index, texts in enumerate(told):
        (folder / f"index{index}").mkdir(parents=True)
        for name, text in zip(("level", "type", "size"), texts, strict=True):
            (folder / f"index{index}" / name).write_text(f"{text}\n")
    return folder


def test_the_nearest_data_cache_is_found(tmp_path: Path) -> None:
    told = ("1", "Instruction", "64K"), ("2", "Unified", "1024K"), ("1", "Data", "48K")
    assert library.near_cache(caches(tmp_path / "some", *told)) == 48
    assert library.near_cache(caches(tmp_path / "shared", ("1", "Unified", "32K"))) == 32
    assert library.near_cache(caches(tmp_path / "far", ("2", "Unified", "1024K"))) is None
    assert library.near_cache(caches(tmp_path / "odd", ("1", "Data", "much"))) is None
    assert library.near_cache(tmp_path / "none") is None


@pytest.mark.parametrize(("kilobytes", "known"), [(32, 32 << 10), (48, 48 << 10), (None, 7)])
def test_the_source_is_told_of_the_nearest_cache(
    kilobytes: int | None, known: int, compiler: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.write_text(
        "#ifndef NEAR_CACHE\n#define NEAR_CACHE 7\n#endif\nint quasr_stored_bytes(void) { return NEAR_CACHE; }\n"
    )
    monkeypatch.setattr(library, "near_cache", lambda: kilobytes)
    assert library.load().quasr_stored_bytes() == known


def _load_in_child(_: int) -> int:
    library._open.cache_clear()
    return int(library.load().quasr_stored_bytes())


def test_processes_that_build_at_once_do_not_disturb_each_other(compiler: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_load_in_child, range(6), chunksize=1) == [2] * 6
    assert 1 <= compilations(compiler) <= 3
    assert len(list(cache_folder(library.CACHE).iterdir())) == 1


def test_a_compiler_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(tmp_path, monkeypatch, 'case "$*" in *-o*) echo "no such\ninstruction" >&2; exit 1;; esac')
    with pytest.raises(ResourceError, match=r"the C compiler .* fails \(no such instruction\)$"):
        library.load()
    assert list(cache_folder(library.CACHE).iterdir()) == []
    scripted(tmp_path, monkeypatch, "exit 3")
    with pytest.raises(ResourceError, match=r"fails \(exit code 3\)$"):
        library.load()


def test_what_is_no_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(tmp_path, monkeypatch, 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo no > "$2"; shift; done')
    with pytest.raises(ResourceError, match=r"cannot be loaded \(.*\): delete it$"):
        library.load()


def test_a_cache_that_cannot_be_written_is_one_line(compiler: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    with pytest.raises(ResourceError, match=r"native cannot be written \(Not a directory\): set XDG_CACHE_HOME$"):
        library.load()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_library_that_others_may_have_put_there_is_not_loaded(compiler: Path, mode: int) -> None:
    library.load()
    library._open.cache_clear()
    cache_folder(library.CACHE).chmod(mode)
    with pytest.raises(ResourceError, match=r"native is not yours alone to write: chmod 700 or delete it"):
        library.load()
    cache_folder(library.CACHE).chmod(0o755)
    assert library.load().quasr_stored_bytes() == 2


def test_a_library_of_somebody_else_is_not_loaded(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.load()
    library._open.cache_clear()
    (path,) = cache_folder(library.CACHE).iterdir()
    if (me := os.geteuid()) == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(ResourceError, match=r" is not yours alone to write: chmod 700 or delete it"):
        library.load()


def test_what_is_compiled_is_one_s_own_whatever_the_mask(compiler: Path) -> None:
    before = os.umask(0)
    try:
        library.load()
    finally:
        os.umask(before)
    folder = cache_folder(library.CACHE)
    assert [path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())] == [0o700] * 2


def test_a_cache_that_cannot_be_looked_into_is_one_line(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", f"/{'x' * 300}")
    with pytest.raises(ResourceError, match=r"native cannot be written \(File name too long\): set XDG_CACHE_HOME$"):
        library.load()


def test_a_user_without_a_home_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", nowhere)
    with pytest.raises(ResourceError, match=r"there is no home folder .*: set XDG_CACHE_HOME$"):
        cache_folder(library.CACHE)


@pytest.mark.parametrize("own", ["'gcc", "/no such/gcc -m64"])
def test_a_compiler_of_one_s_own_that_is_not_there_is_named(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", own)
    assert library.find_compiler() is None
    with pytest.raises(MissingDependencyError, match=r"^CC is .*, which is no command: quote its spaces or unset it$"):
        library.load()


def test_the_first_run_says_what_it_waits_for(compiler: Path, caplog: pytest.LogCaptureFixture) -> None:
    library.load()
    assert caplog.messages == [
        f"the decoder is compiled for this processor, once, into {cache_folder(library.CACHE)}: some 10 s"
    ]
    caplog.clear()
    library._open.cache_clear()
    library.load()
    assert caplog.messages == []


def test_which_compiler_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = {"clang": "/bin/clang", "gcc": "/bin/gcc"}
    monkeypatch.setattr(shutil, "which", there.get)
    assert library.find_compiler() == ["/bin/gcc"]
    monkeypatch.setenv("CC", "clang -m64")
    assert library.find_compiler() == ["clang", "-m64"]
    monkeypatch.setenv("CC", "missing")
    assert library.find_compiler() is None
    monkeypatch.delenv("CC")
    there.clear()
    monkeypatch.setattr(library, "find_spec", lambda name: name == "ziglang")
    assert (library.find_compiler() or [])[1:] == ["-m", "ziglang", "cc"]
    monkeypatch.setattr(library, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="there is no C compiler: install gcc or clang"):
        library.load()


def test_what_is_known_of_the_processor(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name : X\nflags : a b\n\nprocessor : 1\nmodel name : X\nflags : a b\n")
    assert library.processor(info) == "model name : X\nflags : a b"
    assert library.processor(tmp_path / "none")
