"""From clips to the decoder's input: mel frames, audio vectors and prompt tokens, packed without padding."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from quasr.engine.mel_torch import frame_count, packed_log_mel
from quasr.model.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from quasr.engine.base import ClipRequest
    from quasr.engine.fast import FastDecoder
    from quasr.model.config import AudioConfig
    from quasr.model.encoder import AudioEncoder


Encode: TypeAlias = "Callable[[Tensor, Sequence[int]], Tensor]"


def prompt_length(config: AudioConfig, request: ClipRequest) -> int:
    """Positions of a clip's prompt: prefix, audio, suffix."""
    return len(request.prefix) + config.token_count(frame_count(len(request.samples))) + len(request.suffix)


def embed_prompts(
    encoder: AudioEncoder, encode: Encode, decoder: FastDecoder, requests: Sequence[ClipRequest]
) -> Tensor:
    """(sum of the prompts' lengths, hidden) fp32, prompt after prompt. Nothing waits for the device.

    `encode` is `encoder.encode` or what takes its place.
    """
    device = encoder.linear_2.weight.device
    mel = packed_log_mel([request.samples for request in requests], encoder.config.mel_bins, device)
    frames = [frame_count(len(request.samples)) for request in requests]
    audio = encode(mel, frames)
    ids, places = _lay_out(requests, [encoder.config.token_count(count) for count in frames])
    x = decoder.embed(to_device(ids, device))
    return x.index_copy_(0, to_device(places, device), audio.to(x.dtype))


def _lay_out(requests: Sequence[ClipRequest], audio: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all prompts, 0 where audio comes, and the places where it does."""
    ids = [[*one.prefix, *[0] * count, *one.suffix] for one, count in zip(requests, audio, strict=True)]
    begins = accumulate(map(len, ids[:-1]), initial=0)
    firsts = [begin + len(one.prefix) for begin, one in zip(begins, requests, strict=True)]
    places = [np.arange(first, first + count) for first, count in zip(firsts, audio, strict=True)]
    return np.concatenate([np.array(one, np.int64) for one in ids]), np.concatenate(places)
