"""The shape of a checkpoint, read from either layout of `config.json`. No torch here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quasr.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError

if TYPE_CHECKING:
    from pathlib import Path

Layout = Literal["original", "hf"]
"""`original`: Qwen/Qwen3-ASR-*, tensors under `thinker.`; `hf`: Qwen/Qwen3-ASR-*-hf, tensors under `model.`."""

STEM_STRIDES = 3
"""Convolutions in the stem, each of which halves time and frequency, rounding up."""


def halve_up(size: int) -> int:
    """Length after the stem: a 3-wide, stride-2, pad-1 convolution gives ceil(n / 2), three times."""
    for _ in range(STEM_STRIDES):
        size = (size + 1) // 2
    return size


@dataclass(frozen=True, slots=True)
class AudioConfig:
    """The audio encoder. Frames are 10 ms; a chunk is what the stem sees, a window what attention sees."""

    layers: int
    width: int
    heads: int
    ffn: int
    output: int
    mel_bins: int = 128
    stem_channels: int = 480
    chunk_frames: int = 100
    window_frames: int = 800

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a full chunk: 13 for 100 frames."""
        return halve_up(self.chunk_frames)

    @property
    def window_chunks(self) -> int:
        """Chunks of a full attention window: 8 for 800 frames."""
        return self.window_frames // self.chunk_frames

    @property
    def stem_features(self) -> int:
        """Width of a flattened stem output: channels x remaining mel bins, 7680 for 480 and 128."""
        return self.stem_channels * halve_up(self.mel_bins)

    def token_count(self, frames: int) -> int:
        """Audio tokens of a clip of `frames` mel frames."""
        full, rest = divmod(frames, self.chunk_frames)
        return full * self.chunk_tokens + halve_up(rest)


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The decoder, a Qwen3 with grouped-query attention."""

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rms_eps: float = 1e-6
    rope_theta: float = 1e6
    tied_head: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Both halves, the layout they came in, and what the checkpoint itself states (None where it does not).

    That is ids, and the longest audio in seconds that it was trained on: no entry of the released checkpoints.
    """

    audio: AudioConfig
    text: TextConfig
    layout: Layout
    audio_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    languages: tuple[str, ...] = ()
    max_audio_seconds: float | None = None


def read_config(folder: Path) -> ModelConfig:
    """Reads `config.json` (and the stop ids in `generation_config.json`) of a checkpoint folder.

    Raises ModelNotFoundError, CheckpointError or UnsupportedModelError, each with the file's name.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelNotFoundError(f"no model folder at {folder}")
    if not path.is_file():
        raise ModelNotFoundError(f"{folder} is no checkpoint: it has no config.json")
    raw = read_json(path)
    generation = folder / "generation_config.json"
    if generation.is_file():
        raw = {"eos_token_id": read_json(generation).get("eos_token_id"), **raw}
    try:
        return parse_config(raw)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: {_explain(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint file, or CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: download the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Either layout of `config.json`. Raises UnsupportedModelError for another architecture, KeyError for a gap."""
    kind = raw.get("model_type")
    if kind != "qwen3_asr":
        raise UnsupportedModelError(
            f"model_type {kind!r} is not supported: quasr runs Qwen3-ASR checkpoints (model_type 'qwen3_asr')"
        )
    thinker = raw.get("thinker_config")
    body: dict[str, Any] = thinker if isinstance(thinker, dict) else raw
    tied = body.get("tie_word_embeddings", body["text_config"].get("tie_word_embeddings", True))
    config = ModelConfig(
        audio=_audio(body["audio_config"]),
        text=_text(body["text_config"], tied=bool(tied)),
        layout="original" if thinker is not None else "hf",
        audio_token_id=_maybe_int(body.get("audio_token_id")),
        eos_token_ids=_ids(raw.get("eos_token_id", body.get("eos_token_id"))),
        languages=tuple(map(str, raw.get("support_languages") or ())),
        max_audio_seconds=None if raw.get("max_audio_seconds") is None else float(raw["max_audio_seconds"]),
        dtype=str(body.get("dtype") or body.get("torch_dtype") or raw.get("dtype") or "bfloat16"),
    )
    _check(config)
    return config


def _audio(raw: dict[str, Any]) -> AudioConfig:
    return AudioConfig(
        layers=int(raw["encoder_layers"]),
        width=int(raw["d_model"]),
        heads=int(raw["encoder_attention_heads"]),
        ffn=int(raw["encoder_ffn_dim"]),
        output=int(raw["output_dim"]),
        mel_bins=int(raw.get("num_mel_bins", 128)),
        stem_channels=int(raw.get("downsample_hidden_size", 480)),
        chunk_frames=2 * int(raw.get("n_window", 50)),
        window_frames=int(raw.get("n_window_infer", 800)),
    )


def _text(raw: dict[str, Any], *, tied: bool) -> TextConfig:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    heads = int(raw["num_attention_heads"])
    return TextConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden=int(raw["hidden_size"]),
        layers=int(raw["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads", heads)),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
        ffn=int(raw["intermediate_size"]),
        rms_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 1e6),
        tied_head=tied,
    )


def _check(config: ModelConfig) -> None:
    audio, text = config.audio, config.text
    sizes = [audio.layers, audio.width, audio.heads, audio.ffn, audio.mel_bins, audio.stem_channels]
    sizes += [text.vocab_size, text.hidden, text.layers, text.heads, text.kv_heads, text.head_dim, text.ffn]
    if min(sizes) < 1:
        raise ValueError("a size is zero or negative")
    if audio.chunk_frames < 1 or audio.window_frames % audio.chunk_frames or audio.window_frames < 1:
        raise ValueError("n_window_infer is not a multiple of 2 * n_window")
    if audio.width % audio.heads or audio.width % 2 or audio.width < 4:
        raise ValueError("d_model does not divide into encoder_attention_heads, or is odd")
    if text.heads % text.kv_heads or text.head_dim % 2:
        raise ValueError("num_attention_heads is not a multiple of num_key_value_heads, or head_dim is odd")
    if not (0 < text.rms_eps < 1 and 0 < text.rope_theta < float("inf")):
        raise ValueError("rms_norm_eps or rope_theta is out of range")
    if config.max_audio_seconds is not None and not config.max_audio_seconds > 0:
        raise ValueError(f"max_audio_seconds is {config.max_audio_seconds}")
    if audio.output != text.hidden:
        raise ValueError(f"output_dim {audio.output} of the encoder is not the decoder's hidden_size {text.hidden}")


def _ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, (list, tuple)):
        return tuple(int(item) for item in value)
    return (int(str(value)),)


def _maybe_int(value: object) -> int | None:
    return None if value is None else int(str(value))


def _explain(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the entry {error} is missing"
    return f"an entry is of the wrong type ({error})" if isinstance(error, (TypeError, AttributeError)) else str(error)
