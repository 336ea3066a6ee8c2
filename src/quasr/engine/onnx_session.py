"""ONNX Runtime: which provider runs the graphs, with how many threads, and its errors as ours."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from quasr.engine.cores import has_vnni, physical_cores
from quasr.errors import CheckpointError, MissingDependencyError, OptionError, ResourceError

if TYPE_CHECKING:
    from pathlib import Path

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""Short names, as options spell them, and ONNX Runtime's."""

PACKAGES = {
    "cpu": "pip install onnxruntime",
    "cuda": "pip uninstall onnxruntime, then pip install onnxruntime-gpu",
    "tensorrt": "pip uninstall onnxruntime, then pip install onnxruntime-gpu tensorrt",
}
"""What brings each provider."""

MOST_THREADS = 1024
"""ONNX Runtime breaks off at numbers beyond 31 bits, and threads beyond the cores only slow it."""

ONLY_ERRORS = 3
"""ONNX Runtime's severity: its warnings speak to those who make graphs."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """A provider (cpu, cuda or tensorrt), its threads on the CPU, and a line for each choice that was made.

    `ahead`: the clip that comes next is encoded beside the decoding of others, on as many threads again.
    """

    provider: str
    threads: int
    reasons: tuple[str, ...] = ()
    ahead: bool = False

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return "cpu" if self.provider == "cpu" else "cuda"


def choose_runtime(provider: str = "auto", threads: int | None = None) -> Runtime:
    """Where graphs run. auto is the CPU: speed on GPUs is the torch engine's, and unmeasured here.

    Raises OptionError for an unknown provider or a number of threads that cannot be, MissingDependencyError
    for a provider that the installed ONNX Runtime lacks.
    """
    if provider != "auto" and provider not in PROVIDERS:
        raise OptionError(f"unknown provider {provider[:40]!r}: use auto, {', '.join(PROVIDERS)}")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise OptionError(f"threads is {threads}: it must be at least 1 and at most {MOST_THREADS}")
    name = "cpu" if provider == "auto" else provider
    if name not in available_providers():
        raise MissingDependencyError(f"this ONNX Runtime has no provider {name}: {PACKAGES[name]}")
    why = "ONNX Runtime on the CPU" if provider == "auto" else f"the provider {name} was asked for"
    cores = physical_cores()
    many = f"a thread for each physical core: {cores}" if threads is None else f"threads were asked for: {threads}"
    if name != "cpu" or threads is None or 2 * threads > cores:
        return Runtime(name, threads or cores, (why, many))
    beside = f"the next clip is encoded beside the decoding: there are {cores} cores"
    return Runtime(name, threads, (why, many, beside), ahead=True)


def available_providers() -> list[str]:
    """Short names of the providers that the installed ONNX Runtime has. Raises MissingDependencyError without it."""
    there = _onnxruntime().get_available_providers()
    return [short for short, name in PROVIDERS.items() if name in there]


def open_session(path: Path, runtime: Runtime) -> Any:
    """The graph of `path`, ready to run.

    Raises CheckpointError for a file that is no graph, ResourceError where its provider cannot start or memory ends.
    """
    module = _onnxruntime()
    options = module.SessionOptions()
    options.intra_op_num_threads = runtime.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ONLY_ERRORS
    # Three graphs take turns: the threads of one that has just run would stand in the way of the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not has_vnni():
        # There the fast products of uint8 and int8 saturate; the exact ones take 2.7 times as long.
        options.add_session_config_entry("session.x64quantprecision", "1")
    wanted = PROVIDERS[runtime.provider]
    try:
        session = module.InferenceSession(path, options, providers=list(dict.fromkeys((wanted, PROVIDERS["cpu"]))))
    except Exception as error:
        if not _is_of_runtime(error):
            raise
        raise CheckpointError(f"{path} cannot be loaded ({_line(error)}): export the model again") from error
    if wanted not in session.get_providers():
        raise ResourceError(
            f"ONNX Runtime's provider {runtime.provider} does not start here: check its driver and libraries, "
            "or use --provider cpu"
        )
    return session


def out_of_memory(error: Exception) -> bool:
    """Whether memory has run out, numpy's or ONNX Runtime's."""
    if isinstance(error, MemoryError):
        return True
    return _is_of_runtime(error) and any(sign in str(error).lower() for sign in ("alloc", "out of memory"))


def _is_of_runtime(error: Exception) -> bool:
    """Whether ONNX Runtime raised it: its classes have no base of their own."""
    return type(error).__module__.startswith("onnxruntime")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _onnxruntime() -> Any:
    # Here and not above: the import takes a fifth of a second, and the base of the engine's tests needs none of it.
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise MissingDependencyError("onnxruntime is not installed: pip install onnxruntime") from error
