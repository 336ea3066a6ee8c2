"""From clips to the decoder's input: mel frames, audio vectors and prompt tokens, packed without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from quasr.engine.mel_torch import frame_count, packed_log_mel
from quasr.model.transfer import all_to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from quasr.engine.base import ClipRequest
    from quasr.engine.fast import FastDecoder
    from quasr.model.config import AudioConfig


Encode: TypeAlias = "Callable[[Tensor, Sequence[int]], Tensor]"


@dataclass(frozen=True, slots=True)
class AudioSide:
    """What makes audio vectors of samples. `encode`: `AudioEncoder.encode` or what takes its place; `mel_slice`: frames
    transformed at a time."""

    config: AudioConfig
    encode: Encode
    mel_slice: int


def prompt_length(config: AudioConfig, request: ClipRequest) -> int:
    """Positions of a clip's prompt: prefix, audio, suffix."""
    return len(request.prefix) + config.token_count(frame_count(len(request.samples))) + len(request.suffix)


def embed_prompts(
    audio: AudioSide, decoder: FastDecoder, requests: Sequence[ClipRequest], samples: Tensor, rows: int
) -> Tensor:
    """(rows, hidden) fp32, prompt after prompt, and any token's where rows are left. Nothing waits for the device.

    samples: those of the requests, as `mel_torch.join` joins them, on the device.
    """
    lengths = [len(request.samples) for request in requests]
    frames = [frame_count(length) for length in lengths]
    device = samples.device
    mel = packed_log_mel(samples, lengths, audio.config.mel_bins, audio.mel_slice)
    # A plan has no room for them beside what comes now, which is more.
    del samples
    vectors = audio.encode(mel, frames)
    layout = _lay_out(requests, [audio.config.token_count(count) for count in frames], rows)
    ids, places = all_to_device(layout, device)
    x = decoder.embed(ids)
    return x.index_copy_(0, places, vectors.to(x.dtype))


def _lay_out(
    requests: Sequence[ClipRequest], audio: Sequence[int], rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rows,) token ids of all prompts, 0 where audio comes and behind the last, and the places where audio comes."""
    sizes = [
        size for one, count in zip(requests, audio, strict=True) for size in (len(one.prefix), count, len(one.suffix))
    ]
    heard = np.repeat(np.tile([False, True, False], len(requests)), sizes)
    ids = np.zeros(rows, np.int64)
    ids[np.flatnonzero(~heard)] = [token for one in requests for token in (*one.prefix, *one.suffix)]
    return ids, np.flatnonzero(heard)
