"""The decoder's C source as a library: compiled once on this machine, kept in the user's cache, loaded by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from quasr.errors import MissingDependencyError, OptionError, ResourceError

VARIABLE = "QUASR_NATIVE"
"""The environment variable: `auto`, the default, `off` for ONNX Runtime's decoder, or `on`, which fails loudly."""

SOURCE = Path(__file__).with_name("decoder.c")

FLAGS = ("-std=c11", "-O3", "-march=native", "-w", "-fno-math-errno", "-shared", "-fPIC", "-pthread")

COMPILERS = ("cc", "gcc", "clang")

NO_COMPILER = "there is no C compiler: install gcc or clang, or pip install ziglang"

FEATURES = Path("/proc/cpuinfo")

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
    own = shlex.split(os.environ.get("CC", ""))
    if own:
        return own if shutil.which(own[0]) else None
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    return [sys.executable, "-m", "ziglang", "cc"] if find_spec("ziglang") else None


def processor(features: Path = FEATURES) -> str:
    """What code made for this processor depends on: its name and its instructions, as far as they are told."""
    try:
        lines = features.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = ("model name", "flags", "Features", "CPU part", "isa")
    return "\n".join(line for line in lines if line.startswith(kept)) or platform.machine()


def cache_folder() -> Path:
    """Where libraries are kept: `quasr/native` in XDG_CACHE_HOME, or else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quasr" / "native"


def load() -> ctypes.CDLL:
    """The library, compiled on first use; found again by source, compiler, flags and processor.

    Raises MissingDependencyError where there is no compiler, ResourceError where it fails or the cache cannot be
    written.
    """
    compiler = find_compiler()
    if compiler is None:
        raise MissingDependencyError(NO_COMPILER)
    return _open(tuple(compiler), cache_folder())


@cache
def _open(compiler: tuple[str, ...], folder: Path) -> ctypes.CDLL:
    """A library, once loaded, stays so for the whole process."""
    parts = (SOURCE.read_text(encoding="utf-8"), *compiler, _run((*compiler, "--version")), *FLAGS, processor())
    path = folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
    if not path.is_file():
        _build(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ResourceError(f"{path} cannot be loaded ({_line(str(error))}): delete it") from error


def _build(compiler: tuple[str, ...], path: Path) -> None:
    """Compiles beside `path` and renames, so that another process sees all of it or nothing."""
    _log.warning("the decoder is compiled for this processor, once, into %s", path.parent)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as fresh:
            target = Path(fresh) / path.name
            _run((*compiler, *FLAGS, "-o", str(target), str(SOURCE)))
            target.replace(path)
    except OSError as error:
        raise ResourceError(f"{path.parent} cannot be written ({error.strerror}): set XDG_CACHE_HOME") from error


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
