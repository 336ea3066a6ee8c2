"""From a network to a checkpoint folder that appears whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from quasr.errors import ResourceError
from quasr.weights.layout import name_table
from quasr.weights.load import INDEX_FILE, SINGLE_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from quasr.model.asr import Qwen3ASR
    from quasr.model.config import Layout


def save_model(
    model: Qwen3ASR,
    folder: Path,
    config: dict[str, Any],
    layout: Layout = "original",
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes weights and `config` (the content of config.json, in the same layout) as `folder`.

    All is written to a hidden sibling first and then renamed. Where `folder` exists its weights and config.json are
    replaced and its other files (tokenizer, model card) kept. A tied head is not written twice.
    Raises ResourceError where the disk is full or may not be written.
    """
    with fresh_folder(folder) as fresh:
        _write_weights(model, fresh, layout, dtype, max_shard_bytes)
        write_json(fresh / "config.json", config)
        if folder.is_dir():
            _keep_others(folder, fresh)


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """A hidden sibling that takes the place of `folder` when the block ends, and is gone if the block fails.

    Raises ResourceError where the disk is full or may not be written.
    """
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        _swap(fresh, folder)
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"cannot write the checkpoint {folder}: {_reason(error)}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _reason(error: OSError | SafetensorError) -> str:
    """One line. Safetensors tells the system's error number in its text only."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if getattr(error, "errno", None) in codes or any(f"os error {code})" in str(error) for code in codes):
        return "the disk is full: make room, or write elsewhere"
    return str(error)


def _write_weights(model: Qwen3ASR, folder: Path, layout: Layout, dtype: torch.dtype, max_shard_bytes: int) -> None:
    parameters = model.state_dict()
    names = name_table(parameters, layout)
    shards = list(_group(parameters, max_shard_bytes // dtype.itemsize))
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {names[key]: parameters[key].to("cpu", dtype).contiguous() for key in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = sum(value.numel() for value in parameters.values()) * dtype.itemsize
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": index})


def _group(parameters: dict[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Names in order, cut where the next tensor would exceed `limit` numbers; a larger tensor stands alone."""
    group: list[str] = []
    size = 0
    for name, tensor in parameters.items():
        more = tensor.numel()
        if group and size + more > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += more
    yield group


def write_json(path: Path, value: dict[str, Any]) -> None:
    """An object in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _keep_others(old: Path, fresh: Path) -> None:
    """Copies what is neither weights nor config."""
    for path in old.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX_FILE, "config.json"):
            shutil.copy2(path, fresh / path.name)


def _swap(fresh: Path, folder: Path) -> None:
    """Renames; an existing folder steps aside first, and is back in place if the second rename fails."""
    if not folder.exists():
        fresh.rename(folder)
        return
    aside = fresh.with_name(f"{fresh.name}.old")
    folder.rename(aside)
    try:
        fresh.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside)
