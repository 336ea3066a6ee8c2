"""A checkpoint of random weights, written tensor by tensor: 1.7B takes 4 GB of disk and little memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from quasr.model.asr import Qwen3ASR
from quasr.model.config import parse_config
from quasr.weights.layout import name_table
from quasr.weights.load import SINGLE_FILE
from quasr.weights.save import fresh_folder, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import BinaryIO

    from torch import Tensor

    from quasr.bench.shape import Shape

SEED = 0
DEVIATION = 0.02
"""Of weights and biases: what Qwen's networks are initialised with, and small enough that no activation overflows."""

AT_ONCE = 1 << 24
"""Numbers made before they are written."""


def make_checkpoint(folder: Path, shape: Shape) -> None:
    """Writes `folder`, whole or not at all: bf16, the -hf layout, the same numbers every time. No tokenizer.

    Norms are 1, all else is normal with DEVIATION. Raises ResourceError where the disk is full.
    """
    raw = shape.config()
    with torch.device("meta"):
        parameters = Qwen3ASR(parse_config(raw)).state_dict()
    with fresh_folder(folder) as fresh:
        write_json(fresh / "config.json", raw)
        with (fresh / SINGLE_FILE).open("wb") as file:
            _write(file, parameters)


def _write(file: BinaryIO, parameters: Mapping[str, Tensor]) -> None:
    """The safetensors format: the length of a JSON header in 8 bytes, the header, then the tensors' bytes."""
    header, position = {}, 0
    for name, stored in name_table(parameters, "hf").items():
        size = 2 * parameters[name].numel()
        header[stored] = {
            "dtype": "BF16", "shape": list(parameters[name].shape), "data_offsets": [position, position + size],
        }  # fmt: skip
        position += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write(len(text).to_bytes(8, "little") + text)
    generator = torch.Generator().manual_seed(SEED)
    for name, tensor in parameters.items():
        is_norm = tensor.dim() == 1 and name.endswith("weight")
        _write_tensor(file, tensor.numel(), None if is_norm else generator)


def _write_tensor(file: BinaryIO, count: int, generator: torch.Generator | None) -> None:
    """Ones without a generator."""
    for start in range(0, count, AT_ONCE):
        size = min(AT_ONCE, count - start)
        numbers = torch.ones(size) if generator is None else torch.randn(size, generator=generator) * DEVIATION
        file.write(numbers.bfloat16().view(torch.uint8).numpy().tobytes())
