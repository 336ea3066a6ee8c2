"""The decoder's C source as a library: compiled once on this machine, kept in the user's cache, loaded by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from quasr.errors import MissingDependencyError, OptionError, ResourceError
from quasr.folders import cache_folder

VARIABLE = "QUASR_NATIVE"
"""The environment variable: `auto`, the default, `off` for ONNX Runtime's decoder, or `on`, which fails loudly."""

SOURCE = Path(__file__).with_name("decoder.c")

CACHE = "native"
"""The cache folder of libraries."""

FLAGS = ("-std=c11", "-O3", "-march=native", "-w", "-fno-math-errno", "-shared", "-fPIC", "-pthread")

COMPILERS = ("cc", "gcc", "clang")

NO_COMPILER = "there is no C compiler: install gcc or clang, or pip install ziglang"

FEATURES = Path("/proc/cpuinfo")

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

PATIENCE = 300
"""Seconds that a compiler may take: it takes some five."""

_log = logging.getLogger(__name__)


def wish() -> str:
    """auto, off or on, as QUASR_NATIVE says. Raises OptionError for anything else."""
    found = os.environ.get(VARIABLE, "auto")
    if found not in ("auto", "off", "on"):
        raise OptionError(f"{VARIABLE} is {found[:40]!r}: use auto, off or on")
    return found


def find_compiler() -> list[str] | None:
    """The command of a C compiler: $CC, cc, gcc, clang, or the one of the package ziglang; None where there is none."""
    try:
        own = shlex.split(os.environ.get("CC", ""))
    except ValueError:
        return None
    if own:
        return own if shutil.which(own[0]) else None
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    return [sys.executable, "-m", "ziglang", "cc"] if find_spec("ziglang") else None


def no_compiler() -> str:
    """Why there is none, and what to do."""
    own = os.environ.get("CC", "").strip()
    return f"CC is {own[:80]!r}, which is no command: quote its spaces or unset it" if own else NO_COMPILER


def processor(features: Path = FEATURES) -> str:
    """What code made for this processor depends on: its name and its instructions, as far as they are told."""
    try:
        lines = features.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = ("model name", "flags", "Features", "CPU part", "isa")
    return "\n".join(line for line in lines if line.startswith(kept)) or platform.machine()


def near_cache(caches: Path = CACHES) -> int | None:
    """Kilobytes of the nearest data cache of the first core, where the system tells: `caches` is Linux's."""
    try:
        for folder in sorted(caches.glob("index*")):
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
            if level == "1" and kind != "Instruction":
                return int(size.removesuffix("K"))
    except (OSError, ValueError):
        return None
    return None


def _flags() -> tuple[str, ...]:
    """With which the source is compiled on this machine."""
    kilobytes = near_cache()
    return FLAGS if kilobytes is None else (*FLAGS, f"-DNEAR_CACHE={kilobytes << 10}")


def load() -> ctypes.CDLL:
    """The library, compiled on first use; found again by source, compiler, flags and processor.

    Raises MissingDependencyError where there is no compiler, ResourceError where it fails, or the cache cannot be
    written or can be by others.
    """
    compiler = find_compiler()
    if compiler is None:
        raise MissingDependencyError(no_compiler())
    return _open(tuple(compiler), cache_folder(CACHE))


@cache
def _open(compiler: tuple[str, ...], folder: Path) -> ctypes.CDLL:
    """A library, once loaded, stays so for the whole process."""
    flags = _flags()
    parts = (SOURCE.read_text(encoding="utf-8"), *compiler, _run((*compiler, "--version")), *flags, processor())
    path = folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(folder)
        if not path.is_file():
            _build((*compiler, *flags), path)
        _check_owner(path)
    except OSError as error:
        raise ResourceError(f"{folder} cannot be written ({error.strerror}): set XDG_CACHE_HOME") from error
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ResourceError(f"{path} cannot be loaded ({_line(str(error))}): delete it") from error


def _build(command: tuple[str, ...], path: Path) -> None:
    """Compiles with `command` beside `path` and renames, so that another process sees all of it or nothing."""
    _log.warning("the decoder is compiled for this processor, once, into %s: some 10 s", path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent) as fresh:
        target = Path(fresh) / path.name
        _run((*command, "-o", str(target), str(SOURCE)))
        target.chmod(0o700)
        # On the disk before it has its name: half a library, after a power cut, would crash whoever loads it.
        with target.open("rb+") as written:
            os.fsync(written.fileno())
        target.replace(path)


def _check_owner(path: Path) -> None:
    """Raises ResourceError for what others may have put there: a library runs as soon as it is loaded."""
    if not hasattr(os, "geteuid"):
        return
    found = path.stat()
    shared = path.is_dir() and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if shared or found.st_uid not in (0, os.geteuid()):
        raise ResourceError(f"{path} is not yours alone to write: chmod 700 or delete it, or set XDG_CACHE_HOME")


def _run(command: tuple[str, ...]) -> str:
    """What the compiler says. Raises ResourceError where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(f"the C compiler {command[0]} does not run ({_line(str(error))})") from error
    if done.returncode:
        said = _line(done.stderr or done.stdout) or f"exit code {done.returncode}"
        raise ResourceError(f"the C compiler {command[0]} fails ({said})")
    return done.stdout


def _line(text: str) -> str:
    return " ".join(text.split())[:200]
