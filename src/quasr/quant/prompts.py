"""Taught clips: real audio in its prompt, followed by the transcript that the unquantised network itself gave it.

They are what 4 bits are calibrated on, and what `divergence` compares networks on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quasr.audio.decode import load
from quasr.audio.mel import log_mel
from quasr.engine.base import ClipRequest, token_budget
from quasr.text.prompt import Prompt, build_prompt
from quasr.types import SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from quasr.engine.base import Engine
    from quasr.model.asr import Qwen3ASR
    from quasr.text.tokenizer import SpecialTokens, Tokenizer

LONGEST_SECONDS = 30
"""Of a clip; what comes after is left away."""

TEXT_WEIGHT = 4.0
"""Of a position that predicts a token of the answer, where one of prompt or audio counts 1: audio has more positions,
but only these decide the text."""


@dataclass(frozen=True, slots=True)
class TaughtClip:
    """mel: (mel_bins, frames) fp32; the ids around the audio; `answer`: ids that follow, the stop token among them."""

    mel: NDArray[np.float32]
    prompt: Prompt
    answer: tuple[int, ...]


def read_clips(paths: Iterable[Path]) -> Iterator[NDArray[np.float32]]:
    """The first 30 s of each file: (n,) samples at 16 kHz. Raises AudioError."""
    for path in paths:
        yield load(path)[: LONGEST_SECONDS * SAMPLE_RATE]


def transcribe(
    engine: Engine,
    tokenizer: Tokenizer,
    clips: Sequence[NDArray[np.float32]],
    batch: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[int, ...]]:
    """The answer of `engine` to every clip of (n,) samples, language and all; `<|im_end|>` where it stopped.

    `progress` is called with the clips done.
    """
    prompt = build_prompt(tokenizer)
    order = sorted(range(len(clips)), key=lambda index: len(clips[index]), reverse=True)
    answers: list[tuple[int, ...]] = [()] * len(clips)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        results = engine.run([_request(clips[index], prompt) for index in chosen])
        for index, result in zip(chosen, results, strict=True):
            end = (tokenizer.special.im_end,) if result.finish_reason == "stop" else ()
            answers[index] = result.tokens + end
        if progress:
            progress(start + len(chosen))
    return answers


def _request(samples: NDArray[np.float32], prompt: Prompt) -> ClipRequest:
    return ClipRequest(samples, prompt.prefix, prompt.suffix, token_budget(len(samples) / SAMPLE_RATE))


def teach(
    tokenizer: Tokenizer,
    clips: Sequence[NDArray[np.float32]],
    mel_bins: int,
    answers: Sequence[tuple[int, ...]],
    forced_every: int = 2,
) -> list[TaughtClip]:
    """Joins clips and answers; clips without any answer are left out.

    In every `forced_every`-th clip (0: none) the language is forced, so its head `language English<asr_text>` belongs
    to the prompt, and only the text behind it is an answer.
    """
    prompt, special = build_prompt(tokenizer), tokenizer.special
    taught = []
    for index, (samples, answer) in enumerate(zip(clips, answers, strict=True)):
        forced = forced_every > 0 and index % forced_every == forced_every - 1
        head = _head(answer, special) if forced else 0
        if len(answer) > head:
            longer = Prompt(prompt.prefix, prompt.suffix + answer[:head])
            taught.append(TaughtClip(log_mel(samples, mel_bins), longer, answer[head:]))
    return taught


def _head(answer: tuple[int, ...], special: SpecialTokens) -> int:
    """Tokens up to `<asr_text>` and with it; 0 where there is none."""
    return answer.index(special.asr_text) + 1 if special.asr_text in answer else 0


def embed(model: Qwen3ASR, clip: TaughtClip) -> Tensor:
    """What goes into the decoder: (1, tokens, hidden). Its last `len(clip.answer)` positions predict the answer."""
    device = model.decoder.norm.weight.device
    audio = model.encode([torch.from_numpy(clip.mel).to(device)])
    prefix = torch.tensor(clip.prompt.prefix, device=device)
    suffix = torch.tensor(clip.prompt.suffix + clip.answer[:-1], device=device)
    return model.embed_prompts(audio, [prefix], [suffix])[0]


def position_weights(clip: TaughtClip, tokens: int, text_weight: float = TEXT_WEIGHT) -> Tensor:
    """(tokens,) fp32: `text_weight` where the answer is predicted, 1 elsewhere."""
    weights = torch.ones(tokens)
    weights[tokens - len(clip.answer) :] = text_weight
    return weights
