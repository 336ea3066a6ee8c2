"""`quasr doctor`: what is installed, what there is to run on, what would run and why."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Annotated

import typer

from quasr import __version__
from quasr.cli.options import HubOption, RevisionOption  # noqa: TC001  (Typer reads the annotations)
from quasr.cli.terminal import megabytes, result
from quasr.errors import CheckpointError, QuasrError

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = (
    "onnxruntime", "torch", "onnx", "numpy", "av", "soxr", "tokenizers", "safetensors", "huggingface_hub", "modelscope",
    "jiwer", "whisper-normalizer", "bitsandbytes",
)  # fmt: skip


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Verify the cached files of this hub id, or an ONNX folder.", show_default=False
        ),
    ] = None,
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
) -> int:
    """Show what is installed, the devices, what would run and why."""
    for name, text in _findings():
        result(_line(name, text))
    return 0 if model is None else _verify(model, hub, revision)


def _line(name: str, text: str) -> str:
    return f"{name:<19} {text}"


def _findings() -> Iterator[tuple[str, str]]:
    yield "quasr", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        yield package, _version(package)
    yield from _devices()
    yield from _placement()
    yield from _providers()
    yield from _demo()


def _version(package: str) -> str:
    # Costs a tenth of the time that `quasr --help` may take.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[tuple[str, str]]:
    from quasr.engine.device import memory

    for device in memory():
        yield "memory", f"{device.device}: {megabytes(device.free)} free of {megabytes(device.total)}"


def _placement() -> Iterator[tuple[str, str]]:
    from quasr.engine.device import choose

    try:
        placement = choose()
    except QuasrError as error:
        yield "engine torch", f"cannot run: {error}"
        return
    yield "engine torch", f"would run on {placement.device}, {placement.dtype_name}"
    for reason in placement.reasons:
        yield "because", reason
    from quasr.kernels import dispatch

    kernels = dispatch.choose(placement.device, placement.dtype)
    yield "kernels", f"{kernels.name}: {kernels.reason}"
    if kernels.name == "triton":
        # Not all of them need be Triton's.
        yield from (("", line) for line in kernels.lines())


def _providers() -> Iterator[tuple[str, str]]:
    from quasr.engine.onnx_session import PROVIDERS, choose_runtime

    for provider in PROVIDERS:
        name = f"provider {provider}"
        try:
            runtime = choose_runtime(provider)
        except QuasrError as error:
            yield name, str(error)
        else:
            yield name, f"engine onnx would run on {runtime.device}, {runtime.reasons[-1]}"
    from quasr.engine.native_decoder import who_decodes

    try:
        yield "onnx decoder", who_decodes()
    except QuasrError as error:
        yield "onnx decoder", str(error)


def _demo() -> Iterator[tuple[str, str]]:
    from quasr.pipeline.onnx import EngineWish, choose_engine
    from quasr.weights.hub import HubOptions, resolve

    try:
        folder = resolve("demo", HubOptions())
        choice = choose_engine("demo", folder, EngineWish())
    except QuasrError as error:
        yield "demo model", str(error)
        return
    yield "demo model", f"{choice.graphs or folder}: {choice.why}"


def _verify(model: str, hub: str, revision: str | None) -> int:
    """Compares files with what was fetched or exported: 0, or the exit code of a damaged checkpoint."""
    from quasr.export.manifest import is_onnx_folder
    from quasr.pipeline.onnx import verify_graphs
    from quasr.weights.hub import HubOptions, resolve, verify

    folder = resolve(model, HubOptions(hub=hub, revision=revision, offline=True))
    damaged = verify_graphs(folder) if is_onnx_folder(folder) else verify(folder)
    for line in damaged or [f"{folder} is as it was {'exported' if is_onnx_folder(folder) else 'fetched'}"]:
        result(_line(model, line))
    return CheckpointError.exit_code if damaged else 0
