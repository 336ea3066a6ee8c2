"""Sound to the decoder's vectors through the graphs `stem` and `encoder`: chunks and windows laid out in numpy.

The layout is that of `quasr.model.encoder`: docs/onnx.md says it in words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quasr.audio.mel import HOP, MIN_SAMPLES, log_mel
from quasr.model.config import halve_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from quasr.export.manifest import GraphFacts

STEM_CHUNKS = 2
"""Chunks, of 1 s each, that go through the stem at once: bounds its memory whatever the clip's length."""

ENCODER_TOKENS = 832
"""Most tokens that go through the encoder at once, in whole windows: 8 of 8 s, or 64 of 1 s."""


def token_count(facts: GraphFacts, samples: int) -> int:
    """Audio tokens of a clip of so many samples."""
    whole, rest = divmod(max(samples, MIN_SAMPLES) // HOP, facts.chunk_frames)
    return whole * facts.chunk_tokens + halve_up(rest)


class AudioGraphs:
    """The audio half of the network."""

    def __init__(self, stem: Any, encoder: Any, facts: GraphFacts) -> None:
        self._stem = stem
        self._encoder = encoder
        self._facts = facts

    def encode(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n,) samples at 16 kHz -> (tokens, hidden)."""
        tokens = self._tokens(log_mel(samples, self._facts.mel_bins))[: token_count(self._facts, len(samples))]
        parts = [self._transform(part) for part in _slices(tokens, self._slice_tokens())]
        return np.concatenate(parts)

    def _tokens(self, mel: NDArray[np.float32]) -> NDArray[np.float32]:
        """(mel_bins, frames) -> (tokens, width), behind the clip's end those of the padding."""
        chunks = self._chunks(mel)
        parts = [self._stem.run(None, {"mel": part})[0] for part in _slices(chunks, STEM_CHUNKS)]
        return np.concatenate(parts).reshape(-1, parts[0].shape[-1])

    def _chunks(self, mel: NDArray[np.float32]) -> NDArray[np.float32]:
        """(mel_bins, frames) -> (chunks, mel_bins, chunk_frames), the last chunk padded with zeros."""
        size = self._facts.chunk_frames
        padded = np.pad(mel, ((0, 0), (0, -mel.shape[1] % size)))
        return np.ascontiguousarray(padded.reshape(len(mel), -1, size).transpose(1, 0, 2))

    def _transform(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """(tokens, width), whole windows and the clip's last -> (tokens, hidden)."""
        full, rest = divmod(len(tokens), self._facts.window_tokens)
        lengths = [self._facts.window_tokens] * full + [rest] * (rest > 0)
        inputs = {"tokens": tokens, "window_lengths": np.array(lengths, np.int64)}
        audio: NDArray[np.float32] = self._encoder.run(None, inputs)[0]
        return audio

    def _slice_tokens(self) -> int:
        window = self._facts.window_tokens
        return max(1, ENCODER_TOKENS // window) * window


def _slices(array: NDArray[np.float32], size: int) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(array), size):
        yield array[start : start + size]
