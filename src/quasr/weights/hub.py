"""From a model's name to a folder on this machine. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from quasr.errors import ModelNotFoundError, OptionError
from quasr.weights.record import verify

__all__ = ["HubOptions", "resolve", "verify"]

DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "model"
"""Part of the installed package."""

MODEL_ID = re.compile(r"(?!\.)[\w.-]+/(?!\.)[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubOptions:
    """Where ids are looked up. `hub` is huggingface or modelscope; `revision` None means the hub's main branch."""

    hub: str = "huggingface"
    revision: str | None = None
    offline: bool = False
    cache_dir: Path | None = None


def resolve(model: str, options: HubOptions) -> Path:
    """The folder of `demo` (bundled), of a local path (both without network), or of a hub id `org/name`.

    A hub's files are fetched unless they are cached and unchanged; `HF_ENDPOINT` and `MODELSCOPE_ENDPOINT` name
    mirrors. Raises ModelNotFoundError, HubError (network, refusal, wrong content), ResourceError (disk) or OptionError.
    """
    if model == "demo":
        return _demo()
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if path.is_file():
        raise ModelNotFoundError(f"{model} is a file: give the checkpoint's folder")
    if not MODEL_ID.fullmatch(model):
        raise ModelNotFoundError(f"no model folder {model!r}: give a folder, a hub id such as org/name, or 'demo'")
    return _fetch(model, options)


def _demo() -> Path:
    if not (DEMO_FOLDER / "config.json").is_file():
        raise ModelNotFoundError("this installation lacks the demo model: install quasr again, or give another model")
    return DEMO_FOLDER


def _fetch(model: str, options: HubOptions) -> Path:
    # Each client is imported when it is needed: huggingface_hub alone takes longer than `quasr --help` may.
    if options.hub == "huggingface":
        from quasr.weights import huggingface

        return huggingface.fetch(model, options)
    if options.hub == "modelscope":
        from quasr.weights import modelscope

        return modelscope.fetch(model, options)
    raise OptionError(f"unknown hub {options.hub!r}: there are huggingface and modelscope")
