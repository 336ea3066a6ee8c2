"""Which engine runs a model, and the ONNX folder where it is ONNX Runtime: bundled, given, or converted once."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from quasr.engine.onnx_engine import OnnxEngine
from quasr.engine.onnx_session import choose_runtime
from quasr.errors import CheckpointError, MissingDependencyError, OptionError
from quasr.export.manifest import VERSION, is_onnx_folder, read_manifest
from quasr.folders import cache_folder
from quasr.pipeline.retry import SAME_WEIGHTS, Retry
from quasr.quant.scheme import parse
from quasr.weights.hub import DEMO, DEMO_FOLDER
from quasr.weights.record import digest, identity

if TYPE_CHECKING:
    from quasr.engine.base import Engine
    from quasr.quant.scheme import Scheme

ENGINES = ("auto", "torch", "onnx")

DEMO_GRAPHS = DEMO_FOLDER.with_name("onnx")
"""The bundled model as an ONNX folder, which runs without torch."""

NVIDIA_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""There on Linux, natively and under Windows, where a CUDA device may be: asking torch costs its import."""

CONVERTING = ("torch", "onnx")
"""Packages that a conversion needs."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineWish:
    """What was asked for, as in `load`. `precision` is the compute type, or the dtype where only that was given.

    `torch_only`: why only torch can do it, "" where that is not so.
    """

    engine: str = "auto"
    provider: str = "auto"
    threads: int | None = None
    device: str = "auto"
    precision: str = "auto"
    torch_only: str = ""


@dataclass(frozen=True, slots=True)
class Weights:
    """fp32, int8 or int4, or None for whatever a folder has (int8 where it is converted); `group` None: any."""

    kind: str | None = None
    group: int | None = None

    def fit(self, kind: str, group: int) -> bool:
        """Whether a folder of `kind` in groups of `group` will do."""
        return self.kind in (None, kind) and self.group in (None, group)


@dataclass(frozen=True, slots=True)
class Choice:
    """`graphs` is the ONNX folder; None where torch is to run the model. `why` in one line."""

    graphs: Path | None
    why: str


def onnx_weights(precision: str) -> Weights | None:
    """What a compute type means in ONNX; None for those that only torch has: bf16, fp16, llm-int8 and nf4."""
    if precision in ("auto", "fp32"):
        return Weights(None if precision == "auto" else precision)
    if not precision.startswith(("int8", "int4")):
        return None
    scheme: Scheme = parse(precision)
    return Weights(scheme.kind, scheme.group if "-g" in precision else None)


def choose_engine(model: str, folder: Path, wish: EngineWish) -> Choice:
    """The engine of the model `model`, whose files are in `folder`.

    With auto, ONNX Runtime runs ONNX folders, the demo, and on a CPU what came from a hub, which is converted once and
    kept (`converted`); torch runs the rest. Raises OptionError for what does not go together, and
    MissingDependencyError where neither engine has what it needs.
    """
    if wish.engine not in ENGINES:
        raise OptionError(f"unknown engine {wish.engine[:40]!r}: use {', '.join(ENGINES)}")
    refusal, weights = torch_reason(wish), onnx_weights(wish.precision)
    if is_onnx_folder(folder):
        if refusal or weights is None:
            raise OptionError(f"{model} is an ONNX folder, but {refusal}: leave that out, or give the checkpoint")
        return _given(folder, weights)
    if wish.engine == "onnx" and refusal:
        raise OptionError(f"the onnx engine was asked for, but {refusal}: leave one of them out")
    if refusal or weights is None:
        return Choice(None, f"torch, because {refusal}")
    if model == DEMO and _holds(DEMO_GRAPHS, weights):
        return Choice(DEMO_GRAPHS, "the bundled model's ONNX graphs need no torch and start at once")
    if wish.engine == "onnx":
        return Choice(converted(model, folder, weights), "the onnx engine was asked for")
    return _automatic(model, folder, wish, weights)


def torch_reason(wish: EngineWish) -> str:
    """Why only torch can run it, or ""."""
    if wish.engine == "torch":
        return "the torch engine was asked for"
    if wish.torch_only:
        return wish.torch_only
    if wish.device.startswith("cuda"):
        return f"the device {wish.device} was asked for"
    if onnx_weights(wish.precision) is None:
        return f"{wish.precision} is torch's alone"
    return ""


def onnx_engine(choice: Choice, stops: frozenset[int], wish: EngineWish) -> Engine:
    """Raises CheckpointError, ResourceError, OptionError and MissingDependencyError."""
    assert choice.graphs is not None
    return OnnxEngine(choice.graphs, stops, choose_runtime(wish.provider, wish.threads), (choice.why,))


def onnx_retry(choice: Choice) -> Retry:
    """What second tries run on: the same, for an ONNX folder has one kind of weights."""
    assert choice.graphs is not None
    if read_manifest(choice.graphs).weights == "fp32":
        return SAME_WEIGHTS
    return Retry("quantised", "the ONNX folder holds no 16-bit weights")


def verify_graphs(folder: Path) -> list[str]:
    """Hashes the files of an ONNX folder and returns a line for each whose content is not what was exported.

    Raises CheckpointError as `read_manifest`.
    """
    files = read_manifest(folder).files
    damaged = [name for name, file in files.items() if digest(folder / name).sha256 != file.sha256]
    return [f"{name} has another content than when it was exported" for name in damaged]


def _given(folder: Path, weights: Weights) -> Choice:
    manifest = read_manifest(folder)
    if not weights.fit(manifest.weights, manifest.group):
        own = f"{manifest.weights} in groups of {manifest.group}" if manifest.group else manifest.weights
        raise OptionError(f"{folder} holds {own}: leave the compute type at auto, or export the model again")
    return Choice(folder, "the folder holds ONNX graphs")


def _holds(folder: Path, weights: Weights) -> bool:
    if not is_onnx_folder(folder):
        return False
    manifest = read_manifest(folder)
    return weights.fit(manifest.weights, manifest.group)


def _automatic(model: str, folder: Path, wish: EngineWish, weights: Weights) -> Choice:
    """For what is not ONNX yet, and may be either."""
    if wish.device == "auto" and _has_gpu():
        return Choice(None, "torch, because there is a CUDA device")
    missing = [package for package in CONVERTING if find_spec(package) is None]
    if "torch" in missing:
        raise MissingDependencyError(
            f"{model} has no ONNX graphs and torch is not installed: pip install 'quasr[quant]' to convert it here, "
            "or give a folder that 'quasr export' wrote elsewhere"
        )
    if model == DEMO or Path(model).is_dir():
        return Choice(None, "torch, because the folder holds no such ONNX graphs ('quasr export' makes them)")
    if missing:
        return Choice(None, "torch, because converting to ONNX, the faster way here, needs 'quasr[quant]'")
    return Choice(converted(model, folder, weights), "ONNX Runtime is the fastest engine on a CPU")


def _has_gpu() -> bool:
    if find_spec("torch") is None or not any(path.exists() for path in NVIDIA_DRIVERS):
        return False
    from quasr.engine.device import choose

    return choose().device.type == "cuda"


def converted(model: str, folder: Path, weights: Weights) -> Path:
    """The checkpoint `folder` as an ONNX folder in the user's cache, made when it is not there or damaged.

    It is found again by the checkpoint's identity and by what its weights are, so that a new upload makes a new one.
    Raises MissingDependencyError where 'quasr[quant]' is not installed, and as `export_folder`.
    """
    kind = weights.kind or "int8"
    what = f"{kind}-g{weights.group}" if weights.group else kind
    key = hashlib.sha256(f"{VERSION} {folder.resolve()} {identity(folder)}".encode()).hexdigest()[:16]
    target = cache_folder("onnx") / f"{re.sub(r'[^A-Za-z0-9._-]+', '--', model)[-80:].strip('.-')}-{what}-{key}"
    if not _is_whole(target):
        _convert(model, folder, target, Weights(kind, weights.group))
    return target


def _is_whole(target: Path) -> bool:
    if not target.exists():
        return False
    try:
        read_manifest(target)
    except CheckpointError as error:
        _log.warning("%s: it is converted again", error)
        shutil.rmtree(target)
        return False
    return True


def _convert(model: str, folder: Path, target: Path, weights: Weights) -> None:
    try:
        from quasr.export.folder import ExportOptions, export_folder
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"converting {model} to ONNX needs {error.name}: pip install 'quasr[quant]', "
            "or give a folder that 'quasr export' wrote elsewhere"
        ) from error
    _log.warning("%s is converted to %s ONNX graphs, once, into %s", model, weights.kind, target)
    export_folder(folder, target, ExportOptions(weights.kind, weights.group))
