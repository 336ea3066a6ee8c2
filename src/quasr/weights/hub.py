"""From a model's name to a folder on this machine. No torch here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quasr.errors import ModelNotFoundError, OptionError
from quasr.weights.record import verify

__all__ = ["HubOptions", "resolve", "resolve_config", "verify"]

DEMO = "demo"
"""The name of the bundled model."""

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
    here = _local(model)
    return _client(options.hub).fetch(model, options) if here is None else here


def resolve_config(model: str, options: HubOptions) -> Path:
    """As `resolve`, but of a hub's model no more is fetched than its configuration: a folder without weights."""
    here = _local(model)
    return _client(options.hub).fetch_config(model, options) if here is None else here


def local_folder(model: str) -> Path | None:
    """The folder of this path, if there is one. By `os.path`, because `Path` raises for names that no file can have."""
    path = os.path.expanduser(model)
    return Path(path) if os.path.isdir(path) else None


def _local(model: str) -> Path | None:
    """The folder of what needs no hub; None for an id."""
    if model == DEMO:
        return _demo()
    here = local_folder(model)
    if here is not None:
        return here
    if os.path.isfile(os.path.expanduser(model)):
        raise ModelNotFoundError(f"{model} is a file: give the checkpoint's folder")
    if not MODEL_ID.fullmatch(model):
        raise ModelNotFoundError(f"no model folder {model!r}: give a folder, a hub id such as org/name, or 'demo'")
    return None


def _demo() -> Path:
    if not (DEMO_FOLDER / "config.json").is_file():
        raise ModelNotFoundError("this installation lacks the demo model: install quasr again, or give another model")
    return DEMO_FOLDER


def _client(hub: str) -> Any:
    """The module with `fetch` and `fetch_config` for a hub. Raises OptionError."""
    # Each client is imported when it is needed: huggingface_hub alone takes longer than `quasr --help` may.
    if hub == "huggingface":
        from quasr.weights import huggingface

        return huggingface
    if hub == "modelscope":
        from quasr.weights import modelscope

        return modelscope
    raise OptionError(f"unknown hub {hub!r}: there are huggingface and modelscope")
