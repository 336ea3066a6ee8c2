"""Encoder and decoder together: where the audio's vectors take their places in the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quasr.model.decoder import Decoder, KVCache
from quasr.model.encoder import AudioEncoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quasr.model.config import ModelConfig


class Qwen3ASR(nn.Module):
    """The whole network. Weights have one dtype; activations follow it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = AudioEncoder(config.audio)
        self.decoder = Decoder(config.text)

    def encode(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Ragged clips of (mel_bins, frames) -> one (tokens, hidden) for each."""
        counts = [self.config.audio.token_count(mel.shape[1]) for mel in mels]
        return list(self.encoder(mels).split(counts))

    def embed_prompts(
        self, audio: Sequence[Tensor], prefixes: Sequence[Tensor], suffixes: Sequence[Tensor]
    ) -> tuple[Tensor, list[int]]:
        """Prefix tokens, audio vectors, suffix tokens for each clip.

        Returns (batch, longest, hidden), padded with zeros at the end, and the true lengths.
        """
        embed = self.decoder.embed_tokens
        rows = []
        for prefix, vectors, suffix in zip(prefixes, audio, suffixes, strict=True):
            before, after = embed(prefix), embed(suffix)
            rows.append(torch.cat([before, vectors.to(before.dtype), after]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), [len(row) for row in rows]

    def prefill(self, embeddings: Tensor, lengths: Sequence[int], cache: KVCache) -> Tensor:
        """Fills the cache and returns the logits (batch, vocab_size) after each row's own last position."""
        hidden = self.decoder.prefill(embeddings, cache)
        last = torch.tensor(lengths, device=hidden.device) - 1
        return self.decoder.logits(hidden[torch.arange(len(last), device=hidden.device), last])

    def step(self, tokens: Tensor, lengths: Tensor, longest: int, cache: KVCache) -> Tensor:
        """One more token for every row: logits (batch, vocab_size). See `Decoder.step`."""
        return self.decoder.logits(self.decoder.step(tokens, lengths, longest, cache))
