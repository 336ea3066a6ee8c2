"""Random Qwen3-ASR checkpoints, made with transformers and written in both layouts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3ASRConfig, Qwen3ASRForConditionalGeneration

if TYPE_CHECKING:
    from pathlib import Path

AUDIO_TOKEN = 7


@dataclass(frozen=True)
class Shape:
    """Sizes of a network, by the names that config.json uses."""

    name: str
    audio: dict[str, int]
    text: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Qwen3ASRConfig:
        """As transformers wants it."""
        return Qwen3ASRConfig(
            audio_config={"model_type": "qwen3_asr_encoder", "output_dim": self.text["hidden_size"], **self.audio},
            text_config={
                "model_type": "qwen3",
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "tie_word_embeddings": True,
                **self.text,
            },
            audio_token_id=AUDIO_TOKEN,
            pad_token_id=0,
            eos_token_id=[1, 2],
            tie_word_embeddings=True,
        )


def audio_sizes(layers: int, width: int, heads: int, ffn: int, stem: int) -> dict[str, int]:
    """The encoder's sizes by their names in config.json."""
    return {
        "encoder_layers": layers,
        "d_model": width,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": ffn,
        "downsample_hidden_size": stem,
    }


def text_sizes(layers: int, hidden: int, heads: tuple[int, int, int], ffn: int, vocab: int) -> dict[str, int]:
    """The decoder's sizes; `heads` is (query heads, key-value heads, head_dim)."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "intermediate_size": ffn,
        "vocab_size": vocab,
    }


TINY = Shape("tiny", audio_sizes(2, 32, 2, 64, 8), text_sizes(2, 48, (4, 2, 16), 96, 128))
ODD = Shape("odd", audio_sizes(3, 60, 5, 104, 12), text_sizes(3, 40, (6, 2, 24), 72, 203))
WIDE = Shape("0.6b-widths", audio_sizes(2, 896, 14, 3584, 480), text_sizes(2, 1024, (16, 8, 128), 3072, 1000))


def random_model(shape: Shape, seed: int = 3) -> Qwen3ASRForConditionalGeneration:
    """Weights that keep activations near 1 and the logits' deviation near 3.

    The final norm has random signs, or a tied head would repeat the newest token for ever;
    queries and keys are long, so that attention picks a few positions and every step sees something else.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3ASRForConditionalGeneration(shape.config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "model.language_model.norm.weight":
                parameter.copy_(noise.sign() + noise * 0.1)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.copy_(noise * 0.2 + 2)
            elif name.endswith("embed_tokens.weight"):
                parameter.copy_(noise * 3 / parameter.shape[1] ** 0.5)
            elif parameter.dim() == 1:
                parameter.copy_(noise * 0.1 + (0 if name.endswith("bias") else 1))
            else:
                parameter.copy_(noise * 1.3 / parameter[0].numel() ** 0.5)
    return model


def write_hf(model: Qwen3ASRForConditionalGeneration, folder: Path) -> None:
    """The -hf layout, written by transformers itself."""
    model.save_pretrained(folder)


def write_original(model: Qwen3ASRForConditionalGeneration, folder: Path) -> None:
    """The original layout: `thinker.*` names, the head stored again, the sizes under `thinker_config`."""
    folder.mkdir(parents=True)
    tensors = {_original_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = model.config.to_dict()
    thinker = {key: raw[key] for key in ("audio_config", "text_config", "audio_token_id")}
    whole = {
        "model_type": "qwen3_asr",
        "architectures": ["Qwen3ASRForConditionalGeneration"],
        "thinker_config": thinker,
    }
    (folder / "config.json").write_text(json.dumps(whole))


def _original_name(name: str) -> str:
    for new, old in (
        ("model.language_model.", "thinker.model."),
        ("model.multi_modal_projector.linear_1.", "thinker.audio_tower.proj1."),
        ("model.multi_modal_projector.linear_2.", "thinker.audio_tower.proj2."),
        ("lm_head.", "thinker.lm_head."),
        ("model.", "thinker."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise AssertionError(name)
