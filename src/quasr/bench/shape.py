"""The shapes of the published checkpoints and of the bundled one, as config.json of the -hf layout has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quasr.errors import OptionError
from quasr.quant.scheme import suggest

END_OF_TEXT, END_OF_TURN, AUDIO_PAD = 151643, 151645, 151676


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of encoder and decoder. `special`: the ids of end of text, end of turn, and an audio position."""

    encoder_layers: int
    encoder_width: int
    encoder_heads: int
    encoder_ffn: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int = 151_936
    stem_channels: int = 480
    window_frames: int = 800
    special: tuple[int, int, int] = (END_OF_TEXT, END_OF_TURN, AUDIO_PAD)

    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return {
            "architectures": ["Qwen3ASRForConditionalGeneration"],
            "model_type": "qwen3_asr",
            "audio_config": self._audio(),
            "text_config": self._text(),
            "audio_token_id": self.special[2],
            "eos_token_id": list(self.special[:2]),
            "pad_token_id": self.special[0],
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        }

    def _audio(self) -> dict[str, Any]:
        return {
            "model_type": "qwen3_asr_encoder",
            "encoder_layers": self.encoder_layers,
            "d_model": self.encoder_width,
            "encoder_attention_heads": self.encoder_heads,
            "encoder_ffn_dim": self.encoder_ffn,
            "output_dim": self.hidden,
            "num_mel_bins": 128,
            "downsample_hidden_size": self.stem_channels,
            "n_window": 50,
            "n_window_infer": self.window_frames,
        }

    def _text(self) -> dict[str, Any]:
        return {
            "model_type": "qwen3",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "max_position_embeddings": 65_536,
            "tie_word_embeddings": True,
        }


SHAPES = {
    "0.6b": Shape(18, 896, 14, 3584, layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128, ffn=3072),
    "1.7b": Shape(24, 1024, 16, 4096, layers=28, hidden=2048, heads=16, kv_heads=8, head_dim=128, ffn=6144),
    "demo": Shape(
        8, 384, 6, 1024, layers=6, hidden=384, heads=6, kv_heads=2, head_dim=64, ffn=768,
        vocabulary=1792, stem_channels=160, window_frames=100, special=(1785, 1787, 1790),
    ),
}  # fmt: skip
"""By the names that `--shape` takes."""


def shape_named(name: str) -> Shape:
    """Raises OptionError for a name that is none of SHAPES."""
    if name not in SHAPES:
        raise OptionError(f"unknown shape {name[:40]!r}: {suggest(name, tuple(SHAPES))}")
    return SHAPES[name]
