"""Clips with made-up answers for the network of `quant_samples`."""

from __future__ import annotations

import numpy as np
from quant_samples import CONFIG

from quasr.quant.prompts import TaughtClip
from quasr.text.prompt import Prompt


def taught_clips(count: int = 4, seed: int = 0) -> list[TaughtClip]:
    """Noise of 0.5 to 2 s; 5 ids before, 3 after, and answers of 4 to 12."""
    rng = np.random.default_rng(seed)

    def ids(size: int) -> tuple[int, ...]:
        return tuple(int(index) for index in rng.integers(0, CONFIG.text.vocab_size, size))

    return [
        TaughtClip(
            rng.standard_normal((CONFIG.audio.mel_bins, int(rng.integers(50, 200)))).astype(np.float32),
            Prompt(ids(5), ids(3)),
            ids(int(rng.integers(4, 12))),
        )
        for _ in range(count)
    ]
