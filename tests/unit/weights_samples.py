"""A small checkpoint whose numbers are random, written without the code under test."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from quasr.model.asr import Qwen3ASR
from quasr.model.config import parse_config

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SIZES: dict[str, Any] = {
    "audio_config": {
        "encoder_layers": 2,
        "d_model": 16,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "output_dim": 20,
        "downsample_hidden_size": 4,
        "num_mel_bins": 16,
    },
    "text_config": {
        "vocab_size": 32,
        "hidden_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 28,
    },
}

ORIGINAL = {"model_type": "qwen3_asr", "thinker_config": SIZES}
HF = {"model_type": "qwen3_asr", **SIZES}

# Written out by hand from the published checkpoints, so that the rules in layout.py are not their own judge.
PAIRS = {
    "encoder.stem.conv2d1.weight": ("thinker.audio_tower.conv2d1.weight", "model.audio_tower.conv2d1.weight"),
    "encoder.stem.conv_out.weight": ("thinker.audio_tower.conv_out.weight", "model.audio_tower.conv_out.weight"),
    "encoder.layers.1.self_attn.out_proj.bias": (
        "thinker.audio_tower.layers.1.self_attn.out_proj.bias",
        "model.audio_tower.layers.1.self_attn.out_proj.bias",
    ),
    "encoder.layers.0.final_layer_norm.weight": (
        "thinker.audio_tower.layers.0.final_layer_norm.weight",
        "model.audio_tower.layers.0.final_layer_norm.weight",
    ),
    "encoder.ln_post.bias": ("thinker.audio_tower.ln_post.bias", "model.audio_tower.ln_post.bias"),
    "encoder.linear_1.weight": ("thinker.audio_tower.proj1.weight", "model.multi_modal_projector.linear_1.weight"),
    "encoder.linear_2.bias": ("thinker.audio_tower.proj2.bias", "model.multi_modal_projector.linear_2.bias"),
    "decoder.embed_tokens.weight": ("thinker.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
    "decoder.layers.1.self_attn.q_norm.weight": (
        "thinker.model.layers.1.self_attn.q_norm.weight",
        "model.language_model.layers.1.self_attn.q_norm.weight",
    ),
    "decoder.norm.weight": ("thinker.model.norm.weight", "model.language_model.norm.weight"),
    "decoder.lm_head.weight": ("thinker.lm_head.weight", "lm_head.weight"),
}

EMBEDDING = "thinker.model.embed_tokens.weight"
HEAD = "thinker.lm_head.weight"
NORM = "thinker.model.norm.weight"


def random_network(*, tied: bool = True) -> Qwen3ASR:
    """The network of SIZES with random numbers."""
    text = {**SIZES["text_config"], "tie_word_embeddings": tied}
    torch.manual_seed(0)
    network = Qwen3ASR(parse_config({"model_type": "qwen3_asr", "thinker_config": {**SIZES, "text_config": text}}))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network


def original_name(parameter: str) -> str:
    """thinker.* names, by other means than the table under test."""
    path = parameter.replace("encoder.stem.", "encoder.").replace("encoder.linear_", "encoder.proj")
    if path.startswith("decoder.lm_head"):
        return "thinker." + path.removeprefix("decoder.")
    return "thinker." + path.replace("encoder.", "audio_tower.", 1).replace("decoder.", "model.", 1)


def original_tensors(*, tied: bool = True) -> dict[str, Tensor]:
    """All tensors of `random_network` by their original names."""
    return {original_name(name): value.clone() for name, value in random_network(tied=tied).state_dict().items()}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] = ORIGINAL) -> Path:
    """One file and its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sharded(folder: Path, *shards: dict[str, Tensor], index: dict[str, str] | None = None) -> Path:
    """Several files and an index, which may lie."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {}
    for number, tensors in enumerate(shards):
        save_file(tensors, folder / f"part-{number}.safetensors")
        table |= dict.fromkeys(tensors, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table if index is None else index}))
    (folder / "config.json").write_text(json.dumps(ORIGINAL))
    return folder


def write_large(folder: Path) -> Path:
    """A bf16 folder of 600 MB, half of it the embedding, and its head again."""
    sizes = copy.deepcopy(SIZES)
    sizes["text_config"] |= {"vocab_size": 150_000, "hidden_size": 1024, "intermediate_size": 24_576}
    sizes["audio_config"]["output_dim"] = 1024
    config = {"model_type": "qwen3_asr", "thinker_config": sizes}
    with torch.device("meta"):
        shapes = Qwen3ASR(parse_config(config)).state_dict()
    tensors = {original_name(n): torch.full(t.shape, 0.5, dtype=torch.bfloat16) for n, t in shapes.items()}
    tensors[HEAD] = tensors[EMBEDDING].clone()
    return write(folder, tensors, config)
