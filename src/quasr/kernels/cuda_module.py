"""CUDA C++ compiled at run time by NVRTC, which torch brings, kept as machine code in a cache, launched by the driver.

Why not Triton: what these kernels live on, copies into shared memory that begin before the kernel before has ended, it
does not express. No nvcc is needed, and nothing of CUDA is linked.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from quasr.folders import cache_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

SOURCES = Path(__file__).parent / "cuda"
NVRTC_NAMES = tuple(f"libnvrtc.so{end}" for end in (".13", ".12", ""))
DEPENDENT_LAUNCH, MOST_SHARED, CARVEOUT = 6, 8, 9
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES and
CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of cuda.h."""
PROGRAM_SHARED = 97
"""CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN."""
WHOLE = 100
"""Per cent of a multiprocessor's fast memory that is shared memory: kernels that differ in it wait for each other."""

DIGEST_BYTES = hashlib.sha256().digest_size


class CompileError(RuntimeError):
    """NVRTC refused a source, or cannot be used."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, and a value in a union of 64 bytes that begins at byte 8."""

    _fields_ = (("id", ctypes.c_int), ("gap", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


_ATTRIBUTE = _Attribute(DEPENDENT_LAUNCH, 0, 1)


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a launch: programs along x and y, threads of one, bytes of dynamic shared memory."""

    grid: tuple[int, int]
    threads: int
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Function:
    """A kernel on a device."""

    handle: ctypes.c_void_p

    def launch(self, shape: Shape, arguments: Sequence[Tensor | int | float | None]) -> None:
        """Queues it on torch's stream, to start before the kernel before has ended. int: 32 bits; float: fp32."""
        values = [_value(argument) for argument in arguments]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = torch.cuda.current_stream().cuda_stream
        block = (ctypes.c_uint * 3)(shape.threads, 1, 1)
        config = _Config(
            (ctypes.c_uint * 3)(*shape.grid, 1), block, shape.shared, stream, ctypes.addressof(_ATTRIBUTE), 1
        )
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self.handle, places, None), "launch a kernel")


def _value(argument: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_float:
    if argument is None or isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(0 if argument is None else argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)


@cache
def function(device: int, file: str, name: str, shared: int, **macros: int) -> Function:
    """The kernel `name` of `cuda/file`, compiled for `device` with macros, which may use `shared` bytes.

    Raises CompileError where NVRTC refuses it.
    """
    code = machine_code(source(file), torch.cuda.get_device_capability(device), macros)
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    driver = _driver()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # which makes the context where there is none yet
        _check(driver.cuModuleLoadData(ctypes.byref(module), code), f"load {name}")
        _check(driver.cuModuleGetFunction(ctypes.byref(handle), module, name.encode()), f"find {name}")
        _check(driver.cuFuncSetAttribute(handle, MOST_SHARED, shared), f"give {name} {shared} bytes of shared memory")
        _check(driver.cuFuncSetAttribute(handle, CARVEOUT, WHOLE), f"set the shared memory of {name}")
    return Function(handle)


def index(device: torch.device) -> int:
    """The number of a GPU."""
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def shared_memory(device: int) -> int:
    """Bytes of shared memory that a program may have. torch has made CUDA ready before."""
    place, found, driver = ctypes.c_int(), ctypes.c_int(), _driver()
    _check(driver.cuDeviceGet(ctypes.byref(place), device), f"find device {device}")
    _check(driver.cuDeviceGetAttribute(ctypes.byref(found), PROGRAM_SHARED, place), "tell its shared memory")
    return found.value


def source(file: str) -> str:
    """The text of `cuda/file` behind what all of them share."""
    return (SOURCES / "common.cuh").read_text() + (SOURCES / file).read_text()


def machine_code(text: str, capability: tuple[int, int], macros: Mapping[str, int]) -> bytes:
    """Compiles `text`, or finds what was compiled before in the cache. Raises CompileError."""
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17", "-default-device"]
    options += [f"-D{name}={value}" for name, value in sorted(macros.items())]
    key = hashlib.sha256("\0".join([text, *options, str(version())]).encode()).hexdigest()
    kept = cache_folder("cuda") / f"{key}.cubin"
    code = _kept(kept)
    if code is None:
        code = compile_source(text, options)
        _keep(code, kept)
    return code


def _kept(path: Path) -> bytes | None:
    """What `_keep` wrote; None where it did not, or where a crash of the machine or a full disk left another thing."""
    try:
        found = path.read_bytes()
    except OSError:
        return None
    code, digest = found[:-DIGEST_BYTES], found[-DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _keep(code: bytes, path: Path) -> None:
    """The code and its SHA-256, written beside and renamed, so that others never read a part.

    A folder that cannot be written keeps nothing.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as fresh:
            written = Path(fresh) / path.name
            written.write_bytes(code + hashlib.sha256(code).digest())
            written.replace(path)
    except OSError:
        return


def compile_source(text: str, options: Sequence[str]) -> bytes:
    """Machine code of a source by NVRTC. Raises CompileError with what the compiler says."""
    library = _nvrtc()
    if library is None:
        raise CompileError("NVRTC is not installed")
    program = ctypes.c_void_p()
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"quasr.cu", 0, None, None):
        raise CompileError("NVRTC makes no program")
    try:
        if library.nvrtcCompileProgram(program, len(options), given):
            raise CompileError(_read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).decode())
        return _read(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(measure: ctypes._NamedFuncPointer, read: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    measure(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    read(program, text)
    return text.raw


@cache
def version() -> tuple[int, int] | None:
    """NVRTC's version, None where it is not installed."""
    library = _nvrtc()
    if library is None:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@cache
def _nvrtc() -> ctypes.CDLL | None:
    for name in (*NVRTC_NAMES, *_bundled()):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _bundled() -> Iterator[str]:
    """Where NVIDIA's wheels, which torch depends on, put it."""
    for folder in sys.path:
        yield from map(str, sorted(Path(folder).glob("nvidia/*/lib/libnvrtc.so.*"), reverse=True))


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"CUDA cannot {what}: error {code} of the driver")
