"""A small network whose sizes every group divides, and layers with known numbers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quasr.model.asr import Qwen3ASR
from quasr.model.config import parse_config
from quasr.weights.save import save_model

if TYPE_CHECKING:
    from pathlib import Path

SIZES: dict[str, Any] = {
    "audio_config": {
        "encoder_layers": 2,
        "d_model": 128,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 256,
        "output_dim": 128,
        "downsample_hidden_size": 8,
        "num_mel_bins": 16,
    },
    "text_config": {
        "vocab_size": 301,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
    },
}

RAW: dict[str, Any] = {"model_type": "qwen3_asr", **SIZES}
CONFIG = parse_config(RAW)
UNTIED = parse_config({**RAW, "tie_word_embeddings": False})
CPU = torch.device("cpu")


def network(dtype: torch.dtype = torch.float32) -> Qwen3ASR:
    """Random weights; activations stay near 1."""
    torch.manual_seed(3)
    model = Qwen3ASR(CONFIG)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight[0].numel() ** -0.5)
            elif name.endswith("bias"):
                weight.normal_(0, 0.1)
    return model.to(dtype).requires_grad_(False).eval()


def checkpoint(folder: Path) -> Path:
    """The network as a bf16 checkpoint in the -hf layout, and a file that stands for a tokenizer."""
    save_model(network(), folder, RAW, "hf", torch.bfloat16)
    (folder / "tokenizer.json").write_text(json.dumps({"stands": "for a tokenizer"}))
    return folder


def linear(dtype: torch.dtype = torch.float32, rows: int = 96, columns: int = 256) -> nn.Linear:
    """With normal weights and a bias."""
    generator = torch.Generator().manual_seed(5)
    layer = nn.Linear(columns, rows).requires_grad_(False)
    layer.weight.copy_(torch.randn(rows, columns, generator=generator) * columns**-0.5)
    return layer.to(dtype)


def activations(columns: int = 256, *, outliers: bool = False) -> torch.Tensor:
    """(64, columns) normal numbers; with `outliers`, four columns of them are 30 times larger."""
    x = torch.randn(64, columns, generator=torch.Generator().manual_seed(6))
    if outliers:
        x[:, [3, 50, 77, 200]] *= 30
    return x


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """|found - truth| / |truth|, in fp64."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())
